"""What must not change the trainer's result does not: in float64 to 1e-11 of the largest movement of a weight.

Both ways through a model are held to it: real tokens side by side, and padded rows. Bits, where they must agree, are
the subject of unit/test_ppo_masks.py (what lies outside the mask) and of M1 (seeds, processes, threads).
"""

import copy
import dataclasses

import pytest
import torch
from invariances import EXACT, OF_VALUES, case, learned, padded_rows
from trainer_cases import algorithms

from rlhf_core import packing, policy, ppo, scoring, updates

pytestmark = pytest.mark.m4

TOLERANCE = 1e-11
FLOAT32_INSIDE = 1e-6
"""Where sums are taken in another order around the norms of transformers' Llama, which compute in float32 always."""


@algorithms
@pytest.mark.parametrize("name", EXACT)
def test_what_means_the_same_learns_the_same(algorithm, name):
    assert EXACT[name](*case(algorithm)) < TOLERANCE


@pytest.mark.parametrize("name", [name for name in EXACT if name != "packing"])
def test_so_it_does_with_padded_rows(name):
    with padded_rows():
        assert EXACT[name](*case("ppo")) < TOLERANCE


@pytest.mark.parametrize("name", EXACT)
def test_so_does_gpt2(name):
    assert EXACT[name](*case("ppo", "gpt2")) < TOLERANCE


@pytest.mark.parametrize("name", OF_VALUES)
@pytest.mark.parametrize(("architecture", "tolerance"), [("gpt2", TOLERANCE), ("llama", FLOAT32_INSIDE)])
def test_the_value_model_may_be_shared_or_separate(name, architecture, tolerance):
    assert OF_VALUES[name](*case("ppo", architecture)) < tolerance


# -- each check catches the mistake that it is for ---------------------------------------------------------------------


def plant_micro_batch_mean(monkeypatch):
    """Divide a micro-batch's loss by its own tokens."""
    right = updates.loss_sum
    monkeypatch.setattr(updates, "loss_sum", lambda losses, mask, mean: right(losses, mask, mean) / mask.sum() * 10)


def plant_whitening_by_half(monkeypatch):
    """Whiten the two halves of the batch apart, as two workers would that do not speak with each other."""
    right = ppo.make_targets

    def apart(rewards, values, mask, config):
        targets, raw = right(rewards, values, mask, config)
        half = len(mask) // 2
        for rows in (slice(0, half), slice(half, None)):
            on = raw[rows][mask[rows]]
            targets.advantages_BT[rows] = (raw[rows] - on[: len(on) // 2].mean()) * mask[rows]
        return targets, raw

    monkeypatch.setattr(ppo, "make_targets", apart)


def plant_positions_from_the_left_edge(monkeypatch):
    """Count positions from the first column, padding included."""
    monkeypatch.setattr(policy, "position_ids", lambda mask: torch.arange(mask.shape[1]).expand_as(mask))


def plant_attention_to_padding(monkeypatch):
    """Let real tokens see the padding before them."""
    right = policy.ActorCritic.forward

    def seeing(self, ids, mask, *rest):
        return right(self, ids, torch.ones_like(mask), *rest)

    monkeypatch.setattr(policy.ActorCritic, "forward", seeing)


def plant_padding_in_the_mean(monkeypatch):
    """Divide by every position of the responses, padding included."""
    monkeypatch.setattr(updates, "loss_count", lambda mask, mean, longest: mask.numel())


def plant_shifted_positions(monkeypatch):
    """Read the logits one position late, from the front: right only when the head gives T + 1 of them."""
    monkeypatch.setattr(policy, "predicting", lambda x, length: x[:, :length])


def plant_shared_trunk(monkeypatch):
    """Let the value model's own trunk be the policy's."""
    right = policy.ActorCritic.__init__

    def aliased(self, lm, value):
        right(self, lm, value)
        self.value_trunk = lm.base_model if value == "separate" else None

    monkeypatch.setattr(policy.ActorCritic, "__init__", aliased)


def plant_detached_trunk(monkeypatch):
    """Keep the value loss from the shared trunk."""
    right = policy.ActorCritic.forward

    def forward(self, *args):
        logits, values = right(self, *args)
        return logits, values.detach() + 0.0 * self.value_head.bias if self.value_trunk is None else values

    monkeypatch.setattr(policy.ActorCritic, "forward", forward)


def plant_temperature_forgotten_by_the_reference(monkeypatch):
    """Take the reference's log-probs at temperature 1."""
    right = scoring.response_scores
    monkeypatch.setattr(
        scoring, "response_scores", lambda *rows_and_temperature: right(*rows_and_temperature[:-1], 1.0)
    )


@pytest.mark.parametrize(
    ("name", "plant"),
    [
        ("micro-batches", plant_micro_batch_mean),
        ("order", plant_whitening_by_half),
        ("left padding", plant_positions_from_the_left_edge),
        ("left padding", plant_attention_to_padding),
        ("right padding", plant_padding_in_the_mean),
        ("response head", plant_shifted_positions),
        ("value network", plant_shared_trunk),
        ("shared head", plant_detached_trunk),
        ("temperature", plant_temperature_forgotten_by_the_reference),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_planted_mistake_breaks_its_invariance(monkeypatch, name, plant):
    monkeypatch.setattr(scoring, "packable", lambda model: None)
    plant(monkeypatch)
    architecture = "gpt2" if plant is plant_positions_from_the_left_edge else "llama"  # RoPE knows differences alone
    assert (EXACT | OF_VALUES)[name](*case("ppo", architecture)) > 1e-6


def plant_predictions_of_the_token_itself(packed):
    return dataclasses.replace(packed, predicting_M=packed.predicting_M + 1)


def plant_positions_of_all_rows(packed):
    return dataclasses.replace(packed, positions_N=torch.arange(len(packed.ids_N)) % 16)


@pytest.mark.parametrize(
    "plant",
    [plant_predictions_of_the_token_itself, plant_positions_of_all_rows],
    ids=lambda x: x.__name__,
)
def test_a_planted_mistake_breaks_packing(monkeypatch, plant):
    right = scoring.pack
    monkeypatch.setattr(scoring, "pack", lambda *args: plant(right(*args)))
    assert EXACT["packing"](*case("ppo", "gpt2")) > 1e-6


def test_a_token_that_sees_those_behind_it_breaks_packing(monkeypatch):
    right = packing.scaled_dot_product_attention
    monkeypatch.setattr(
        packing, "scaled_dot_product_attention", lambda *x, is_causal, **options: right(*x, is_causal=False, **options)
    )
    assert EXACT["packing"](*case("ppo", "gpt2")) > 1e-6


# -- precision ---------------------------------------------------------------------------------------------------------


def rounded_away(algorithm, dtype, updates):
    """How far a run of lower precision moves the weights from where float64 does, relative to the largest movement."""
    config, state, rollout = case(algorithm, "gpt2", epochs=updates)
    single = copy.deepcopy(state)
    single.model.float(), single.reference.float()
    drawn = dataclasses.replace(rollout, sampler_logprobs_BT=rollout.sampler_logprobs_BT.float())
    exact, rough = (
        learned(config, state, rollout)[1],
        learned(dataclasses.replace(config, dtype=dtype), single, drawn)[1],
    )
    largest = max(float(x.abs().max()) for x in exact.values())
    return max(float((exact[name] - rough[name]).abs().max()) for name in exact) / largest


BOUNDS = {"float32": 5e-5, "bfloat16": 0.5}
"""PPO after 1, 4, 16 and 64 updates: float32 4e-6, 9e-6, 7e-6 and 1e-5, bfloat16 0.01, 0.24, 0.14 and 0.07."""


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
@pytest.mark.parametrize("updates", [1, 16])
def test_rounding_errors_stay_bounded_as_updates_add_up(algorithm, updates):
    errors = {dtype: rounded_away(algorithm, dtype, updates) for dtype in BOUNDS}
    assert 1e-9 < errors["float32"] < BOUNDS["float32"]
    assert errors["float32"] < errors["bfloat16"] < BOUNDS["bfloat16"]


def test_a_log_prob_that_is_rounded_to_half_precision_would_be_noticed(monkeypatch):
    monkeypatch.setattr(scoring, "packable", lambda model: None)
    right = scoring.token_logprobs

    def rounding(logits, labels, **options):
        logprobs, *rest = out if isinstance(out := right(logits, labels, **options), tuple) else (out,)
        logprobs = logprobs.bfloat16().to(logprobs.dtype) if logits.dtype == torch.float32 else logprobs
        return (logprobs, *rest) if rest else logprobs

    monkeypatch.setattr(scoring, "token_logprobs", rounding)
    assert rounded_away("ppo", "float32", 4) > 10 * BOUNDS["float32"]
