"""``rlhf eval``: a policy on prompts, completion by completion, so that a killed evaluation continues.

``samples.jsonl`` has a row for each completion, and everything that is reported is computed from those rows.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_core import runlog
from rlhf_core.data.dataset import build_store, open_rows
from rlhf_core.data.tokenization import check_vocabulary, load_tokenizer
from rlhf_core.evaluation import bootstrap_mean, distinct_bigrams, draw_and_score
from rlhf_core.metrics import EVAL_METRICS, rounded, stage_row
from rlhf_core.policy import Reference, context_length, load_model
from rlhf_core.reward import WeightedRewards, decode
from rlhf_core.reward_sources import LoadedReward, load_rewards, weighted
from rlhf_core.run_setup import DATA_FOLDER, DataPlace, begin_run, choose_device
from rlhf_core.seeding import CounterUniforms
from rlhf_core.stage_config import EvalConfig
from rlhf_core.stages import write_evaluation
from rlhf_core.stopping import StopRequest, by_signal
from rlhf_core.tasks import cut_prompt
from rlhf_core.terminal import console, progress_bar


@dataclass(frozen=True)
class JudgingInputs:
    """What an evaluation starts from."""

    policy: PreTrainedModel
    reference: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase
    rewards: list[LoadedReward]


def load_judging(config: EvalConfig, place: DataPlace) -> JudgingInputs:
    """Load policy, reference and rewards, and prepare the prompts unless the resumed run has them.

    Raises:
        FileNotFoundError, ValueError: one of them is missing or cannot be used.
    """
    choose_device(config)
    if not config.model.path:
        raise ValueError("--model.path is missing; give the policy to judge: a run, a model's folder or a hub name")
    if config.data is None:
        raise ValueError("--data is missing; give a file of prompts, a folder of such, or hub:NAME")
    if config.judging.best_of > 1 and not config.reward:
        raise ValueError(f"judging.best_of is {config.judging.best_of}, and nothing says which is best; give --reward")
    rewards = load_rewards(config, config.model.attention)
    policy = load_model(config.model.path, config.model.attention)
    tokenizer = load_tokenizer(config.model.path)
    vocabulary = policy.config.get_text_config().vocab_size
    check_vocabulary(tokenizer, vocabulary)
    reference = load_model(config.reference, config.model.attention) if config.reference else None
    if reference is not None and reference.config.get_text_config().vocab_size != vocabulary:
        raise ValueError(f"--reference {config.reference!r} has another vocabulary than the policy, so there is no KL")
    longest = (context_length(policy) or 2**20) - config.sampling.max_new_tokens
    if longest < 1:
        raise ValueError(f"sampling.max_new_tokens is {config.sampling.max_new_tokens}; the context leaves no prompt")
    if place.kept is None:
        place.prepare(
            lambda folder: build_store(
                str(config.data),
                "prompt",
                folder,
                tokenizer=tokenizer,
                longest=longest,
                errors=config.data_errors,
                held_out_share=config.held_out,
                cut_prompt=lambda text, row: cut_prompt(text, config.seed, row),
            )
        )
    return JudgingInputs(policy, reference, tokenizer, rewards)


def run_judging(config: EvalConfig, inputs: JudgingInputs, run: Path, *, resumed: bool) -> None:
    """Draw and judge completions in the run's folder, write ``evaluation.json`` and print it.

    Raises:
        Stopped: a signal arrived; the completions so far are kept.
        ValueError, OSError: what went wrong, in one line.
    """
    device = begin_run(config, run, resumed=resumed)
    for model in (inputs.policy, inputs.reference):
        if model is not None:
            torch.nn.Module.to(model.requires_grad_(False), device)
    rewards = weighted(inputs.rewards, inputs.tokenizer, config.reward_timeout_s, device)
    prompts = chosen_prompts(run / DATA_FOLDER, config.judging.prompts)
    draws = [(row, draw) for row in range(len(prompts)) for draw in range(config.judging.best_of)]
    batches = _batched(draws, config.judging.batch_size)
    done = _batches_done(run)
    with StopRequest().listening() as stop, progress_bar("evaluation", len(batches), done=done) as bar:
        for number, batch in enumerate(batches[done:], start=done + 1):
            rows = judge_batch(config, inputs, rewards, prompts, batch, number)
            runlog.append(run / runlog.SAMPLES_FILE, rows)
            runlog.append(run / runlog.METRICS_FILE, [stage_row(number, batch_metrics(rows), EVAL_METRICS)])
            bar.advance(f"reward {np.mean([row['reward'] for row in rows]):+.3f}")
            if stop.signal_number is not None and number < len(batches):
                raise by_signal(stop.signal_number, f"stopped after batch {number} of {len(batches)}, kept")
    summary = judging_summary(
        list(runlog.read_samples(run)),
        {one.source.name: one.source.weight for one in inputs.rewards},
        config.judging.best_of,
        config.seed,
        with_kl=inputs.reference is not None,
    )
    write_evaluation(run, summary)
    print_judging(summary)
    console.print(f"run folder: {run}", soft_wrap=True, markup=False)


def _batched(draws: list[tuple[int, int]], size: int) -> list[list[tuple[int, int]]]:
    return [draws[start : start + size] for start in range(0, len(draws), size)]


def chosen_prompts(data: Path, most: int) -> list[list[int]]:
    """Return the first prompts, the held-out ones before the others; 0 takes all."""
    columns = (open_rows(data, "held_out").column("prompt"), open_rows(data, "train").column("prompt"))
    return list(itertools.islice(itertools.chain(*columns), most or None))


def _batches_done(run: Path) -> int:
    """Return how many batches both logs have whole, and cut the logs back to them.

    Raises:
        ValueError: a log has no row of a batch before its last.
    """
    counts = []
    for name in (runlog.METRICS_FILE, runlog.SAMPLES_FILE):
        runlog.keep_through_step(run / name, 2**62)  # a torn last line goes
        counts.append(_last_step(run / name) if (run / name).exists() else 0)
    # The row of metrics is written after the batch's completions, so it says that they are all there.
    done = min(counts)
    for name in (runlog.METRICS_FILE, runlog.SAMPLES_FILE):
        runlog.keep_through_step(run / name, done)
    return done


def _last_step(path: Path) -> int:
    last = 0
    for row in runlog.read(path):
        if row["step"] > last + 1:
            raise ValueError(
                f"{path} {runlog.no_rows_between(last, row['step'])}; put the missing rows back, or remove all rows "
                f"after step {last} from it to do those batches again"
            )
        last = max(last, row["step"])
    return last


@torch.no_grad()
def judge_batch(
    config: EvalConfig,
    inputs: JudgingInputs,
    rewards: WeightedRewards,
    prompts: Sequence[list[int]],
    batch: Sequence[tuple[int, int]],
    number: int,
) -> list[dict[str, Any]]:
    """Return the rows of a batch of (prompt, draw): a completion is a function of seed, prompt and draw alone."""
    tokenizer = inputs.tokenizer
    drawn = draw_and_score(
        inputs.policy,
        Reference(inputs.reference) if inputs.reference is not None else None,
        [prompts[row] for row, _ in batch],
        PairUniforms(config.seed, batch, config.sampling.max_new_tokens),
        config.sampling,
        dtype=config.dtype,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
    )
    rollout = drawn.rollout
    kl_B = drawn.log_ratios_BT.double().sum(dim=1).tolist()
    entropy_B = drawn.entropies_BT.double().sum(dim=1).tolist()
    total_B = rewards(rollout).tolist()
    responses = rollout.response_token_ids()
    return [
        {
            "step": number,
            "sample": place,
            "prompt_row": row,
            "draw": draw,
            "prompt": decode(tokenizer, [prompts[row]])[0],
            "completion": decode(tokenizer, [responses[place]])[0],
            "token_ids": responses[place],
            "ended": bool(rollout.ended_B[place]),
            "reward": rounded(total_B[place]),
            "rewards": {name: rounded(part_B[place].item()) for name, part_B in rewards.parts.items()},
            "kl": rounded(kl_B[place]),
            "entropy": rounded(entropy_B[place]),
        }
        for place, (row, draw) in enumerate(batch)
    ]


class PairUniforms:
    """Uniforms keyed by (seed, draw, prompt, position); draw 0 has those of the evaluation after ``rlhf train``."""

    def __init__(self, seed: int, batch: Sequence[tuple[int, int]], length: int) -> None:
        rows = [CounterUniforms(seed, "evaluation", draw, np.array([row]), length) for row, draw in batch]
        self._uniforms_BT = torch.stack([torch.cat([one.uniforms(at) for at in range(length)]) for one in rows])

    def uniforms(self, position: int) -> torch.Tensor:
        """Return [B] float64 uniforms for ``position``."""
        return self._uniforms_BT[:, position]


def batch_metrics(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the metrics of a batch's rows."""
    tokens = sum(len(row["token_ids"]) for row in rows)
    return {
        "completions": len(rows),
        "reward_mean": math.fsum(row["reward"] for row in rows) / len(rows),
        "kl": math.fsum(row["kl"] for row in rows) / len(rows),
        "entropy": math.fsum(row["entropy"] for row in rows) / tokens,
        "response_length_mean": tokens / len(rows),
        "eos_rate": sum(row["ended"] for row in rows) / len(rows),
    }


def best_of_n(judge: np.ndarray, score: np.ndarray, n: int) -> np.ndarray:
    """Return [P] the mean of ``judge`` over the best of n completions by ``score``, over all n-subsets of a prompt's N.

    With a prompt's completions in ascending order of the score, number i (from 1) is the best of an n-subset with
    probability C(i − 1, n − 1) / C(N, n) (Nakano et al., "WebGPT", 2021, appendix I): no subset is favoured.

    Args:
        judge: [P, N] what is averaged.
        score: [P, N] what chooses; equal scores keep their order.
        n: from 1 to N.
    """
    total = judge.shape[1]
    weights = np.array([math.comb(i - 1, n - 1) / math.comb(total, n) for i in range(1, total + 1)])
    order = np.argsort(score, axis=1, kind="stable")
    return np.take_along_axis(judge, order, axis=1) @ weights


def judging_summary(
    rows: list[dict[str, Any]], weights: dict[str, float], best_of: int, seed: int, *, with_kl: bool
) -> dict[str, Any]:
    """Return the evaluation as JSON. Intervals are over prompts: the completions of one prompt are averaged first."""
    rows = sorted(rows, key=lambda row: (row["prompt_row"], row["draw"]))

    def by_prompt(values: list[float]) -> np.ndarray:
        return np.array(values, dtype=np.float64).reshape(-1, best_of)

    def interval(values: np.ndarray) -> dict[str, float]:
        return {name: rounded(value) for name, value in asdict(bootstrap_mean(values, seed)).items()}

    score = by_prompt([row["reward"] for row in rows])
    judges = {name: by_prompt([row["rewards"][name] for row in rows]) for name in weights}
    if len(judges) > 1:
        judges = {"weighted sum": score, **judges}
    summary: dict[str, Any] = {
        "prompts": len(score),
        "completions": len(rows),
        "weights": weights,
        "rewards": {name: interval(values.mean(axis=1)) for name, values in judges.items()},
        "kl": interval(by_prompt([row["kl"] for row in rows]).mean(axis=1)) if with_kl else None,
        "entropy": rounded(math.fsum(row["entropy"] for row in rows) / sum(len(row["token_ids"]) for row in rows)),
        "response_length": interval(by_prompt([len(row["token_ids"]) for row in rows]).mean(axis=1)),
        "eos_rate": rounded(sum(row["ended"] for row in rows) / len(rows)),
        "distinct_bigrams": rounded(distinct_bigrams([row["token_ids"] for row in rows])),
        "distinct_completions": rounded(len({tuple(row["token_ids"]) for row in rows}) / len(rows)),
        "best_of": [],
    }
    sizes = [2**power for power in range(best_of.bit_length()) if 2**power <= best_of] if best_of > 1 else []
    for n in sorted({*sizes, best_of} if sizes else ()):
        means = {name: interval(best_of_n(values, score, n)) for name, values in judges.items()}
        summary["best_of"].append({"n": n, "kl_bound": rounded(math.log(n) - (n - 1) / n), "rewards": means})
    return summary


def print_judging(summary: dict[str, Any]) -> None:
    """Print the summary."""

    def shown(interval: dict[str, float]) -> str:
        return f"{interval['mean']:+.3f} [{interval['low']:+.3f}, {interval['high']:+.3f}]"

    title = f"{summary['prompts']} prompts, {summary['completions']} completions: mean, and its 95% interval"
    table = Table(title=title, box=box.SIMPLE, show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    for name, interval in summary["rewards"].items():
        table.add_row(name, shown(interval))
    if summary["kl"] is not None:
        table.add_row("KL to reference, nats", shown(summary["kl"]))
    table.add_row("response length, tokens", shown(summary["response_length"]))
    for key, text in (
        ("entropy", "entropy, nats/token"),
        ("eos_rate", "ended with EOS"),
        ("distinct_bigrams", "distinct bigrams"),
        ("distinct_completions", "distinct completions"),
    ):
        table.add_row(text, f"{summary[key]:.3f}")
    console.print(table)
    if summary["best_of"]:
        names = list(summary["rewards"])
        best = Table("best of", "KL at most, nats", *names, title="best of n by the reward", box=box.SIMPLE_HEAD)
        for one in summary["best_of"]:
            best.add_row(str(one["n"]), f"{one['kl_bound']:.3f}", *(shown(one["rewards"][name]) for name in names))
        console.print(best)
