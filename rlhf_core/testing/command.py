"""The command line inside a test: what it printed, its exit code, and the smallest whole run.

Example:
    >>> outcome = run_command("train", *TINY_RUN, "--runs", tmp_path, "--name", "mine")
    >>> assert outcome.code == 0, outcome.err
"""

import contextlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass

from rlhf_core import cli

TINY_RUN = (
    *("--threads", "1", "--device", "cpu", "--seed", "3", "--pretrain.steps", "3"),
    *("--model.layers", "1", "--model.hidden-size", "16", "--model.heads", "2", "--model.context", "32"),
    *("--sampling.max-new-tokens", "8", "--log.evaluation-prompts", "0", "--log.save-every", "2", "--log.keep", "2"),
    *("--ppo.steps", "5", "--ppo.batch-size", "4", "--ppo.minibatch-size", "2", "--ppo.micro-batch-size", "2"),
    *("--ppo.epochs", "2"),
)
"""Options of a run that does everything in about two seconds; it learns nothing."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line on standard error of a command that failed.

        Raises:
            AssertionError: there is another number of lines, or it is a traceback.
        """
        lines = self.err.splitlines()
        if len(lines) != 1 or not lines[0].startswith("rlhf: ") or "Traceback" in self.err:
            raise AssertionError(f"not one line that says what is wrong:\n{self.err or '(nothing)'}")
        return lines[0]


def run_command(*arguments: object) -> Outcome:
    """Run ``rlhf`` with these arguments in this process, and give the environment back as it was."""
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with _environment_kept(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
    return Outcome(code if isinstance(code, int) else 0, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _environment_kept() -> Iterator[None]:
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
