import json
import math
import re
import statistics

import numpy as np
import pytest

from rlhf_core.metrics import BY_NAME, METRICS, TIMINGS, log_row, markdown_table, rollout_metrics, rounded

DESIGN_NAMES = [
    "kl",
    "kl_k3",
    "kl_target_error",
    "entropy",
    "reward_mean",
    "reward_var",
    "grad_norm",
    "clip_frac",
    "adv_var",
    "policy_loss",
    "value_loss",
    "approx_kl",
    "ratio_max_dev_first",
    "explained_variance",
    "value_mean",
    "return_mean",
    "response_length_mean",
    "eos_rate",
    "kl_coef",
    "lr",
    "rollout_logprob_diff_max",
    "rollout_logprob_diff_p99",
]


def random_arrays(seed=0, batch=6, length=5):
    rng = np.random.default_rng(seed)
    per_token = ("logprobs", "ref_logprobs", "sampler_logprobs", "entropies", "values", "advantages", "returns")
    lengths = rng.integers(1, length + 1, batch)
    return {
        "rewards": rng.normal(size=batch).astype(np.float32),
        "scores": rng.normal(size=batch).astype(np.float32),
        "ended": rng.random(batch) < 0.5,
        "mask": np.arange(length) < lengths[:, None],
    } | {name: rng.normal(size=(batch, length)).astype(np.float32) for name in per_token}


def test_the_metrics_of_a_rollout_are_the_hand_worked_numbers():
    got = rollout_metrics(
        rewards=np.array([1.0, 3.0]),
        scores=np.array([1.0, 2.5]),
        ended=np.array([True, False]),
        mask=np.array([[True, False], [True, True]]),
        logprobs=np.array([[-1.0, 9.0], [-2.0, -1.0]]),
        ref_logprobs=np.array([[-1.5, -9.0], [-1.0, -3.0]]),
        sampler_logprobs=np.array([[-1.25, 0.0], [-2.0, -1.0]]),
        entropies=np.array([[0.5, 9.0], [1.0, 1.5]]),
        values=np.array([[1.0, 9.0], [2.0, 3.0]]),
        advantages=np.array([[1.0, 9.0], [0.0, -1.0]]),
        returns=np.array([[2.0, 9.0], [2.0, 5.0]]),
        kl_coef=0.05,
        kl_target=2.0,
    )
    expected = {
        "kl": 0.75,  # (0.5 − 1 + 2) / 2 sequences
        "kl_k3": (math.exp(-0.5) + math.exp(1.0) + math.exp(-2.0) - 3 + 1.5) / 3,
        "kl_target_error": 1.25,
        "kl_coef": 0.05,
        "entropy": 1.0,
        "reward_mean": 2.0,
        "reward_var": 2.0,  # (1 + 1) / (2 − 1)
        "score_mean": 1.75,
        "adv_var": 2 / 3,
        "explained_variance": 1 - (2 / 3) / 2.0,  # errors 1, 0, 2 about 1; returns 2, 2, 5 about 3
        "value_mean": 2.0,
        "return_mean": 3.0,
        "response_length_mean": 1.5,
        "response_tokens": 3,
        "eos_rate": 0.5,
        "rollout_logprob_diff_max": 0.25,
        "rollout_logprob_diff_p99": 0.245,  # of 0, 0, 0.25: rank 0.99 · 2 = 1.98 lies 0.98 of the way to the last
        "sampling_z": 1 / math.sqrt(1.5),  # surprises 1, 2, 1 less entropies 0.5, 1, 1.5
        "reward_length_corr": 1.0,
    }
    assert got == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_the_metrics_agree_with_loops_over_plain_numbers(seed):
    arrays = random_arrays(seed)
    got = rollout_metrics(**arrays, kl_coef=0.1, kl_target=1.5)
    places = [(b, t) for b in range(6) for t in range(5) if arrays["mask"][b, t]]

    def inside(name):
        return [float(arrays[name][place]) for place in places]

    difference = [p - q for p, q in zip(inside("logprobs"), inside("ref_logprobs"), strict=True)]
    error = [g - v for g, v in zip(inside("returns"), inside("values"), strict=True)]
    sampler = sorted(abs(p - q) for p, q in zip(inside("sampler_logprobs"), inside("logprobs"), strict=True))
    rank = 0.99 * (len(sampler) - 1)
    low = math.floor(rank)
    kl = math.fsum(difference) / 6
    surprise = [-p - h for p, h in zip(inside("logprobs"), inside("entropies"), strict=True)]
    lengths = [int(row.sum()) for row in arrays["mask"]]
    expected = {
        "kl": kl,
        "kl_k3": statistics.fmean(math.exp(-x) - 1 + x for x in difference),
        "kl_target_error": abs(kl - 1.5),
        "kl_coef": 0.1,
        "entropy": statistics.fmean(inside("entropies")),
        "reward_mean": statistics.fmean(arrays["rewards"].tolist()),
        "reward_var": statistics.variance(arrays["rewards"].tolist()),
        "score_mean": statistics.fmean(arrays["scores"].tolist()),
        "adv_var": statistics.pvariance(inside("advantages")),
        "explained_variance": 1 - statistics.pvariance(error) / statistics.pvariance(inside("returns")),
        "value_mean": statistics.fmean(inside("values")),
        "return_mean": statistics.fmean(inside("returns")),
        "response_length_mean": len(places) / 6,
        "response_tokens": len(places),
        "eos_rate": sum(arrays["ended"].tolist()) / 6,
        "rollout_logprob_diff_max": sampler[-1],
        "rollout_logprob_diff_p99": sampler[low] + (rank - low) * (sampler[low + 1] - sampler[low]),
        "sampling_z": math.fsum(surprise) / math.hypot(*surprise),
        "reward_length_corr": statistics.correlation(arrays["rewards"].tolist(), lengths),
    }
    assert got == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("garbage", [math.nan, 1e30, -math.inf])
def test_what_lies_outside_the_mask_changes_no_bit_of_any_metric(garbage):
    arrays = random_arrays(7)
    clean = rollout_metrics(**arrays, kl_coef=0.1, kl_target=1.5)
    for name, array in arrays.items():
        if array.ndim == 2 and name != "mask":
            array[~arrays["mask"]] = garbage
    assert rollout_metrics(**arrays, kl_coef=0.1, kl_target=1.5) == clean


def test_a_single_sequence_has_no_variance_of_rewards_and_equal_returns_explain_nothing():
    arrays = random_arrays(1, batch=1)
    arrays["returns"][:] = 0.5
    got = rollout_metrics(**arrays, kl_coef=0.1, kl_target=1.5)
    assert got["reward_var"] == 0.0
    assert got["explained_variance"] == 0.0
    assert got["reward_length_corr"] == 0.0


def test_without_a_value_model_its_metrics_are_left_out():
    arrays = random_arrays(2)
    whole = rollout_metrics(**arrays, kl_coef=0.1, kl_target=1.5)
    without = rollout_metrics(**(arrays | {"values": None, "returns": None}), kl_coef=0.1, kl_target=1.5)
    assert whole.keys() - without.keys() == {"explained_variance", "value_mean", "return_mean"}
    assert without.items() <= whole.items()


def test_a_group_is_flat_when_all_of_its_scores_are_equal():
    arrays = random_arrays(3)
    arrays["scores"] = np.array([0.5, 0.5, 1.0, 2.0, -1.0, -1.0])
    assert rollout_metrics(**arrays, kl_coef=0.1, kl_target=1.5, group_size=2)["reward_zero_std_frac"] == pytest.approx(
        2 / 3
    )
    assert rollout_metrics(**arrays, kl_coef=0.1, kl_target=1.5, group_size=3)["reward_zero_std_frac"] == 0.0
    assert "reward_zero_std_frac" not in rollout_metrics(**arrays, kl_coef=0.1, kl_target=1.5)


def test_a_row_has_all_or_none_of_the_metrics_that_only_some_runs_log():
    always = {metric.name: 0.0 for metric in METRICS if metric.logged == "always"}
    values = {metric.name: 0.0 for metric in METRICS if metric.logged == "with values"}
    groups = {metric.name: 0.0 for metric in METRICS if metric.logged == "with groups"}
    assert values.keys() == {"value_loss", "explained_variance", "value_mean", "return_mean"}
    for wanted in (always, always | values, always | groups, always | values | groups):
        assert log_row(1, wanted).keys() == wanted.keys() | {"step", "nonfinite"}
    with pytest.raises(KeyError, match="value_loss"):
        log_row(1, {name: 0.0 for name in always | values if name != "value_loss"})


def test_a_row_of_the_log_rounds_to_eight_decimals_and_names_what_is_not_finite():
    values = dict.fromkeys(BY_NAME, 0.1234567891) | {"kl": math.nan, "entropy": -math.inf, "response_tokens": 12}
    row = log_row(4, values | {"lr": 1e-3, "kl_k3": -1e-12})
    assert row["step"] == 4
    assert row["nonfinite"] == ["entropy", "kl"]
    assert row["kl"] is None
    assert row["entropy"] is None
    assert row["reward_mean"] == 0.12345679
    assert row["response_tokens"] == 12
    assert isinstance(row["response_tokens"], int)
    assert str(row["kl_k3"]) == "0.0"  # not -0.0
    assert row.keys() == BY_NAME.keys() | {"step", "nonfinite"}
    assert json.loads(json.dumps(row, allow_nan=False)) == row


def test_numpy_numbers_are_written_like_pythons():
    assert json.dumps(rounded(np.float32(0.1))) == "0.1"
    assert json.dumps(rounded(np.float64(2.0))) == "2.0"


@pytest.mark.parametrize("change", [lambda values: values.pop("kl"), lambda values: values.update(kl_divergence=1.0)])
def test_a_missing_or_unknown_metric_is_named(change):
    values = dict.fromkeys(BY_NAME, 0.0)
    change(values)
    with pytest.raises(KeyError, match="kl"):
        log_row(1, values)


def test_the_table_has_every_metric_of_the_design_once_with_a_unit_and_a_definition():
    names = [metric.name for metric in (*METRICS, *TIMINGS)]
    assert len(set(names)) == len(names)
    assert set(names) >= {*DESIGN_NAMES, "tokens_per_second", "step_time_s", "peak_mem_bytes"}
    for metric in (*METRICS, *TIMINGS):
        assert metric.unit
        assert metric.definition
        low, high = metric.healthy
        assert low is None or high is None or low <= high
        [line] = [line for line in markdown_table().splitlines() if line.startswith(f"| `{metric.name}` |")]
        name, unit, definition = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
        assert (name, unit) == (f"`{metric.name}`", metric.unit)
        assert definition.replace(r"\|", "|").startswith(metric.definition)
