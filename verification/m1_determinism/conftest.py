"""M1: a seed decides a run, to the last bit. ``pytest verification/ -m m1``.

The runs are real ``rlhf train`` processes (m1.toml, m1_gpt2.toml), started two at a time by ``m1_runs.RunPool``; the
tests compare their ``metrics.jsonl`` and ``samples.jsonl`` byte by byte, and the files of the last checkpoint too.
The moments at which runs are killed are drawn from a fixed seed and printed; ``M1_DRAW=7`` draws others.
Tests marked ``slow`` emulate other processors with Debian's ``qemu-user`` (``apt-get install qemu-user``).

**Golden hashes.** ``golden_hashes/`` holds the SHA-256 of the logs, one file for what the hash belongs to:

- ``portable-base-torch-2.13.0.json``, numerics = "portable": one for each torch version, on every x86-64 processor;
- ``native-1-first-torch-2.13.0.json``, numerics = "native", the default: one for each torch version, on every x86-64
  processor with AVX2 and fused multiply-add (2013 and later), for any number of threads.

Where none is recorded, the test skips and names the command that records it::

    pytest verification/m1_determinism -k golden_hash_of --snapshot-update

Record anew only when a change is *meant* to change numbers, say so in the commit, and see that everything else
(``-k "not golden_hash_of"``) passes. Recording leaves the files of other torch versions alone.
"""

from collections.abc import Iterator

import pytest
from m1_runs import Run, RunPool


@pytest.fixture(scope="session")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunPool]:
    """Start the runs that the selected tests name in their parameters, and hand out their folders."""
    pool = RunPool(tmp_path_factory.mktemp("m1"))
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    pool.start(value for values in parameters for value in values.values() if isinstance(value, Run))
    yield pool
    pool.close()
