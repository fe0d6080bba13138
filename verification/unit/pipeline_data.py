"""Small preferences and the options with which each stage takes a moment; they learn little."""

import json
from pathlib import Path

MODEL = (
    *("--model.layers", "1", "--model.hidden-size", "16", "--model.heads", "2", "--model.context", "64"),
    *("--model.vocabulary", "270"),
)
COMMON = ("--threads", "1", "--device", "cpu", "--seed", "3")
TRAINING = ("--training.steps", "6", "--training.batch-size", "4", "--training.micro-batch-size", "2")
TRAINING = (*TRAINING, "--training.save-every", "2")
PPO = (
    *("--ppo.steps", "2", "--ppo.batch-size", "4", "--ppo.minibatch-size", "2", "--ppo.micro-batch-size", "2"),
    *("--sampling.max-new-tokens", "6", "--log.save-every", "1"),
)


def preferences(n: int = 60) -> list[dict[str, object]]:
    """The chosen one says good."""
    return [
        {"prompt": f"film {number % 20} was", "chosen": f" good {number}", "rejected": f" bad {number // 2} ."}
        for number in range(n)
    ]


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
