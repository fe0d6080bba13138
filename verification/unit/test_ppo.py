import copy
import dataclasses

import pytest
import torch
from tiny_models import EOS, PAD, PROMPTS, draw, same_bits, share_of_sevens, snapshot, tiny_config, tiny_state
from trainer_cases import (
    architectures,
    assert_same_run,
    sequences_alone,
    step_once,
    values,
)

from rlhf_core import updates
from rlhf_core.config import PPOConfig, SamplingConfig
from rlhf_core.metrics import METRICS, log_row
from rlhf_core.ppo import learning_rate, train
from rlhf_core.scoring import score_rollout
from rlhf_core.update_statistics import MinibatchSums, UpdateStatistics
from rlhf_core.updates import plan_epoch


def test_the_rate_falls_linearly_or_stays():
    linear = PPOConfig(steps=4, learning_rate=0.8, schedule="linear")
    assert [learning_rate(linear, step) for step in (1, 2, 3, 4)] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert learning_rate(dataclasses.replace(linear, schedule="constant"), 4) == 0.8


def test_the_step_sets_and_logs_the_rate():
    config = tiny_config(learning_rate=1e-3, steps=4)
    state = tiny_state("gpt2", "shared", config)
    rates = [step_once(state, config).metrics["lr"] for _ in range(2)]
    assert rates == pytest.approx([1e-3, 7.5e-4])
    assert state.optimizer.param_groups[0]["lr"] == rates[1]


def test_an_epoch_has_every_row_once_and_is_a_function_of_seed_step_and_epoch():
    config = PPOConfig(batch_size=12, minibatch_size=6, micro_batch_size=3)

    def rows(*key):
        plan = plan_epoch(config, *key)
        assert [[len(micro) for micro in minibatch] for minibatch in plan] == [[3, 3], [3, 3]]
        return torch.cat([torch.cat(minibatch) for minibatch in plan]).tolist()

    keys = [(0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 1, 0)]
    orders = [rows(*key) for key in keys]
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert rows(0, 1, 0) == orders[0]


def test_each_epoch_of_a_step_goes_through_its_own_plan_once(monkeypatch):
    config = tiny_config(epochs=3)
    seen, right = [], updates.accumulate_gradients

    def spy(state, rollout, scores, targets, minibatch, *others):
        seen.append([rows.tolist() for rows in minibatch])
        return right(state, rollout, scores, targets, minibatch, *others)

    monkeypatch.setattr(updates, "accumulate_gradients", spy)
    step_once(tiny_state("gpt2", "shared", config), config)
    plans = [plan_epoch(config.ppo, config.seed, 1, epoch) for epoch in range(3)]
    assert seen == [[rows.tolist() for rows in minibatch] for plan in plans for minibatch in plan]
    assert len({str(seen[at : at + 2]) for at in (0, 2, 4)}) == 3


def test_statistics_are_means_over_tokens_and_the_first_deviation():
    statistics = UpdateStatistics()
    statistics.add(MinibatchSums(torch.tensor([2.0, 4.0, 1.0, 3.0]), torch.tensor(0.25), count=4, tokens=4), 1.0)
    statistics.add(MinibatchSums(torch.tensor([1.0, 2.0, 0.5, 0.0]), torch.tensor(9.0), count=2, tokens=2), 4.0)
    assert statistics.metrics(value=True) == {
        "policy_loss": 0.5,
        "value_loss": 1.0,
        "approx_kl": 0.25,
        "clip_frac": 0.5,
        "ratio_max_dev_first": 0.25,
        "grad_norm": 2.5,
        "grad_norm_max": 4.0,
    }


def test_the_kl_coefficient_of_a_step_is_logged_and_the_next_one_follows_the_measured_kl():
    config = tiny_config(kl_coef=0.2, kl_target=0.5, kl_horizon=100)
    state = tiny_state("gpt2", "shared", config, reference_seed=1)
    first = step_once(state, config).metrics
    assert first["kl_coef"] == 0.2
    error = min(max(first["kl"] / 0.5 - 1, -0.2), 0.2)
    assert state.kl_coef == pytest.approx(0.2 * (1 + error * 8 / 100), rel=1e-12)
    assert error != 0
    following = state.kl_coef
    assert step_once(state, config).metrics["kl_coef"] == following


def test_a_fixed_kl_coefficient_stays():
    config = tiny_config(kl_coef=0.2, kl_control="fixed")
    state = tiny_state("gpt2", "shared", config, reference_seed=1)
    step_once(state, config)
    assert state.kl_coef == 0.2


def test_kl_rewards_and_the_penalty_for_a_missing_end_are_those_of_each_sequence():
    config = tiny_config(missing_eos_penalty=0.75)
    state = tiny_state("llama", "separate", config, reference_seed=1)
    before = copy.deepcopy(state)
    result = step_once(state, config)
    kls = [
        float((one["logprobs"] - one["ref_logprobs"]).sum().detach()) for one in sequences_alone(before, result.rollout)
    ]
    assert result.kl_B.tolist() == pytest.approx(kls, abs=1e-5)
    assert result.metrics["kl"] == pytest.approx(sum(kls) / 8, abs=1e-5)
    assert result.metrics["reward_mean"] == pytest.approx(float(result.rewards_B.mean()), rel=1e-6)
    unended = 8 - int(result.rollout.ended_B.sum())
    assert unended > 0
    expected = float(result.rewards_B.mean()) - 0.75 * unended / 8
    assert result.metrics["score_mean"] == pytest.approx(expected, rel=1e-5)


@architectures
@values
def test_a_step_gives_every_metric_of_the_table_and_times_every_stage(architecture, value):
    config = tiny_config()
    result = step_once(tiny_state(architecture, value, config), config)
    assert result.metrics.keys() == {metric.name for metric in METRICS if metric.logged != "with groups"}
    assert log_row(1, result.metrics)["nonfinite"] == []
    stages = {"rollout", "reward", "reference_and_value", "advantages", "update", "metrics"}
    assert stages == result.clock.stage_seconds().keys()  # those inside others are for an observer: test_profiler


def test_a_step_draws_nothing_from_torchs_generator_and_repeats_bit_for_bit():
    config = tiny_config(learning_rate=1e-2)
    runs = []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            state = tiny_state("llama", "separate", config)
            before = torch.get_rng_state()
            metrics = [step_once(state, config).metrics for _ in range(2)]
            assert same_bits(torch.get_rng_state(), before)
        runs.append((metrics, snapshot(state.model)))
    assert_same_run(*runs)


def test_dropout_in_the_models_configuration_stays_off():
    with_dropout, without = tiny_config(), tiny_config()
    runs = []
    for config, rate in ((with_dropout, 0.5), (without, 0.0)):
        state = tiny_state("gpt2", "separate", config, dropout=rate)
        drops = [module.p for module in state.model.modules() if isinstance(module, torch.nn.Dropout)]
        assert drops
        assert set(drops) == {rate}
        metrics = step_once(state, config).metrics
        assert not any(module.training for module in state.model.modules())
        runs.append((metrics, snapshot(state.model)))
    assert_same_run(*runs)


def test_training_goes_on_after_the_last_step_done_and_asks_for_that_steps_prompts():
    config = tiny_config(steps=4)
    state, asked = tiny_state("gpt2", "shared", config), []
    state.step = 2

    def prompts_of_step(step):
        asked.append(step)
        return PROMPTS

    results = list(train(state, prompts_of_step, share_of_sevens, config, eos_id=EOS, pad_id=PAD))
    assert asked == [3, 4]
    assert len(results) == 2
    assert state.step == 4


def test_completions_of_a_step_change_with_the_step():
    config = tiny_config(learning_rate=1e-9)
    state = tiny_state("gpt2", "shared", config)
    first, second = (step_once(state, config).rollout.response_token_ids() for _ in range(2))
    assert first != second


def test_greedy_sampling_in_the_configuration_makes_the_completions_of_all_steps_the_same():
    config = dataclasses.replace(tiny_config(learning_rate=1e-9), sampling=SamplingConfig(max_new_tokens=3, top_k=1))
    state = tiny_state("gpt2", "shared", config)
    first, second = (step_once(state, config).rollout.response_token_ids() for _ in range(2))
    assert first == second
    assert max(map(len, first)) <= 3


def test_the_reference_never_moves():
    config = tiny_config(learning_rate=1e-2)
    state = tiny_state("gpt2", "shared", config)
    before = snapshot(state.reference)
    step_once(state, config)
    assert all(same_bits(before[name], tensor) for name, tensor in state.reference.state_dict().items())
    assert all(parameter.grad is None for parameter in state.reference.parameters())


@architectures
@values
def test_bfloat16_stays_near_float32_and_keeps_weights_and_losses_in_float32(architecture, value):
    config = tiny_config(dtype="bfloat16", temperature=2.0)
    state = tiny_state(architecture, value, config, reference_seed=1)
    rollout, plan = draw(state.model.lm, PROMPTS, config), plan_epoch(config.ppo, 0, 1, 0)
    exact, rough = (
        score_rollout(state.model, state.reference, rollout, plan, 2.0, dtype) for dtype in ("float32", "bfloat16")
    )
    for field in dataclasses.fields(exact):
        a, b = getattr(exact, field.name), getattr(rough, field.name)
        assert b.dtype == torch.float32
        assert 0 < (a - b)[rollout.response_mask_BT].abs().max() < 0.15
    metrics = step_once(state, config).metrics
    assert metrics["ratio_max_dev_first"] == 0.0
    assert metrics["rollout_logprob_diff_max"] < 0.15
    assert {parameter.dtype for parameter in state.model.parameters()} == {torch.float32}
