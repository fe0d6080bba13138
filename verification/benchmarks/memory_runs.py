"""Trainings whose memory is predicted and then measured, each in processes of its own.

    python verification/benchmarks/memory_runs.py

prints both for every case: what to look at after a change to `Costs` in `rlhf_core/memory_plan.py`.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20

COMMAND = "from rlhf_core.cli import main; main()"
MEASURED = """
import sys
from rlhf_core.cli import main
from rlhf_core.profiling import peak_memory_bytes
try:
    main(sys.argv[1:])
finally:
    print("largest resident set:", peak_memory_bytes())
"""
MAKE_MODEL = """
import sys
import torch
from transformers import GPT2LMHeadModel
from rlhf_core.data import reviews
from rlhf_core.data.tokenization import word_tokenizer
sys.path.insert(0, sys.argv[2])
import ppo_workload
tokenizer = word_tokenizer(reviews.VOCABULARY)
configuration = ppo_workload.SHAPES["M"].configuration()
configuration.eos_token_id, configuration.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
GPT2LMHeadModel(configuration).save_pretrained(sys.argv[1])
tokenizer.save_pretrained(sys.argv[1])
"""

WIDE = "--model.layers 4 --model.hidden-size 512 --model.heads 8 --model.context 160 --sampling.max-new-tokens 96"
SHORT = "--device cpu --pretrain.steps 2 --ppo.steps 2 --ppo.epochs 1 --ppo.batch-size 32"
CASES = {
    "embedded default": "--device cpu --pretrain.steps 200 --ppo.steps 3",
    "large vocabulary": f"{SHORT} --pretrain.steps 0 --model.path MODEL --sampling.max-new-tokens 48 "
    "--ppo.minibatch-size 8 --ppo.micro-batch-size 8 --log.evaluation-prompts 32",
    "long responses": f"{SHORT} --model.layers 4 --model.hidden-size 128 --model.context 416 "
    "--sampling.max-new-tokens 384 --log.evaluation-prompts 0",
    "shared value": f"{SHORT} {WIDE} --model.architecture gpt2 --model.value shared --log.evaluation-prompts 0",
    "bfloat16 without value": f"{SHORT} {WIDE} --ppo.algorithm grpo --dtype bfloat16 --log.evaluation-prompts 0",
    "small micro-batches": f"{SHORT} {WIDE} --ppo.micro-batch-size 4 --log.evaluation-prompts 0",
}


@dataclass(frozen=True)
class Peaks:
    """The largest memory of a run in bytes: up to its last step, as timings.jsonl has it, and to its end."""

    training: int
    whole: int


def predicted(case: str, folder: Path) -> Peaks:
    """Return what `rlhf train --explain-memory` says of a case."""
    out = _python(COMMAND, "train", "--explain-memory", "--runs", str(folder), *_options(case, folder))
    whole = _mib(r"^peak: ([\d,]+) MiB", out)
    return Peaks(_mib(r"^up to the last step.*: ([\d,]+) MiB", out) or whole, whole)


def measured(case: str, folder: Path) -> Peaks:
    """Run a case, and return what it took."""
    out = _python(MEASURED, "train", "--runs", str(folder), "--name", "run", *_options(case, folder))
    rows = (folder / "run" / "timings.jsonl").read_text(encoding="utf-8").splitlines()
    return Peaks(json.loads(rows[-1])["peak_mem_bytes"], int(out.rpartition("largest resident set:")[2]))


def _options(case: str, folder: Path) -> list[str]:
    options = CASES[case]
    model = folder / "model"
    if "MODEL" in options and not model.exists():
        _python(MAKE_MODEL, str(model), str(Path(__file__).parent))
    return options.replace("MODEL", str(model)).split()


def _mib(pattern: str, text: str) -> int:
    found = re.search(pattern, text, re.MULTILINE)
    return int(found[1].replace(",", "")) * MIB if found else 0


def _python(program: str, *arguments: str) -> str:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    outcome = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if outcome.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{outcome.stdout[-2000:]}\n{outcome.stderr[-2000:]}")
    return outcome.stdout


def main() -> None:
    """Print prediction and measurement of the cases that are named, or of all."""
    for case in sys.argv[1:] or CASES:
        with tempfile.TemporaryDirectory() as name:
            before, after = predicted(case, Path(name)), measured(case, Path(name))
        for part in ("training", "whole"):
            guess, truth = getattr(before, part), getattr(after, part)
            print(
                f"{case:24} {part:9} {guess / MIB:7.0f} MiB, measured {truth / MIB:7.0f}: {guess / truth - 1:+.1%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
