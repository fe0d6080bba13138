"""The PPO step on a fixed workload: tokens a second, seconds by stage, share of the matrix-product rate, memory.

    python verification/benchmarks/bench_ppo_step.py --model S --steps 8
    python verification/benchmarks/bench_ppo_step.py --model S --against-trl FOLDER

FOLDER holds TRL 1.12, the last release with a PPO trainer: `pip install --no-deps --target FOLDER trl==1.12.0`. The two
trainers then take turns, each in a process of its own, and the ratio of their medians is printed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import ppo_workload as workload  # noqa: E402 - a script: its folder is no package


def measure(model: str, steps: int, dtype: str, threads: int, micro_batch: int) -> dict[str, Any]:
    """Run the workload on this kit's trainer and return the figures."""
    from rlhf_core.numerics import apply_environment

    apply_environment("native", threads)
    import copy

    import torch
    from transformers import GPT2LMHeadModel

    from rlhf_core.config import PPOConfig, SamplingConfig, TrainConfig
    from rlhf_core.policy import ActorCritic, Reference
    from rlhf_core.ppo import ppo_step
    from rlhf_core.profiling import peak_memory_bytes
    from rlhf_core.seeding import set_all_seeds
    from rlhf_core.trainer_state import new_state

    torch.set_num_threads(threads)
    set_all_seeds(0)
    shape = workload.SHAPES[model]
    config = TrainConfig(
        threads=threads,
        dtype=dtype,
        sampling=SamplingConfig(max_new_tokens=workload.NEW_TOKENS),
        ppo=PPOConfig(
            steps=10_000, batch_size=workload.BATCH, minibatch_size=workload.MINIBATCH, micro_batch_size=micro_batch,
            epochs=workload.EPOCHS, learning_rate=workload.RATE, schedule="constant",
        ),
    )  # fmt: skip
    architecture = shape.configuration()
    architecture._attn_implementation = "eager"
    lm = GPT2LMHeadModel(architecture)
    state = new_state(ActorCritic(lm, "separate"), Reference(copy.deepcopy(lm)), config)
    prompts = workload.prompts()
    rows = []
    for number in range(steps + 1):
        half = number % 2 * workload.BATCH
        start = time.perf_counter()
        result = ppo_step(state, prompts[half : half + workload.BATCH], _even, config, eos_id=-1, pad_id=workload.PAD)
        result.clock.stop(workload.BATCH * workload.NEW_TOKENS)
        rows.append((time.perf_counter() - start, result.clock.stage_seconds()))
    rows = rows[1:]  # the first one makes what later ones find made
    seconds = statistics.median(total for total, _ in rows)
    stages = {name: statistics.median(found[name] for _, found in rows) for name in rows[0][1]}
    rate = product_rate(dtype)
    needed = workload.operations(shape)
    return {
        "trainer": "rlhf-systems-kit",
        "model": model,
        "dtype": dtype,
        "threads": threads,
        "seconds": seconds,
        "tokens_per_second": workload.BATCH * workload.NEW_TOKENS / seconds,
        "stages": stages,
        "operations": needed,
        "product_rate": rate,
        "share_of_product_rate": {name: needed[name] / stages[name] / rate for name in needed},
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _even(rollout: Any) -> Any:
    import torch

    return torch.linspace(-1.0, 1.0, len(rollout.ended_B))


def product_rate(dtype: str) -> float:
    """Return the operations a second of a square matrix product: the best of the products that torch has here."""
    import torch

    from rlhf_kernels.products import available, product

    size = 2048
    a, b = (torch.randn(size, size, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    candidates = [lambda: a @ b]
    if dtype == "bfloat16":
        a16, b16 = a.bfloat16(), b.bfloat16()
        candidates = [lambda: torch.nn.functional.linear(a16, b16)]
    elif available():
        candidates.append(lambda: product(a, b))
    best = float("inf")
    for candidate in candidates * 5:
        start = time.perf_counter()
        candidate()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def show(figures: dict[str, Any]) -> None:
    """Print figures as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"PPO step, model {figures['model']}, {figures['dtype']}, {figures['threads']} threads")
    for column in ("stage", "seconds", "GFLOP that must be done", "share of the product rate"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for name, seconds in figures["stages"].items():
        share = figures["share_of_product_rate"].get(name)
        needed = figures["operations"].get(name)
        table.add_row(
            name,
            f"{seconds:.4f}",
            "" if needed is None else f"{needed / 1e9:.1f}",
            "" if share is None else f"{share:.0%}",
        )
    console = Console()
    console.print(table)
    console.print(
        f"{figures['seconds']:.3f} s a step, {figures['tokens_per_second']:.0f} completion tokens/s, "
        f"product rate {figures['product_rate'] / 1e9:.0f} GFLOP/s, "
        f"peak memory {figures['peak_memory_bytes'] / 2**20:.0f} MiB"
    )


def in_turns(arguments: argparse.Namespace) -> dict[str, Any]:
    """Let both trainers run in turns, and return the medians of their medians."""
    common = ["--model", arguments.model, "--steps", str(arguments.steps), "--threads", str(arguments.threads)]
    ours = [sys.executable, __file__, *common, "--dtype", arguments.dtype, "--json"]
    theirs = [sys.executable, str(HERE / "peer_trl_ppo.py"), *common, "--trl", str(arguments.against_trl)]
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
    for _ in range(arguments.rounds):
        for name, command in (("ours", ours), ("trl", theirs)):
            outcome = subprocess.run(command, capture_output=True, text=True, check=False)
            if outcome.returncode:
                sys.exit(f"{' '.join(command)} failed:\n{outcome.stderr[-2000:]}")
            found[name].append(json.loads(outcome.stdout.splitlines()[-1]))
    ours_s = statistics.median(one["seconds"] for one in found["ours"])
    trl_s = statistics.median(one["seconds"] for one in found["trl"])
    trl_without_gc_s = statistics.median(one["seconds_without_gc"] for one in found["trl"])
    return {
        "ratio": trl_s / ours_s,
        "ratio_without_gc": trl_without_gc_s / ours_s,
        "ours_seconds": ours_s,
        "trl_seconds": trl_s,
        "trl_seconds_without_gc": trl_without_gc_s,
        "peak_memory_bytes": {name: max(one["peak_memory_bytes"] for one in each) for name, each in found.items()},
        "rounds": found,
    }


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(workload.SHAPES), default="S")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--micro-batch", type=int, default=workload.MINIBATCH)
    parser.add_argument("--against-trl", type=Path, help="folder with TRL 1.12")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each trainer")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.against_trl:
        figures = in_turns(arguments)
        if not arguments.json:
            print(
                f"ours {figures['ours_seconds']:.3f} s a step; TRL 1.12 {figures['trl_seconds']:.3f} s, "
                f"{figures['trl_seconds_without_gc']:.3f} s without its gc.collect(): "
                f"{figures['ratio']:.2f} and {figures['ratio_without_gc']:.2f} times as fast"
            )
            return
    else:
        figures = measure(arguments.model, arguments.steps, arguments.dtype, arguments.threads, arguments.micro_batch)
        if not arguments.json:
            show(figures)
            return
    print(json.dumps(figures, sort_keys=True))


if __name__ == "__main__":
    main()
