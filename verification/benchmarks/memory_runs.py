"""Trainings whose memory is predicted and then measured, each in processes of its own.

    python verification/benchmarks/memory_runs.py

prints both for every case: what to look at after a change to `Costs` in `rlhf_core/memory_plan.py`.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
import json, sys
from transformers import AutoConfig, AutoModelForCausalLM
from rlhf_core.data import reviews
from rlhf_core.data.tokenization import word_tokenizer
tokenizer = word_tokenizer(reviews.VOCABULARY)
special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
shape = AutoConfig.for_model(**json.loads(sys.argv[2]), **special)
AutoModelForCausalLM.from_config(shape).save_pretrained(sys.argv[1])
tokenizer.save_pretrained(sys.argv[1])
"""


def _gpt2(layers: int, heads: int, width: int, vocabulary: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2", "n_layer": layers, "n_head": heads, "n_embd": width, "vocab_size": vocabulary,
        "n_positions": 512, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    }  # fmt: skip


def _llama(layers: int, heads: int, width: int, inner: int, vocabulary: int) -> dict[str, Any]:
    return {
        "model_type": "llama", "num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": width,
        "intermediate_size": inner, "vocab_size": vocabulary, "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Options of a training and the untrained model that it starts from, whose responses hardly ever end early."""

    options: str
    model: dict[str, Any] | None = None


SHORT = "--device cpu --ppo.steps 2 --ppo.epochs 1 --ppo.batch-size 32"
WIDE = f"{SHORT} --sampling.max-new-tokens 96 --log.evaluation-prompts 0"
CASES = {
    "embedded default": Case("--device cpu --pretrain.steps 200 --ppo.steps 3"),
    "large vocabulary": Case(
        f"{SHORT} --sampling.max-new-tokens 48 --ppo.minibatch-size 8 --ppo.micro-batch-size 8 "
        "--log.evaluation-prompts 32",
        _gpt2(6, 6, 384, 50257),
    ),
    "long responses": Case(
        f"{SHORT} --sampling.max-new-tokens 384 --log.evaluation-prompts 0", _llama(4, 4, 128, 352, 4096)
    ),
    "shared value": Case(f"{WIDE} --model.value shared", _gpt2(4, 8, 512, 4096)),
    "bfloat16 without value": Case(f"{WIDE} --ppo.algorithm grpo --dtype bfloat16", _llama(4, 8, 512, 1376, 4096)),
    "small micro-batches": Case(f"{WIDE} --ppo.micro-batch-size 4", _llama(4, 8, 512, 1376, 4096)),
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
    options, shape, model = CASES[case].options.split(), CASES[case].model, folder / "model"
    if shape is None:
        return options
    if not model.exists():
        _python(MAKE_MODEL, str(model), json.dumps(shape))
    return [*options, "--model.path", str(model)]


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
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"by default all: {', '.join(map(repr, CASES))}")
    cases = parser.parse_args().cases or list(CASES)
    if unknown := [case for case in cases if case not in CASES]:
        parser.error(f"there is no case {unknown[0]!r}; there are {', '.join(map(repr, CASES))}")
    for case in cases:
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
