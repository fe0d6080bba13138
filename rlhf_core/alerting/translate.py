"""What other trainers log, under this project's names: TRL, OpenRLHF, verl. Pure functions of a row.

What means the same as a metric of ours gets its name; the rest keeps its own. Text, lists and the like are left out.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from rlhf_core.runlog import LARGEST_STEP

Row = dict[str, float]


def _same(value: float) -> float:
    return value


def _square(value: float) -> float:
    return value * value


def _rest(value: float) -> float:
    return 1.0 - value


Names = Mapping[str, tuple[str, Callable[[float], float]]]

TRL: Names = {
    "objective/kl": ("kl", _same),
    "objective/scores": ("reward_mean", _same),
    "objective/rlhf_reward": ("score_mean", _same),
    "policy/approxkl_avg": ("approx_kl", _same),
    "policy/clipfrac_avg": ("clip_frac", _same),
    "policy/entropy_avg": ("entropy", _same),
    "loss/policy_avg": ("policy_loss", _same),
    "loss/value_avg": ("value_loss", _same),
    "kl": ("kl_k3", _same),
    "reward": ("reward_mean", _same),
    "reward_std": ("reward_var", _square),
    "frac_reward_zero_std": ("reward_zero_std_frac", _same),
    "completions/mean_length": ("response_length_mean", _same),
    "completions/clipped_ratio": ("eos_rate", _rest),
    "clip_ratio/region_mean": ("clip_frac", _same),
    "sampling/sampling_logp_difference/mean": ("rollout_logprob_diff_mean", _same),
    "learning_rate": ("lr", _same),
    "step_time": ("step_time_s", _same),
}
"""Names of TRL's PPOTrainer and GRPOTrainer, and what makes them ours."""

OPENRLHF: Names = {
    "kl": ("kl_per_token", _same),
    "reward": ("reward_mean", _same),
    "group_reward_std": ("reward_var", _square),
    "return": ("return_mean", _same),
    "values": ("value_mean", _same),
    "critic_loss": ("value_loss", _same),
    "response_length": ("response_length_mean", _same),
    "truncated": ("eos_rate", _rest),
    "response_clip_ratio": ("eos_rate", _rest),
    "ppo_clip_ratio": ("clip_frac", _same),
    "ppo_kl": ("approx_kl", _same),
    "entropy_loss": ("entropy", _same),
    "actor_grad_norm": ("grad_norm", _same),
    "actor_lr": ("lr", _same),
    "timing/step_total": ("step_time_s", _same),
}

VERL: Names = {
    "actor/pg_loss": ("policy_loss", _same),
    "actor/entropy": ("entropy", _same),
    "actor/entropy_loss": ("entropy", _same),
    "actor/kl_loss": ("kl_k3", _same),
    "actor/reward_kl_penalty": ("kl_per_token", _same),
    "actor/reward_kl_penalty_coeff": ("kl_coef", _same),
    "actor/pg_clipfrac": ("clip_frac", _same),
    "actor/ppo_kl": ("approx_kl", _same),
    "actor/grad_norm": ("grad_norm", _same),
    "actor/lr": ("lr", _same),
    "critic/score/mean": ("reward_mean", _same),
    "critic/rewards/mean": ("score_mean", _same),
    "critic/vf_loss": ("value_loss", _same),
    "critic/vf_explained_var": ("explained_variance", _same),
    "critic/values/mean": ("value_mean", _same),
    "critic/returns/mean": ("return_mean", _same),
    "response_length/mean": ("response_length_mean", _same),
    "response_length/clip_ratio": ("eos_rate", _rest),
    "perf/throughput": ("tokens_per_second", _same),
    "perf/time_per_step": ("step_time_s", _same),
    "timing_s/step": ("step_time_s", _same),
}

STEP_NAMES = ("step", "global_step", "training/global_step", "_step")

_OF_ONE_REWARD_FUNCTION = re.compile(r"(eval_)?rewards/.+/(mean|std)")
"""TRL's mean and standard deviation of the rewards of one of its functions."""


def trl_row(row: Mapping[str, Any]) -> Row:
    """Return a row of TRL's ``log_history``.

    A reward function that returns None for a completion does not apply to it, and TRL logs NaN as the mean and the
    standard deviation of a function that applied to none, or to one: the row then does not have them. NaN in any other
    metric is a value that was not finite.

    Raises:
        ValueError: a number or the step is none that a float can hold.
    """
    renamed = _renamed(row, TRL)
    kl, penalty = row.get("objective/kl"), row.get("objective/non_score_reward")
    if isinstance(kl, float) and isinstance(penalty, float) and abs(kl) > 1e-3:
        renamed["kl_coef"] = -penalty / kl  # as the trainer makes the penalty: the mean of −β Σ_t log-ratio
    return {
        name: value for name, value in renamed.items() if value == value or not _OF_ONE_REWARD_FUNCTION.fullmatch(name)
    }


def openrlhf_row(row: Mapping[str, Any]) -> Row:
    """Return a row of OpenRLHF.

    Raises:
        ValueError: a number or the step is none that a float can hold.
    """
    return _renamed(row, OPENRLHF)


def verl_row(row: Mapping[str, Any]) -> Row:
    """Return a row of verl.

    Raises:
        ValueError: a number or the step is none that a float can hold.
    """
    renamed = _renamed(row, VERL)
    for ours, theirs in (("reward_var", "critic/score"), ("adv_var", "critic/advantages")):
        if {f"{theirs}/max", f"{theirs}/min"} <= renamed.keys():
            # The most that a variance can be between two ends (Popoviciu), and 0 exactly where all are equal.
            renamed[ours] = ((renamed[f"{theirs}/max"] - renamed[f"{theirs}/min"]) / 2) ** 2
    if "perf/max_memory_allocated_gb" in renamed:
        renamed["peak_mem_bytes"] = renamed["perf/max_memory_allocated_gb"] * 2**30
    return renamed


def _renamed(row: Mapping[str, Any], names: Names) -> Row:
    """Return the numbers of a row under this project's names."""
    numbers = {
        name.removeprefix("train/"): float_of(name, value)
        for name, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    steps = [_step(name, numbers[name]) for name in STEP_NAMES if name in numbers]
    renamed = {name: value for name, value in numbers.items() if name not in names and name not in STEP_NAMES}
    for name, (ours, convert) in names.items():
        if name in numbers:
            renamed.setdefault(ours, convert(numbers[name]))
    return renamed | ({"step": steps[0]} if steps else {})


def _step(name: str, value: float) -> float:
    if not (value.is_integer() and abs(value) <= LARGEST_STEP):
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at most 2^53")
    return value


def float_of(name: str, value: float) -> float:
    """Return a number of a log as a float.

    Raises:
        ValueError: it is a whole number beyond the largest float.
    """
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is a number of {len(str(abs(value)))} digits; the largest float has 309") from None
