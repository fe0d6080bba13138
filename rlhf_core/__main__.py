"""``python -m rlhf_core`` is ``rlhf``."""

from rlhf_core.cli import main

main()
