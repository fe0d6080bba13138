import math

import pytest
import torch
from tiny_models import ARCHITECTURES, EOS, PAD, PROMPTS, same_bits, snapshot, tiny_lm

from rlhf_core.config import PretrainConfig
from rlhf_core.sft import train_language_model, train_supervised, warmup_then_linear

architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)
SEQUENCES = [[*prompt, EOS] for prompt in PROMPTS]


def trained(model, sequences, *, steps, seed=0, batch_size=8, learning_rate=1e-2):
    losses = []
    config = PretrainConfig(batch_size=batch_size, learning_rate=learning_rate)
    train_language_model(model, sequences, config, steps=steps, pad_id=PAD, seed=seed, report=losses.append)
    return losses


def test_the_rate_warms_up_over_a_twentieth_and_falls_to_a_tenth():
    factors = [warmup_then_linear(step, 100) for step in range(101)]
    assert factors[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert factors[52] == pytest.approx(1 - 0.9 * 47 / 95)
    assert factors[100] == pytest.approx(0.1)
    assert [warmup_then_linear(step, 1) for step in (0, 1)] == pytest.approx([1.0, 1.0])


@architectures
def test_the_loss_is_the_mean_cross_entropy_of_every_token_but_the_first_of_unpadded_rows(architecture):
    model = tiny_lm(architecture)
    total, count = 0.0, 0
    with torch.no_grad():
        for ids in SEQUENCES:
            tokens = torch.tensor(ids)
            logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1].double()
            total += float(torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="sum"))
            count += len(ids) - 1
    assert trained(model, [*SEQUENCES, [5]], steps=1) == pytest.approx([total / count], rel=1e-5)


@architectures
def test_the_padding_token_is_no_part_of_what_is_learned(architecture):
    runs = []
    for pad in (PAD, EOS):
        model, config = tiny_lm(architecture), PretrainConfig(batch_size=4)
        train_language_model(model, SEQUENCES, config, steps=3, pad_id=pad, seed=0, report=lambda loss: None)
        runs.append(snapshot(model))
    assert all(same_bits(runs[0][name], runs[1][name]) for name in runs[0])


@architectures
def test_a_language_model_learns_a_sequence_that_is_always_the_same(architecture):
    model = tiny_lm(architecture)
    losses = trained(model, [[2, 3, 5, 7, 3, EOS]] * 4, steps=60, batch_size=4, learning_rate=2e-2)
    assert losses[0] > 1.5
    assert losses[-1] < 0.05
    ids = [2]
    with torch.no_grad():
        for _ in range(5):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert ids == [2, 3, 5, 7, 3, EOS]


def test_the_seed_decides_the_order_of_the_data():
    runs = []
    for seed in (0, 0, 1):
        model = tiny_lm("gpt2")
        runs.append((trained(model, SEQUENCES, steps=4, seed=seed, batch_size=2), snapshot(model)))
    assert runs[0][0] == runs[1][0]
    assert all(same_bits(runs[0][1][name], runs[1][1][name]) for name in runs[0][1])
    assert runs[0][0] != runs[2][0]


def test_dropout_stays_off_and_the_mode_is_kept():
    runs = []
    for rate in (0.0, 0.5):
        model = tiny_lm("gpt2", dropout=rate)
        runs.append(trained(model, SEQUENCES, steps=3))
        assert not model.training
    assert runs[0] == runs[1]


def one_weight(loss_of_weight, *, steps=1, learning_rate=0.1, report=lambda loss: None):
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(2.0)
    train_supervised(
        model,
        lambda rows: loss_of_weight(model.weight.sum()),
        iter([[0]] * steps),
        steps=steps,
        learning_rate=learning_rate,
        report=report,
    )
    return model.weight.item()


def test_gradients_are_clipped_to_norm_one_and_the_rate_is_the_schedules():
    # Adam's first step is the rate, whatever the gradient; weight decay takes a hundredth of the rate times the weight.
    assert one_weight(lambda w: 1e6 * w) == pytest.approx(2.0 - 0.1 - 0.1 * 0.01 * 2.0, rel=1e-6)
    # A clipped gradient of 1 and then one of 0.5 unclipped: both moments show whether the first was 1 or 1e6.
    slopes = iter([1e6, 0.5])
    got = one_weight(lambda w: next(slopes) * w, steps=2)
    first = 2.0 * (1 - 0.001) - 0.1
    m, v = (0.9 * 0.1 + 0.1 * 0.5) / (1 - 0.81), (0.99 * 0.01 + 0.01 * 0.25) / (1 - 0.99**2)
    rate = 0.1 * warmup_then_linear(1, 2)
    assert got == pytest.approx(first * (1 - rate * 0.01) - rate * m / (math.sqrt(v) + 1e-8), rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_and_names_the_step(bad):
    factors = iter([1.0, 1.0, bad, 1.0])
    heard = []
    with pytest.raises(
        FloatingPointError, match=r"the loss is (nan|inf) at supervised step 3; lower the learning rate"
    ):
        one_weight(lambda w: w * next(factors), steps=4, report=heard.append)
    assert len(heard) == 2


def test_a_gradient_that_is_not_finite_under_a_finite_loss_stops_before_it_reaches_the_weights():
    heard = []
    with pytest.raises(FloatingPointError, match=r"the gradient norm is (nan|inf) at supervised step 1"):
        one_weight(lambda w: (w - w).sqrt(), report=heard.append)  # √0: its derivative is infinite
    assert heard == []


@pytest.mark.parametrize("sequences", [[], [[5], [6]]])
def test_sequences_without_a_second_token_are_refused(sequences):
    with pytest.raises(ValueError, match=f"none of the {len(sequences)} sequences has two tokens"):
        trained(tiny_lm("gpt2"), sequences, steps=1)
