"""What every test of the project shares."""

import hypothesis
import torch

pytest_plugins = ["rlhf_core.testing.plugin"]

# The same examples on every machine, and no clock: a busy machine is not a failure.
hypothesis.settings.register_profile("kit", derandomize=True, deadline=None)
hypothesis.settings.load_profile("kit")
torch.set_num_threads(1)
