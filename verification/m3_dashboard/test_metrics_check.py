"""``rlhf check-metrics`` on a real run, and on copies of it that were spoiled."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf_core.checks import metrics_check
from rlhf_core.checks.metrics_check import POSSIBLE, MetricsWrong, check_log
from rlhf_core.metrics import METRICS
from rlhf_core.testing.command import TINY_RUN, run_command

pytestmark = [pytest.mark.m3, pytest.mark.usefixtures("reviews_drawn_once")]


@pytest.fixture
def copied_run(finished_run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished_run, copy)
    return copy


def change(run, name, spoil):
    path = run / name
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    spoil(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def set_to(name, value, row=1):
    return lambda rows: rows[row].__setitem__(name, value)


def test_every_metric_of_the_table_has_what_is_possible():
    assert POSSIBLE.keys() == {metric.name for metric in METRICS}


def test_a_sound_run_passes_with_a_figure_in_every_line(finished_run):
    outcome = run_command("check-metrics", finished_run)
    assert outcome.code == 0, outcome.out
    lines = outcome.out.splitlines()
    assert [line.split()[1] for line in lines] == [
        "steps:", "names:", "ranges:", "relations:", "tokens_per_second:", "samples:", "again:", "again:",
    ]  # fmt: skip
    assert [line.split()[3] for line in lines[-2:]] == ["1:", "5:"]  # after the checkpoints of steps 0 and 4


def test_rollouts_are_kept_of_the_steps_whose_weights_are_kept(finished_run):
    assert sorted(path.name for path in (finished_run / "rollouts").iterdir()) == [
        "step_000001.safetensors",
        "step_000005.safetensors",
    ]


METRICS_SPOILED = {
    "missing": (lambda rows: rows[1].pop("clip_frac"), "step 2: clip_frac missing"),
    "one too many": (set_to("luck", 7.0), "step 2: luck not in the table"),
    "null": (set_to("kl", None), "step 2: kl is None; it must be a finite number"),
    "text": (set_to("kl", "1.0"), "step 2: kl is '1.0'"),
    "true": (set_to("kl", True), "step 2: kl is True"),
    "stated as not finite": (set_to("nonfinite", ["kl"]), "step 2: not finite: kl"),
    "no list of them": (set_to("nonfinite", None), "nonfinite is None"),
    "a step left out": (lambda rows: rows.pop(2), "row 3 is of step 4; it must be of step 3"),
    "a step twice": (lambda rows: rows.insert(2, rows[1]), "row 3 is of step 2; it must be of step 3"),
    "steps swapped": (lambda rows: rows.reverse(), "row 1 is of step 5"),
    "clip_frac above 1": (set_to("clip_frac", 1.5), "clip_frac is 1.5; it cannot be above 1.0"),
    "negative clip_frac": (set_to("clip_frac", -0.1), "clip_frac is -0.1; it cannot be below 0.0"),
    "entropy above ln V": (set_to("entropy", 50.0), "entropy is 50.0; it cannot be above"),
    "negative entropy": (set_to("entropy", -1.0), "entropy is -1.0; it cannot be below 0.0"),
    "negative kl_k3": (set_to("kl_k3", -1e-3), "kl_k3 is -0.001; it cannot be below 0.0"),
    "negative variance": (set_to("reward_var", -1.0), "reward_var is -1.0"),
    "negative adv_var": (set_to("adv_var", -1.0), "adv_var is -1.0"),
    "negative grad_norm": (set_to("grad_norm", -1.0), "grad_norm is -1.0"),
    "explains more than all": (set_to("explained_variance", 1.1), "explained_variance is 1.1"),
    "more tokens than fit": (set_to("response_tokens", 10**6), "response_tokens is 1000000"),
    "another kl": (set_to("kl", 0.1), "step 2: kl_target_error is"),
    "another target error": (set_to("kl_target_error", 1.0), "step 2: kl_target_error is 1.0"),
    "another rate": (set_to("lr", 1e-5), "step 2: lr is 1e-05; the schedule's rate is 0.00024"),
    "another length": (set_to("response_length_mean", 7.5), "step 2: response_length_mean is 7.5"),
    "another coefficient": (set_to("kl_coef", 0.2), "step 2: kl_coef is 0.2"),
    "another score": (set_to("score_mean", 3.0), "step 2: score_mean is 3.0; reward_mean less the penalty"),
    "a number that no float holds": (set_to("kl", 10**400), "(401 characters); it must be a finite number"),
    "mean norm above the largest": (set_to("grad_norm_max", 0.0), "is above grad_norm_max 0.0"),
    "p99 above the largest": (set_to("rollout_logprob_diff_p99", 1.0), "is above rollout_logprob_diff_max"),
}


@pytest.mark.parametrize("kind", METRICS_SPOILED)
def test_a_spoiled_log_is_found_out(copied_run, kind):
    spoil, message = METRICS_SPOILED[kind]
    change(copied_run, "metrics.jsonl", spoil)
    with pytest.raises(MetricsWrong) as caught:
        list(check_log(copied_run))
    assert message in str(caught.value)


def test_a_step_that_no_float_holds_is_refused_as_it_is_read(copied_run):
    change(copied_run, "metrics.jsonl", set_to("step", 10**400))
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: .* whole number as its step, of at most 2\^53"):
        list(check_log(copied_run))


def test_of_many_bad_metrics_the_first_by_name_is_named(copied_run):
    change(
        copied_run, "metrics.jsonl", lambda rows: rows[0].update(dict.fromkeys(POSSIBLE.keys() & rows[0].keys(), "x"))
    )
    with pytest.raises(MetricsWrong, match=r"^step 1: adv_var is 'x'; it must be a finite number$"):
        list(check_log(copied_run))


def test_a_log_without_rows_is_found_out(copied_run):
    (copied_run / "metrics.jsonl").write_text("")
    with pytest.raises(MetricsWrong, match="has no rows"):
        list(check_log(copied_run))


@pytest.mark.parametrize("name", ["metrics.jsonl", "timings.jsonl"])
def test_a_log_that_an_editor_saved_anew_is_found_out(copied_run, name):
    path = copied_run / name
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    outcome = run_command("check-metrics", copied_run)
    assert outcome.code == 1
    assert f"{name} begins with a byte order mark" in outcome.out


def test_a_time_twice_is_found_out(copied_run):
    change(copied_run, "timings.jsonl", lambda rows: rows.append(rows[-1]))
    with pytest.raises(ValueError, match=r"timings\.jsonl:6: step 5 a second time"):
        list(check_log(copied_run))


TIMINGS_SPOILED = {
    "another rate": (set_to("tokens_per_second", 5.0), "step 2: tokens_per_second is 5.0;"),
    "no rate": (set_to("tokens_per_second", None), "tokens_per_second is None"),
    "no time": (set_to("step_time_s", 0), "step_time_s is 0; it must be a number above 0"),
    "a time that no float holds": (set_to("step_time_s", 10**400), "(401 characters); it must be a number above 0"),
    "a row less": (lambda rows: rows.pop(), "differ in the steps [5]"),
}


@pytest.mark.parametrize("kind", TIMINGS_SPOILED)
def test_a_throughput_that_was_not_measured_is_found_out(copied_run, kind):
    spoil, message = TIMINGS_SPOILED[kind]
    change(copied_run, "timings.jsonl", spoil)
    with pytest.raises(MetricsWrong) as caught:
        list(check_log(copied_run))
    assert message in str(caught.value)


SAMPLES_SPOILED = {
    "another kl": (set_to("kl", 1.0), "kl is 1.0; its tokens' log-probs give"),
    "a log-prob less": (lambda rows: rows[1]["logprobs"].pop(), "log-probs"),
    "a step that was not": (set_to("step", 99), "step 99 sample 1: is in row 2, where step 1 sample 1 belongs"),
    "no log-probs": (set_to("logprobs", None), "logprobs is None; it must be a list of numbers"),
    "a word for a log-prob": (lambda rows: rows[1]["logprobs"].__setitem__(0, "x"), "it must be a list of numbers"),
    "a log-prob above 0": (lambda rows: rows[1]["ref_logprobs"].__setitem__(0, 0.5), "none above 0"),
    "a reward that is NaN": (set_to("reward", float("nan")), "reward is nan; it must be finite"),
    "a sample twice": (lambda rows: rows.insert(1, rows[0]), "sample 0: is in row 2, where step 1 sample 1 belongs"),
    "a sample less": (lambda rows: rows.pop(), "19 rows; 4 of 5 steps belong there"),
    "a sample more": (lambda rows: rows.append(rows[0]), "is in row 21; 4 of 5 steps belong there"),
    "in another order": (lambda rows: rows.reverse(), "is in row 1, where step 1 sample 0 belongs"),
}


@pytest.mark.parametrize("kind", SAMPLES_SPOILED)
def test_samples_that_contradict_themselves_are_found_out(copied_run, kind):
    spoil, message = SAMPLES_SPOILED[kind]
    change(copied_run, "samples.jsonl", spoil)
    with pytest.raises(MetricsWrong) as caught:
        list(check_log(copied_run))
    assert message in str(caught.value)


DETERMINED = (
    "entropy", "reward_mean", "reward_var", "score_mean", "kl_k3", "adv_var", "explained_variance", "value_mean",
    "return_mean", "policy_loss", "value_loss", "grad_norm", "clip_frac", "approx_kl", "eos_rate", "sampling_z",
)  # fmt: skip


def test_a_metric_that_is_possible_but_not_what_the_tokens_give_is_found_out(copied_run):
    """Each of them, off by 0.002; one recomputation serves all."""
    from rlhf_core.checks import metrics_again

    again = metrics_again.metrics_again(copied_run, 5)
    rows = [json.loads(line) for line in (copied_run / "metrics.jsonl").read_text().splitlines()]
    unspoiled = metrics_again.metrics_again
    try:
        metrics_again.metrics_again = lambda run, step: again
        assert "26 metrics" in metrics_again.check_again(copied_run, 5, rows[4])
        for name in DETERMINED:
            with pytest.raises(MetricsWrong, match=f"step 5: {name} is .*; from the tokens it comes to"):
                metrics_again.check_again(copied_run, 5, rows[4] | {name: rows[4][name] + 0.002})
    finally:
        metrics_again.metrics_again = unspoiled


def spoil_rollout(run, spoil):
    path = run / "rollouts" / "step_000005.safetensors"
    tensors = load_file(path)
    spoil(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def another_token(tensors):
    tensors["input_ids"][0, -1] = (tensors["input_ids"][0, -1] + 7) % 50 + 5


ROLLOUTS_SPOILED = {
    "another token": (another_token, "step 5: "),
    "another reward": (lambda t: t["rewards"].add_(0.5), "its text scores"),
    "another log-prob of the sampler": (lambda t: t["sampler_logprobs"].add_(0.1), "rollout_logprob_diff_max"),
    "a tensor less": (lambda t: t.pop("rewards"), "it must hold attention_mask"),
    "another shape": (lambda t: t.update(rewards=torch.zeros(3)), "shapes that do not fit"),
    "an empty response": (lambda t: t["response_mask"].zero_(), "has 0 response tokens"),
}


@pytest.mark.parametrize("kind", ROLLOUTS_SPOILED)
def test_a_spoiled_rollout_is_found_out(copied_run, kind):
    spoil, message = ROLLOUTS_SPOILED[kind]
    (copied_run / "rollouts" / "step_000001.safetensors").unlink()
    spoil_rollout(copied_run, spoil)
    outcome = run_command("check-metrics", copied_run)
    assert outcome.code == 1
    assert message in outcome.out.splitlines()[-1]


def test_damaged_files_are_named(copied_run):
    path = copied_run / "rollouts" / "step_000001.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    outcome = run_command("check-metrics", copied_run)
    assert outcome.code == 1
    assert "step_000001.safetensors cannot be read" in outcome.out
    path.unlink()
    weights = copied_run / "checkpoints" / "step_000004" / "policy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    outcome = run_command("check-metrics", copied_run)
    assert outcome.code == 1
    assert "model.safetensors does not have the SHA-256" in outcome.out


def test_a_run_without_rollouts_says_what_was_not_checked(copied_run):
    shutil.rmtree(copied_run / "rollouts")
    outcome = run_command("check-metrics", copied_run)
    assert outcome.code == 0
    assert "--   again: no step has its rollout" in outcome.out


@pytest.mark.parametrize(
    "options",
    [
        ("--model.value", "shared", "--model.architecture", "gpt2"),
        ("--ppo.algorithm", "grpo", "--ppo.group-size", "2"),
        ("--ppo.algorithm", "dr-grpo", "--ppo.group-size", "2"),
        ("--ppo.algorithm", "rloo", "--ppo.group-size", "2"),
        ("--ppo.algorithm", "reinforce++", "--ppo.whiten-rewards"),
        ("--ppo.algorithm", "reinforce++-baseline", "--ppo.group-size", "2"),
        ("--ppo.kl-place", "loss", "--ppo.kl-estimator", "k2", "--ppo.loss-mean", "sequence"),
    ],
    ids=lambda options: " ".join(options).replace("--ppo.", "").replace("--model.", ""),
)
def test_other_models_and_algorithms_are_computed_again_too(tmp_path, options):
    """Their updates too: a loss that is off by 0.001 is found out."""
    outcome = run_command("train", *TINY_RUN, "--runs", tmp_path, "--name", "other", *options)
    assert outcome.code == 0, outcome.err
    outcome = run_command("check-metrics", tmp_path / "other")
    assert outcome.code == 0, outcome.out
    assert outcome.out.count("again: step") == 2
    assert outcome.out.count("updates within") == 2
    change(tmp_path / "other", "metrics.jsonl", lambda rows: rows[0].update(policy_loss=rows[0]["policy_loss"] + 1e-3))
    outcome = run_command("check-metrics", tmp_path / "other")
    assert outcome.code == 1
    assert "step 1: policy_loss is" in outcome.out


def test_the_largest_entropy_is_that_of_a_uniform_choice(finished_run):
    config = json.loads((finished_run / "models" / "base" / "config.json").read_text())
    assert metrics_check.largest_entropy(finished_run) == math.log(config["vocab_size"])
