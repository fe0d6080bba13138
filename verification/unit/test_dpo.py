import copy
import json
import math
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES, EOS, PAD, few_examples, snapshot, tiny_lm

from rlhf_core.data.tokenization import word_tokenizer
from rlhf_core.dpo import DPOObjective, dpo_loss, ipo_loss
from rlhf_core.metrics import DPO_METRICS, stage_row
from rlhf_core.optim import adamw
from rlhf_core.stage_config import DPOLossConfig, TrainingConfig
from rlhf_core.supervised import SupervisedState, supervised_step
from rlhf_core.testing.command import run_command

PROMPTS = [[5, 6, 7], [8], [9, 2, 3, 4], [2, 2]]
CHOSEN = [[3, 4, EOS], [7, EOS], [6, 6, 6, EOS], [9, EOS]]
REJECTED = [[8, EOS], [2, 3, 4, EOS], [5, EOS], [10, 10, EOS]]
NO_TIES = torch.zeros(3, dtype=torch.float64)


def objective(model, reference=None, ties=None, dtype="float32", **settings):
    config = DPOLossConfig(**settings)
    return DPOObjective(
        model, PROMPTS, CHOSEN, REJECTED, config, pad_id=PAD, reference=reference, ties=ties, dtype=dtype, batch_size=3
    )


# -- the losses --------------------------------------------------------------------------------------------------------


def test_the_losses_are_the_hand_worked_numbers():
    h = torch.tensor([0.0, math.log(3) / 0.1, -math.log(3) / 0.1], dtype=torch.float64)  # σ(β h) = ½, ¾, ¼
    assert dpo_loss(h, NO_TIES, beta=0.1).item() == pytest.approx(math.log(2) + math.log(4 / 3) + math.log(4))
    smooth = dpo_loss(h[1:2], NO_TIES[:1], beta=0.1, label_smoothing=0.25).item()
    assert smooth == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    tie = torch.ones(1, dtype=torch.float64)
    assert dpo_loss(h[1:2], tie, beta=0.1).item() == pytest.approx(0.5 * math.log(4 / 3) + 0.5 * math.log(4))
    one = torch.tensor([2.0], dtype=torch.float64)
    assert ipo_loss(one, tie - 1, beta=0.1).item() == pytest.approx(9.0)  # (2 − 5)²
    assert ipo_loss(one, tie, beta=0.1).item() == pytest.approx(4.0)


@few_examples
@given(st.floats(0.05, 2.0), st.floats(0.01, 0.45))
def test_each_loss_has_its_optimum_where_its_paper_has_it(beta, smoothing):
    def slope(loss, at):
        h = torch.tensor([at], dtype=torch.float64, requires_grad=True)
        loss(h).backward()
        return h.grad.item()

    none, tie = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    at = math.log((1 - smoothing) / smoothing) / beta  # σ(β h) = 1 − ε
    assert slope(lambda h: dpo_loss(h, none, beta=beta, label_smoothing=smoothing), at) == pytest.approx(0, abs=1e-12)
    assert slope(lambda h: ipo_loss(h, none, beta=beta), 1 / (2 * beta)) == pytest.approx(0, abs=1e-12)
    assert slope(lambda h: dpo_loss(h, tie, beta=beta), 0.0) == pytest.approx(0, abs=1e-12)
    assert slope(lambda h: dpo_loss(h, none, beta=beta), 3.0) < 0  # without smoothing there is none


def test_the_loss_is_finite_where_the_sigmoid_is_not():
    h = torch.tensor([-1e5, 1e5], dtype=torch.float32)
    assert dpo_loss(h, torch.zeros(2), beta=0.1).item() == pytest.approx(1e4)


# -- the objective -----------------------------------------------------------------------------------------------------


def logprob_alone(model, prompt, completion):
    """Σ log π of a completion, one sequence without padding, from a float64 copy."""
    ids = torch.tensor([prompt + completion])
    logp = copy.deepcopy(model).double()(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    return sum(logp[len(prompt) + at - 1, token] for at, token in enumerate(completion))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_figures_agree_with_each_sequence_alone(architecture):
    policy, reference = tiny_lm(architecture, seed=1), tiny_lm(architecture)
    loss, figures = objective(policy, reference, beta=0.3).losses([0, 1, 2, 3])
    expected = dict.fromkeys((*figures, "loss"), 0.0)
    for prompt, chosen, rejected in zip(PROMPTS, CHOSEN, REJECTED, strict=True):
        with torch.no_grad():
            new = [logprob_alone(policy, prompt, side).item() for side in (chosen, rejected)]
            old = [logprob_alone(reference, prompt, side).item() for side in (chosen, rejected)]
        c, r = 0.3 * (new[0] - old[0]), 0.3 * (new[1] - old[1])
        row = {"accuracy": float(c > r), "reward_chosen": c, "reward_rejected": r, "reward_margin": c - r}
        row |= {"logprob_chosen": new[0], "logprob_rejected": new[1], "loss": math.log1p(math.exp(r - c))}
        expected = {name: value + row[name] for name, value in expected.items()}
    assert figures | {"loss": loss.item()} == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_the_policy_is_its_own_reference_at_first_and_every_reward_is_exactly_zero():
    model = tiny_lm("llama")
    dpo = objective(model)
    loss, figures = dpo.losses([0, 1, 2])  # the batch that the reference was measured in
    assert figures["reward_margin"] == figures["reward_chosen"] == figures["reward_rejected"] == 0.0
    assert loss.item() == pytest.approx(3 * math.log(2), rel=1e-6)
    assert figures["accuracy"] == 1.5


def test_the_reference_is_measured_once_and_stays_when_the_policy_moves():
    model = tiny_lm("gpt2")
    dpo = objective(model)
    before = dpo._reference_N2.clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05
    assert dpo.losses([0])[1]["reward_chosen"] != 0.0
    assert torch.equal(dpo._reference_N2, before)


def test_the_gradient_agrees_with_finite_differences_of_the_papers_formula():
    policy, reference = tiny_lm("gpt2", seed=1).double(), tiny_lm("gpt2").double()
    dpo = objective(policy, reference, beta=0.5)
    dpo.losses([0, 1, 2, 3])[0].backward()
    weight = policy.transformer.h[1].mlp.c_fc.weight
    got = weight.grad[2, 3].item()
    ends = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            weight[2, 3] += step
            ends.append(dpo.losses([0, 1, 2, 3])[0].item())
            weight[2, 3] -= step
    assert got == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)
    assert abs(got) > 1e-4


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_a_step_does_not_depend_on_its_micro_batches(micro):
    moved = []
    for size in (4, micro):
        model = tiny_lm("gpt2", seed=1).double()
        dpo = objective(model, tiny_lm("gpt2").double())
        state = SupervisedState(model, torch.optim.SGD(model.parameters(), lr=0.0))
        config = TrainingConfig(batch_size=4, micro_batch_size=size)
        moved.append((supervised_step(state, [0, 1, 2, 3], dpo, config, 0.1), snapshot(model)))
    assert moved[0][0] == pytest.approx(moved[1][0], rel=1e-12)
    for name in moved[0][1]:
        torch.testing.assert_close(moved[0][1][name], moved[1][1][name], rtol=0, atol=1e-13)


def test_a_step_logs_every_metric_of_its_table():
    model = tiny_lm("gpt2")
    state = SupervisedState(model, adamw(model.parameters(), lr=0.0, beta2=0.99, eps=1e-8, weight_decay=0.0))
    figures = supervised_step(state, [0, 1, 2, 3], objective(model), TrainingConfig(), 1e-3)
    assert stage_row(1, figures, DPO_METRICS)["nonfinite"] == []


@pytest.mark.parametrize("settings", [{}, {"loss": "ipo"}, {"label_smoothing": 0.1}])
def test_it_learns_the_preferences_and_leaves_ties_alone(settings):
    model = tiny_lm("llama")
    dpo = objective(model, ties=[0.0, 0.0, 0.0, 1.0], **settings)
    state = SupervisedState(model, adamw(model.parameters(), lr=0.0, beta2=0.99, eps=1e-8, weight_decay=0.0))
    for _ in range(40):
        supervised_step(state, [0, 1, 2, 3], dpo, TrainingConfig(), 3e-3)
    margins = [dpo.losses([row])[1]["reward_margin"] for row in range(4)]
    assert min(margins[:3]) > 0.3
    assert abs(margins[3]) < 0.5 * min(margins[:3])


def test_bfloat16_stays_near_float32():
    model, reference = tiny_lm("gpt2", seed=1), tiny_lm("gpt2")
    exact, rough = (
        objective(model, reference, dtype=dtype).losses([0, 1])[0].item() for dtype in ("float32", "bfloat16")
    )
    assert 0 < abs(exact - rough) < 0.05


@pytest.mark.parametrize(
    ("columns", "message"),
    [(([], [], []), "0 prompts"), ((PROMPTS, CHOSEN[:2], REJECTED), "4 prompts, 2 chosen and 4 rejected")],
)
def test_columns_that_do_not_fit_are_refused(columns, message):
    with pytest.raises(ValueError, match=message):
        DPOObjective(tiny_lm("gpt2"), *columns, DPOLossConfig(), pad_id=PAD)


def test_a_broken_reference_is_named_by_its_pair():
    reference = tiny_lm("gpt2")
    with torch.no_grad():
        reference.transformer.wte.weight[7] = math.nan
    with pytest.raises(ValueError, match="the reference gives pair 0 a log-prob that is not finite"):
        objective(tiny_lm("gpt2"), reference)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "dpo.beta is 0.0; it must be greater than 0"),
        ({"label_smoothing": 0.5}, r"dpo.label_smoothing is 0.5; it must lie in \[0, 0.5\)"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "belongs to the loss sigmoid"),
        ({"beta": math.nan}, "beta is nan"),
    ],
)
def test_options_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        DPOLossConfig(**settings)


# -- the closed form ---------------------------------------------------------------------------------------------------


def test_the_optimum_is_the_policy_whose_reward_explains_the_preferences():
    """Preferences drawn from a reward r by Bradley–Terry: at the loss's minimum π ∝ π_ref exp(r/β) (eq. 4 and 5)."""
    beta, reward = 0.5, torch.tensor([0.0, 0.7, -0.4, 1.1], dtype=torch.float64)
    reference = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64).log()
    theta = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )
    pairs = [(a, b) for a in range(4) for b in range(4) if a != b]
    chances = torch.stack([torch.sigmoid(reward[a] - reward[b]) for a, b in pairs])

    def closure():
        optimizer.zero_grad()
        x = theta.log_softmax(0) - reference
        losses = [dpo_loss((x[a] - x[b])[None], torch.zeros(1), beta=beta) for a, b in pairs]
        loss = (chances * torch.stack(losses)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = (reference + reward / beta).softmax(0)
    torch.testing.assert_close(theta.softmax(0).detach(), expected, rtol=1e-7, atol=0)


# -- the command -------------------------------------------------------------------------------------------------------

TINY_TRAINING = (
    *("--threads", "1", "--device", "cpu", "--seed", "3", "--training.steps", "4", "--training.batch-size", "4"),
    *("--training.micro-batch-size", "2", "--training.save-every", "2"),
)


@pytest.fixture
def base_model(tmp_path):
    tokenizer = word_tokenizer(["good", "bad", "fine", "film", "the", "is", "a"])
    tiny_lm("llama").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def write_pairs(folder, count=30):
    words = ["film", "the film", "a film", "the", "a"]
    rows = [
        {"prompt": " ".join([words[n % 5]] * (1 + n // 5)), "chosen": "is good", "rejected": "is bad fine"}
        for n in range(count)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "pairs.jsonl"


def test_the_command_trains_logs_evaluates_and_exports(tmp_path, base_model):
    options = ("--data", write_pairs(tmp_path), "--model.path", base_model, "--runs", tmp_path / "runs", *TINY_TRAINING)
    first = run_command("dpo", *options, "--name", "a")
    assert first.code == 0, first.err
    assert "held-out pairs" in first.out
    run = tmp_path / "runs" / "a"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[0].keys() == {metric.name for metric in DPO_METRICS} | {"step", "nonfinite"}
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[-1]["reward_margin"] > rows[0]["reward_margin"]
    assert json.loads((run / "evaluation.json").read_text())["held_out"]["pairs"] > 0
    again = run_command("dpo", *options, "--name", "b")
    assert again.code == 0
    assert (run / "metrics.jsonl").read_bytes() == (tmp_path / "runs" / "b" / "metrics.jsonl").read_bytes()
    out = run_command("export", run, tmp_path / "exported")
    assert out.code == 0, out.err
    assert "DPO" in (tmp_path / "exported" / "README.md").read_text()


def test_a_run_that_was_cut_off_continues_to_the_same_bytes(tmp_path, base_model):
    options = ("--data", write_pairs(tmp_path), "--model.path", base_model, "--runs", tmp_path / "runs", *TINY_TRAINING)
    for name in ("whole", "cut"):
        assert run_command("dpo", *options, "--name", name).code == 0
    whole, cut = tmp_path / "runs" / "whole", tmp_path / "runs" / "cut"
    shutil.rmtree(cut / "checkpoints" / "step_000004")
    shutil.rmtree(cut / "model")
    resumed = run_command("dpo", "--resume", "--name", "cut", "--runs", tmp_path / "runs")
    assert resumed.code == 0, resumed.err
    assert (cut / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert (cut / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()


def test_what_is_missing_is_said_in_one_line(tmp_path):
    data = write_pairs(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "film", "chosen": "is good"}\n')
    for options, message in (
        (("--data", data), "--model.path is missing; DPO starts from a language model"),
        ((), "--data is missing"),
        (("--data", data, "--model.path", tmp_path / "none"), "none"),
    ):
        outcome = run_command("dpo", *options, "--runs", tmp_path / "runs")
        assert outcome.code == 2
        assert message in outcome.err
        assert outcome.err.count("\n") == 1
