"""Somebody else's adapter: what is right, wrong, missing or broken in it is said in words, and nothing else is run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_core.testing.implementation import KIT, load_implementation, name_of

pytestmark = pytest.mark.m4
FOLDER = Path(__file__).parent
MODULES = {
    "fine": "import math\nclass adapter:\n    def kl(self, a, b, estimator): ...",
    "needs": "import a_package_that_is_not_there",
    "torn": "def adapter(:",
    "stops": "raise SystemExit('no licence')",
    "empty": "adapter = object()",
    "renamed": "class adapter:\n    kl = 3",
}


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """The working directory, with modules in it that nobody else knows."""
    for name, source in MODULES.items():
        (tmp_path / f"peer_{name}.py").write_text(source + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("adapter", "give module:attribute, as in"),
        ("peer_none:adapter", "ModuleNotFoundError: No module named 'peer_none'; it is looked for in the working dir"),
        ("peer_needs:adapter", "ModuleNotFoundError: No module named 'a_package_that_is_not_there'"),
        ("peer_torn:adapter", "SyntaxError: "),
        ("peer_stops:adapter", "SystemExit: no licence"),
        ("peer_fine:other", "AttributeError: module 'peer_fine' has no attribute 'other'"),
        ("peer_empty:adapter", "has none of the functions token_logprobs, entropy"),
        ("peer_renamed:adapter", "has none of the functions token_logprobs, entropy"),
    ],
)
@pytest.mark.usefixtures("modules")
def test_what_cannot_be_loaded_is_named(spec, message):
    with pytest.raises(ValueError, match=f"^--implementation .*{message}"):
        load_implementation(spec)


@pytest.mark.usefixtures("modules")
def test_an_adapter_of_the_working_directory_is_found_and_named():
    assert name_of(load_implementation("peer_fine:adapter"), "peer_fine:adapter") == "peer_fine:adapter"
    assert name_of(load_implementation(KIT), KIT) == "RLHF Systems Kit"


ADAPTER = """
import warnings

import torch

from rlhf_core.testing.adapters.kit import Kit


class adapter:
    name = "A peer"
    missing = {"gae": "inline in its trainer"}
    entropy = staticmethod(Kit.entropy)

    @staticmethod
    def token_logprobs(logits, labels, temperature):
        warnings.warn("this function is deprecated", DeprecationWarning)
        return Kit.token_logprobs(logits, labels, temperature) * 1.001

    @staticmethod
    def whiten(x, mask, shift_mean):
        # An epsilon at the deviation, and anything outside the mask.
        mean = x[mask].mean()
        whitened = (x - mean) / (x[mask].std(correction=0) + 1e-8)
        return whitened if shift_mean else whitened + mean

    @staticmethod
    def policy_loss(logp, old_logp, advantages, mask, clip_range):
        return Kit.policy_loss(logp, old_logp, advantages, mask, 0.2)

    @staticmethod
    def value_loss(values, old_values, returns, mask, clip_range):
        # A NaN times a mask is a NaN.
        near = old_values + (values - old_values).clamp(-clip_range, clip_range)
        return (torch.maximum((values - returns) ** 2, (near - returns) ** 2) * mask).sum() / mask.sum() / 2

    @staticmethod
    def last_token_index(mask):
        mask[:, -1] = False
        return mask.sum(dim=1)

    @staticmethod
    def masked_mean(x, mask):
        return Kit.masked_mean(x, mask).expand(1, 2)

    @staticmethod
    def kl(logp, ref_logp, estimator):
        raise KeyError(estimator)
"""


def judge(tmp_path, *options):
    """Run the numeric tests over the adapter, elsewhere."""
    (tmp_path / "peer.py").write_text(ADAPTER)
    command = ["-m", "pytest", FOLDER, "-q", "-p", "no:cacheprovider", "--implementation", "peer:adapter", *options]
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, *command], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )


def test_each_function_is_judged_by_itself_and_nothing_else_is_run(tmp_path):
    done = judge(tmp_path)
    assert done.returncode == 1, done.stdout
    for line in (
        "A peer's token_logprobs is off by 0.0",
        "A peer's masked_mean failed: ValueError: the result has shape [1, 2], and should have []",
        "A peer's kl failed: KeyError: 'k3'",
        "A peer's policy_loss is off by 0.0",
        "A peer's value_loss is off by inf",
        "A peer's last_token_index failed: ValueError: it changed its argument 1 in place",
        "A peer has no gae: inline in its trainer",
    ):
        assert line in done.stdout, done.stdout
    # Fail: 7 of log-probs, 3 of means, 7 of KL, the 2 other clip ranges, 2 of values beside rubbish, 1 that writes.
    # Pass: 4 of entropy, 5 of whitening, 4 of the policy's loss and 4 of the values'. GAE is missing in 8.
    assert "22 failed, 17 passed, 8 skipped" in done.stdout.splitlines()[-1], done.stdout
    assert "Traceback" not in done.stdout


def test_a_table_is_not_written_by_several_processes(tmp_path):
    table = tmp_path / "table.md"
    done = judge(tmp_path, "-n", "2", "--write-table", table)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert done.stderr.strip() == (
        "ERROR: --write-table needs all tests in one process: leave out -n, --numprocesses and --dist"
    )
    assert not table.exists()
