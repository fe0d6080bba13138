"""Columns of a made-up run that is healthy, for tests that spoil one thing in it."""

import numpy as np

from rlhf_core.alerting.thresholds import default_thresholds
from rlhf_core.alerts import check
from rlhf_core.metrics import METRICS, TIMINGS

THRESHOLDS = default_thresholds()

DATA = np.sin(np.arange(1000.0)) * 1000 % 7  # some numbers without order


def healthy(rows: int = 60, seed: int = 0) -> dict[str, np.ndarray]:
    """A run of PPO that learns a little: every metric and timing within its range, with noise."""
    rng = np.random.default_rng(seed)
    t = np.arange(rows) / 60

    def noisy(level, scale=0.05):
        return level * (1 + scale * rng.standard_normal(rows))

    columns = {
        "kl": noisy(4 * t / (1 + t)),
        "kl_k3": noisy(0.4 * t / (1 + t)),
        "kl_target_error": 2.0 + 0 * t,
        "kl_coef": 0.1 + 0 * t,
        "entropy": noisy(1.7 - 0.6 * t / (1 + t)),
        "reward_mean": 0.6 * t / (1 + t) + 0.1 * rng.standard_normal(rows),
        "reward_var": noisy(0.35 + 0 * t, 0.2),
        "score_mean": 0.6 * t / (1 + t) + 0.1 * rng.standard_normal(rows),
        "policy_loss": -0.02 + 0.005 * rng.standard_normal(rows),
        "value_loss": noisy(0.15 + 0 * t, 0.2),
        "approx_kl": noisy(0.01 + 0 * t, 0.3),
        "clip_frac": noisy(0.06 + 0 * t, 0.3),
        "ratio_max_dev_first": 0 * t,
        "grad_norm": noisy(1.0 + 0 * t, 0.2),
        "grad_norm_max": noisy(2.0 + 0 * t, 0.3),
        "adv_var": noisy(0.3 + 0 * t, 0.2),
        "explained_variance": 0.3 * t / (1 + t) + 0.05 * rng.standard_normal(rows),
        "value_mean": 0.5 * t / (1 + t),
        "return_mean": 0.5 * t / (1 + t) + 0.1 * rng.standard_normal(rows),
        "response_length_mean": noisy(8.0 + 0 * t),
        "response_tokens": np.round(noisy(512 + 0 * t)),
        "eos_rate": np.clip(noisy(0.97 + 0 * t, 0.02), 0, 1),
        "lr": 3e-4 * (1 - t / (1 + t)),
        "rollout_logprob_diff_max": noisy(2e-6 + 0 * t, 0.2),
        "rollout_logprob_diff_p99": noisy(1e-6 + 0 * t, 0.1),
        "sampling_z": rng.standard_normal(rows),
        "tokens_after_eos": 0 * t,
        "reward_length_corr": 0.2 * rng.standard_normal(rows),
        "target_error": noisy(1e-7 + 0 * t),
        "first_gradient_error": noisy(1e-7 + 0 * t),
        "value_gradient_share": noisy(0.1 + 0 * t),
        "step_time_s": noisy(0.5 + 0 * t),
        "tokens_per_second": noisy(1000 + 0 * t),
        "peak_mem_bytes": 1e9 + 1e6 * np.arange(rows),
    }
    columns |= controlled(columns["kl"])
    assert columns.keys() == {metric.name for metric in (*METRICS, *TIMINGS)} - {"reward_zero_std_frac"}
    return {"step": np.arange(1, rows + 1)} | columns


def controlled(kl: np.ndarray, target: float = 6.0, sign: int = 1) -> dict[str, np.ndarray]:
    """What an adaptive controller of 64 sequences a step makes of a KL; −1 turns it round."""
    changes = 1 + sign * np.clip(kl / target - 1, -0.2, 0.2) * 64 / 10_000
    return {"kl_target_error": np.abs(kl - target), "kl_coef": 0.1 * np.cumprod([1.0, *changes[:-1]])}


def spoiled(rows: int = 60, seed: int = 0, since: int = 30, **values: float | np.ndarray) -> dict[str, np.ndarray]:
    """The healthy run with metrics replaced from row ``since`` on."""
    columns = healthy(rows, seed)
    for name, value in values.items():
        columns[name] = columns[name].astype(np.float64)
        columns[name][since:] = value if np.isscalar(value) else value[: rows - since]
    return columns


def found(columns, **options):
    return {alert.name: alert for alert in check(columns, THRESHOLDS, **options)}


def names_above_info(columns):
    return {alert.name for alert in check(columns, THRESHOLDS) if alert.severity != "info"}


RISING = np.linspace(1.3, 5.0, 40)

SPOILED = {
    "nonfinite": {"policy_loss": np.nan},
    "ratio_off_one": {"ratio_max_dev_first": 0.01},
    "gradient_off_closed_form": {"first_gradient_error": 0.3},
    "targets_off_definition": {"target_error": 0.02},
    "sampler_trainer_mismatch": {"rollout_logprob_diff_p99": 0.2},
    "not_drawn_from_policy": {"sampling_z": 4.0},
    "tokens_after_end": {"tokens_after_eos": 3.0},
    "kl_controller_off": {"kl_coef": 0.1 * 1.001 ** np.arange(30)},
    "kl_blow_up": {"kl": 40.0},
    "kl_jump": {"kl": 60.0},
    "kl_collapse": {"kl": 0.0},
    "kl_negative": {"kl": -1.0},
    "kl_coef_zero": {"kl_coef": 0.0},
    "step_too_large": {"approx_kl": 0.8},
    "clip_frac_high": {"clip_frac": 0.6},
    "clip_frac_zero": {"clip_frac": 0.0},
    "policy_frozen": {"approx_kl": 0.0},
    "lr_zero": {"lr": 0.0},
    "grad_norm_spike": {"grad_norm": 30.0},
    "no_gradient": {"grad_norm": 0.0},
    "entropy_collapse": {"entropy": 0.2},
    "entropy_blow_up": {"entropy": 6.0},
    "value_loss_jump": {"value_loss": 5.0},
    "value_dominates": {"value_gradient_share": 0.999},
    "reward_variance_gone": {"reward_var": 0.0},
    "advantages_gone": {"adv_var": 0.0},
    "reward_falling": {"reward_mean": -1.0 + 0.1 * DATA / 7},
    "reward_pays_for_length": {"reward_length_corr": 0.9},
    "reward_hacking_length": {"reward_mean": RISING, "response_length_mean": 8 * RISING},
    "reward_hacking_kl": {"reward_mean": RISING, "kl": 25.0},
    "value_explains_nothing": {"explained_variance": -1.0},
    "value_biased": {"return_mean": 5.0},
    "all_truncated": {"eos_rate": 0.0},
    "length_collapse": {"response_length_mean": 1.0},
    "throughput_drop": {"tokens_per_second": 100.0},
    "memory_growth": {"peak_mem_bytes": 3e9},
}


def standing(columns, severity):
    return {name for name, alert in found(columns).items() if alert.severity == severity and alert.standing}


def write(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines))
    return path
