"""Run folders for the dashboard's tests: made by plain code, as a trainer would write them."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_core.metrics import DPO_METRICS, EVAL_METRICS, METRICS, REWARD_METRICS, SFT_METRICS, Metric

HOSTILE = (
    "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>",
    "![pixel](http://evil.invalid/pixel.png) [link](javascript:alert(1)) $\\alpha$ :red[red]",
    "\x1b[2J\x1b]0;owned\x07\x1b[31mred\u202etxt.exe\u0000",
    "</code></pre><iframe src='http://evil.invalid/'></iframe>",
)


def metrics_row(step: int, **values: float | None) -> dict[str, Any]:
    """A healthy row: every metric of the table, inside its range, varying a little."""
    noise = 0.02 * math.sin(12.9898 * step)
    row: dict[str, Any] = {metric.name: 0.5 + noise for metric in METRICS}
    row |= {
        "kl": 1.0 + 0.01 * min(step, 100) + noise,
        "kl_coef": 0.1,
        "kl_k3": 0.1 + noise / 10,
        "approx_kl": 0.01 + noise / 10,
        "clip_frac": 0.1 + noise,
        "entropy": 2.0 + noise,
        "reward_mean": math.tanh(step / 50) + noise,
        "grad_norm": 1.0 + noise,
        "grad_norm_max": 1.5 + noise,
        "lr": 1e-4,
        "response_tokens": 400,
        "response_length_mean": 12.0 + noise,
        "eos_rate": 0.9,
    }
    exact = ("ratio_max_dev_first", "target_error", "first_gradient_error", "tokens_after_eos", "sampling_z")
    row |= {name: 0.0 for name in row if name in exact or name.startswith("rollout_logprob_diff")}
    row |= values
    bad = sorted(name for name, value in row.items() if value is None)
    return {name: round(value, 8) if isinstance(value, float) else value for name, value in row.items()} | {
        "step": step,
        "nonfinite": bad,
    }


def timing_row(step: int, seconds: float = 0.5) -> dict[str, Any]:
    stages = {"rollout": 0.4 * seconds, "update": 0.6 * seconds, "update/optimizer": 0.1 * seconds}
    return {
        "step": step,
        "step_time_s": seconds,
        "stages_s": stages,
        "tokens_per_second": 400 / seconds,
        "peak_mem_bytes": 5 * 10**8,
    }


def sample_row(step: int, sample: int = 0, completion: str = "a good film .", **values: Any) -> dict[str, Any]:
    tokens = completion.split(" ")[:50]
    return {
        "step": step,
        "sample": sample,
        "prompt": "the film is",
        "completion": completion,
        "token_ids": list(range(len(tokens))),
        "tokens": tokens,
        "logprobs": [-0.5] * len(tokens),
        "ref_logprobs": [-1.0 - 0.1 * place for place in range(len(tokens))],
        "reward": 0.1 * sample,
        "kl": 2.0 - 0.1 * sample,
    } | values


def lines(rows: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows).encode()


def append(path: Path, *rows: dict[str, Any]) -> None:
    with path.open("ab") as file:
        file.write(lines(rows))


def make_run(runs: Path, name: str, steps: int, *, planned: int | None = None, **config: Any) -> Path:
    """A run of healthy steps with timings and two completions each; it has ended unless ``planned`` says more."""
    run = runs / name
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"ppo": {"steps": planned or steps}, "seed": 0} | config))
    every = range(1, steps + 1)
    append(run / "metrics.jsonl", *(metrics_row(step) for step in every))
    append(run / "timings.jsonl", *(timing_row(step) for step in every))
    append(run / "samples.jsonl", *(sample_row(step, sample) for step in every for sample in range(2)))
    return run


STAGES: dict[str, tuple[dict[str, Any], tuple[Metric, ...]]] = {
    "sft": ({"training": {"steps": None, "epochs": 2, "batch_size": 32}}, SFT_METRICS),
    "reward": ({"training": {"steps": 9}, "preference": {"centering": 0.01}}, REWARD_METRICS),
    "dpo": ({"training": {"steps": 9}, "dpo": {"beta": 0.1}}, DPO_METRICS),
    "eval": ({"judging": {"prompts": 128, "best_of": 2, "batch_size": 64}}, EVAL_METRICS),
}
"""What the configuration of a command has, and a row of its log."""


def make_stage_run(runs: Path, kind: str, steps: int, name: str | None = None) -> Path:
    """A run of another command than ``rlhf train`` that is not over: 120 rows of data, of which 20 are held out."""
    config, table = STAGES[kind]
    run = runs / (name or kind)
    (run / "data").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"seed": 0, "reward": []} | config))
    (run / "data" / "report.json").write_text(json.dumps({"rows": 130, "used": 120, "held_out": 20}))
    values = {metric.name: -0.5 if metric.name.startswith("logprob") else 0.75 for metric in table}
    append(run / "metrics.jsonl", *(values | {"step": step, "nonfinite": []} for step in range(1, steps + 1)))
    if kind == "eval":
        rows = [sample_row(step, sample) for step in range(1, steps + 1) for sample in range(2)]
        kept = [{key: row[key] for key in row if key not in ("tokens", "logprobs", "ref_logprobs")} for row in rows]
        append(run / "samples.jsonl", *kept)
    else:
        append(run / "timings.jsonl", *(timing_row(step) for step in range(1, steps + 1)))
    return run


def finish(run: Path) -> None:
    """Leave what a stage, or an evaluation, leaves at its end."""
    (run / "evaluation.json").write_text("{}")
    if "judging" not in json.loads((run / "config.json").read_text()):
        (run / "model").mkdir()
        (run / "model" / "config.json").write_text("{}")


def make_long_log(run: Path, steps: int) -> None:
    """Metrics and timings of very many steps, written a block of a thousand rows at a time; one spike at a third."""
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"ppo": {"steps": steps + 1000}}))
    template, timing = metrics_row(1), timing_row(1)
    drawn = [name for name, value in template.items() if isinstance(value, float) and value]
    rng = np.random.default_rng(0)
    with (run / "metrics.jsonl").open("w") as metrics, (run / "timings.jsonl").open("w") as timings:
        for start in range(1, steps + 1, 1000):
            factors = rng.normal(1.0, 0.02, (1000, len(drawn))).round(6).tolist()
            for step, row in zip(range(start, min(start + 1000, steps + 1)), factors, strict=False):
                new = template | {name: template[name] * factor for name, factor in zip(drawn, row, strict=True)}
                new |= {"step": step, "reward_mean": -7.0 if step == steps // 3 else step / steps}
                metrics.write(json.dumps(new) + "\n")
                timings.write(json.dumps(timing | {"step": step}) + "\n")
