"""The PPO step on a fixed workload: tokens a second, seconds by stage, share of the matrix-product rate, memory.

    python verification/benchmarks/bench_ppo_step.py --model S --steps 8
    python verification/benchmarks/bench_ppo_step.py --model S --against-trl FOLDER

FOLDER holds TRL 1.12, the last release with a PPO trainer: `pip install --no-deps --target FOLDER trl==1.12.0`. The two
trainers then take turns, each in a process of its own, and the ratio of their medians is printed.

    python verification/benchmarks/bench_ppo_step.py --model S --lengths 4-192
    python verification/benchmarks/bench_ppo_step.py --model S --rollout-only

set the trainer beside its own padded loop on responses of unequal length, and its sampling beside transformers'
`generate`, in turns in one process.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import ppo_workload as workload  # noqa: E402 - a script: its folder is no package

Step = Callable[[int], tuple[int, Any]]
"""Does the step of a number; returns how many completion tokens it made, and its clock."""


def measure(shape: workload.Shape, name: str, steps: int, dtype: str, threads: int, micro_batch: int) -> dict[str, Any]:
    """Run the workload on this kit's trainer and return the figures."""
    figures = time_steps(shape, steps, dtype, threads, micro_batch)
    seconds, stages = figures["seconds"], figures["stages"]
    rate = product_rate(dtype)
    needed = workload.operations(shape)
    return figures | {
        "trainer": "rlhf-systems-kit",
        "model": name,
        "dtype": dtype,
        "threads": threads,
        "tokens_per_second": workload.BATCH * workload.NEW_TOKENS / seconds,
        "operations": needed,
        "product_rate": rate,
        "share_of_product_rate": {stage: needed[stage] / stages[stage] / rate for stage in needed},
    }


def time_steps(
    shape: workload.Shape,
    steps: int,
    dtype: str = "float32",
    threads: int = 2,
    micro_batch: int = workload.MINIBATCH,
    batch: int = workload.BATCH,
    new_tokens: int = workload.NEW_TOKENS,
) -> dict[str, Any]:
    """Return the median seconds of a step and of its stages, and the largest memory of the process."""
    do_step = stepper(shape, dtype, threads, micro_batch, batch, new_tokens)
    from rlhf_core.profiling import peak_memory_bytes

    rows = []
    for number in range(steps + 1):
        start = time.perf_counter()
        tokens, clock = do_step(number)
        clock.stop(tokens)
        rows.append((time.perf_counter() - start, clock.stage_seconds()))
    rows = rows[1:]  # the first one makes what later ones find made
    return {
        "seconds": statistics.median(total for total, _ in rows),
        "stages": {stage: statistics.median(found[stage] for _, found in rows) for stage in rows[0][1]},
        "peak_memory_bytes": peak_memory_bytes(),
    }


def stepper(
    shape: workload.Shape,
    dtype: str,
    threads: int,
    micro_batch: int,
    batch: int = workload.BATCH,
    new_tokens: int = workload.NEW_TOKENS,
    eos: int = -1,
) -> Step:
    """Return what does one step after the other of a new trainer; token ``eos`` ends a response."""
    from rlhf_core.numerics import apply_environment

    apply_environment("native", threads)
    import copy

    from rlhf_core.garbage import loading_for_good

    with loading_for_good():  # as `rlhf train` does
        import torch
        from transformers import GPT2LMHeadModel

        from rlhf_core.config import PPOConfig, SamplingConfig, TrainConfig
        from rlhf_core.policy import ActorCritic, Reference
        from rlhf_core.ppo import ppo_step
        from rlhf_core.seeding import set_all_seeds
        from rlhf_core.trainer_state import new_state

    torch.set_num_threads(threads)
    set_all_seeds(0)
    config = TrainConfig(
        threads=threads,
        dtype=dtype,
        sampling=SamplingConfig(max_new_tokens=new_tokens),
        ppo=PPOConfig(
            steps=10_000, batch_size=batch, minibatch_size=workload.MINIBATCH, micro_batch_size=micro_batch,
            epochs=workload.EPOCHS, learning_rate=workload.RATE, schedule="constant",
        ),
    )  # fmt: skip
    architecture = shape.configuration(context=max(256, workload.PROMPT_TOKENS + new_tokens))
    architecture._attn_implementation = "eager"
    lm = GPT2LMHeadModel(architecture)
    state = new_state(ActorCritic(lm, "separate"), Reference(copy.deepcopy(lm)), config)
    prompts = workload.prompts(2 * batch)

    def do_step(number: int) -> tuple[int, Any]:
        half = number % 2 * batch
        result = ppo_step(state, prompts[half : half + batch], _even, config, eos_id=eos, pad_id=workload.PAD)
        return int(result.rollout.response_mask_BT.sum()), result.clock

    return do_step


def _even(rollout: Any) -> Any:
    import torch

    return torch.linspace(-1.0, 1.0, len(rollout.ended_B))


def unequal_lengths(
    model: str, steps: int, dtype: str, threads: int, micro_batch: int, shortest: int, longest: int
) -> dict[str, Any]:
    """Let the trainer and its padded loop do the same steps in turns, on responses of drawn lengths."""
    shape = workload.SHAPES[model]
    ended = 0  # the token that a uniform of 0 draws
    trainers = {
        name: stepper(shape, dtype, threads, micro_batch, new_tokens=longest, eos=ended) for name in ("ours", "padded")
    }
    paths = {"ours": nullcontext, "padded": padded_path}
    rows: dict[str, list[tuple[int, float]]] = {name: [] for name in trainers}
    with lengths_forced(shortest, longest):
        for number in range(steps + 1):
            for name, do_step in trainers.items():
                with paths[name]():
                    start = time.perf_counter()
                    tokens, _ = do_step(number)
                    rows[name].append((tokens, time.perf_counter() - start))
    rates = {name: statistics.median(tokens / seconds for tokens, seconds in each[1:]) for name, each in rows.items()}
    return {
        "model": model,
        "dtype": dtype,
        "threads": threads,
        "lengths": [shortest, longest],
        "mean_length": statistics.mean(tokens for tokens, _ in rows["ours"][1:]) / workload.BATCH,
        "tokens_per_second": rates,
        "ratio": rates["ours"] / rates["padded"],
    }


@contextmanager
def padded_path() -> Iterator[None]:
    """Let every model go through transformers' own forward pass over padded rows, as models of other kinds do."""
    from rlhf_core import decoding, scoring

    own = decoding.blocks_of, scoring.packable
    decoding.blocks_of = scoring.packable = lambda model: None
    try:
        yield
    finally:
        decoding.blocks_of, scoring.packable = own


@contextmanager
def lengths_forced(shortest: int, longest: int) -> Iterator[None]:
    """Make each response as long as a draw says, through the uniforms that decide its tokens.

    A uniform of 0 draws token 0, which ends the response. All others are moved to [0.1, 1), where a model that has
    hardly learned, and so gives token 0 less than a tenth, never draws it.
    """
    import numpy as np

    from rlhf_core import ppo
    from rlhf_core.seeding import CounterUniforms, raw_uniforms

    class Scripted(CounterUniforms):
        def __init__(self, seed: int, purpose: str, step: int, samples: np.ndarray, length: int) -> None:
            super().__init__(seed, purpose, step, samples, length)
            draws = raw_uniforms(seed, "lengths", step, 0, len(samples))
            lengths = shortest + (draws * (longest - shortest + 1)).astype(int)
            self._uniforms_BT = 0.1 + 0.9 * self._uniforms_BT
            self._uniforms_BT[np.arange(len(samples)), lengths - 1] = 0.0

    ppo.CounterUniforms = Scripted
    try:
        yield
    finally:
        ppo.CounterUniforms = CounterUniforms


def rollout_alone(model: str, rounds: int, dtype: str, threads: int) -> dict[str, Any]:
    """Sample the workload's completions with this kit and with transformers' `generate`, in turns."""
    from rlhf_core.numerics import apply_environment

    apply_environment("native", threads)
    import copy

    import numpy as np
    import torch
    from transformers import GPT2LMHeadModel

    from rlhf_core.config import SamplingConfig
    from rlhf_core.policy import as_computed_here, autocast
    from rlhf_core.rollout import sample
    from rlhf_core.seeding import CounterUniforms, set_all_seeds

    torch.set_num_threads(threads)
    set_all_seeds(0)
    architecture = workload.SHAPES[model].configuration()
    theirs = GPT2LMHeadModel(architecture).eval()
    own = copy.deepcopy(theirs)
    own.set_attn_implementation("eager")
    as_computed_here(own)
    prompts = workload.prompts()[: workload.BATCH]
    ids = torch.tensor(prompts)
    sampling = SamplingConfig(max_new_tokens=workload.NEW_TOKENS)

    def ours(number: int) -> int:
        uniforms = CounterUniforms(0, "rollout", number, np.arange(len(prompts)), workload.NEW_TOKENS)
        return int(sample(own, prompts, uniforms, sampling, eos_id=-1, pad_id=workload.PAD).response_mask_BT.sum())

    def generate(number: int) -> int:
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=workload.NEW_TOKENS,
            min_new_tokens=workload.NEW_TOKENS, eos_token_id=None, pad_token_id=workload.PAD,
        )  # fmt: skip
        return out[:, ids.shape[1] :].numel()

    rates: dict[str, list[float]] = {"ours": [], "generate": []}
    for number in range(rounds + 1):
        for name, draw in (("ours", ours), ("generate", generate)):
            start = time.perf_counter()
            with torch.no_grad(), autocast(ids.device, dtype):
                tokens = draw(number)
            rates[name].append(tokens / (time.perf_counter() - start))
    medians = {name: statistics.median(each[1:]) for name, each in rates.items()}
    return {
        "model": model,
        "dtype": dtype,
        "threads": threads,
        "tokens_per_second": medians,
        "ratio": medians["ours"] / medians["generate"],
    }


def product_rate(dtype: str) -> float:
    """Return the operations a second of a square matrix product: the best of those that there are for a dtype here."""
    import torch

    from rlhf_kernels.products import available, multiply, widens

    size = 2048
    a, b = (torch.randn(size, size, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    candidates = [lambda: a @ b]
    if dtype == "bfloat16" and not widens():
        a16, b16 = a.bfloat16(), b.bfloat16()
        candidates = [lambda: torch.nn.functional.linear(a16, b16)]
    elif available():
        candidates.append(lambda: multiply(a, b))
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
    own = ["--dtype", arguments.dtype, "--micro-batch", str(arguments.micro_batch)]
    ours = [sys.executable, __file__, *common, *own, "--json"]
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
    parser.add_argument("--micro-batch", type=int, default=workload.MINIBATCH, help="completions a forward pass")
    parser.add_argument("--against-trl", type=Path, help="folder with TRL 1.12")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each trainer")
    parser.add_argument("--lengths", type=_range, help="draw response lengths from LOW-HIGH; beside the padded loop")
    parser.add_argument("--rollout-only", action="store_true", help="sampling alone, beside transformers' generate")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    model, steps, dtype, threads = arguments.model, arguments.steps, arguments.dtype, arguments.threads
    text = ""
    if arguments.against_trl:
        figures = in_turns(arguments)
        text = (
            f"ours {figures['ours_seconds']:.3f} s a step; TRL 1.12 {figures['trl_seconds']:.3f} s, "
            f"{figures['trl_seconds_without_gc']:.3f} s without its gc.collect(): "
            f"{figures['ratio']:.2f} and {figures['ratio_without_gc']:.2f} times as fast"
        )
    elif arguments.lengths:
        figures = unequal_lengths(model, steps, dtype, threads, arguments.micro_batch, *arguments.lengths)
        rates = figures["tokens_per_second"]
        text = (
            f"responses of {figures['lengths'][0]} to {figures['lengths'][1]} tokens, {figures['mean_length']:.0f} on "
            f"average: ours {rates['ours']:.0f} completion tokens/s, padded {rates['padded']:.0f}: "
            f"{figures['ratio']:.2f} times as fast"
        )
    elif arguments.rollout_only:
        figures = rollout_alone(model, steps, dtype, threads)
        rates = figures["tokens_per_second"]
        text = (
            f"rollout alone: ours {rates['ours']:.0f} tokens/s, transformers' generate {rates['generate']:.0f}: "
            f"{figures['ratio']:.2f} times as fast"
        )
    else:
        figures = measure(workload.SHAPES[model], model, steps, dtype, threads, arguments.micro_batch)
    if arguments.json:
        print(json.dumps(figures, sort_keys=True))
    elif text:
        print(text)
    else:
        show(figures)


def _range(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    if not (low.isdigit() and high.isdigit() and 0 < int(low) <= int(high)):
        raise argparse.ArgumentTypeError(f"{text!r} is no range; write it as in 4-192")
    return int(low), int(high)


if __name__ == "__main__":
    main()
