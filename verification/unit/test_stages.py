"""`rlhf sft` and `rlhf reward`: what is learned, that a split of the batch changes nothing, and resuming to the bit."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from pipeline_data import COMMON, MODEL, TRAINING, preferences, write_rows
from safetensors.torch import load_file
from tiny_models import PAD, snapshot, tiny_lm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_core import runlog
from rlhf_core.data.dataset import Rows
from rlhf_core.data.token_store import TokenWriter
from rlhf_core.data.tokenization import byte_pair_tokenizer
from rlhf_core.optim import adamw
from rlhf_core.policy import load_model
from rlhf_core.reward_model import PairObjective, load_reward_model, new_reward_model, save_reward_model
from rlhf_core.sft import CompletionObjective
from rlhf_core.stage_config import PreferenceConfig, TrainingConfig
from rlhf_core.supervised import SupervisedState, number_of_steps, supervised_step, width_rate
from rlhf_core.testing.assertions import assert_runs_identical
from rlhf_core.testing.command import run_command

PROMPTS = [[5, 6], [], [7, 3, 9], [8]]
COMPLETIONS = [[4, 4, 0], [2, 5, 0], [6, 0], [3, 3, 3, 3]]


def rows_of(folder, columns, numbers=()):
    with TokenWriter(folder, list(columns), len(numbers)) as writer:
        for place in range(len(PROMPTS)):
            row = {name: column[place] for name, column in columns.items()}
            writer.add(row, [column[place] for column in numbers])
    return Rows(folder, np.arange(len(PROMPTS)))


@pytest.fixture
def demonstrations(tmp_path):
    return rows_of(tmp_path / "d", {"prompt": PROMPTS, "completion": COMPLETIONS})


@pytest.fixture
def pairs(tmp_path):
    rejected = [[2, 0], [3, 3, 3, 0], [9, 9, 0], [0]]
    prompts = [prompt or [2] for prompt in PROMPTS]
    columns = {"prompt": prompts, "chosen": COMPLETIONS, "rejected": rejected}
    return rows_of(tmp_path / "p", columns, ([0.0, 0.5, 0.0, 0.0], [0, 0, 0, 1]))


def step_with(objective, micro_batch_size, **options):
    config = TrainingConfig(batch_size=4, micro_batch_size=micro_batch_size, max_grad_norm=1e9, **options)
    optimizer = adamw(objective.model.parameters(), lr=0.0, beta2=0.99, eps=1e-8, weight_decay=0.0)
    state = SupervisedState(objective.model, optimizer)
    return supervised_step(state, [0, 1, 2, 3], objective, config, 1e-2)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_only_completions_are_learned_and_their_loss_is_the_mean_over_their_tokens(architecture, demonstrations):
    model = tiny_lm(architecture)
    total, count, right = 0.0, 0, 0
    with torch.no_grad():
        for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
            ids = torch.tensor([prompt + completion])
            logprobs = model(input_ids=ids).logits[0].double().log_softmax(-1)
            for place in range(max(1, len(prompt)), ids.shape[1]):
                total -= float(logprobs[place - 1, ids[0, place]])
                right += int(logprobs[place - 1].argmax() == ids[0, place])
                count += 1
    assert count == 3 + 2 + 2 + 4
    objective = CompletionObjective(model, demonstrations, PAD, "float32")
    assert objective.lengths() == [5, 3, 5, 5]
    found = objective.evaluate(3, lambda done: None)
    assert (found["rows"], found["tokens"]) == (4, count)
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["token_accuracy"] == pytest.approx(right / count)
    assert step_with(objective, 4)["loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_a_split_into_micro_batches_changes_only_rounding(demonstrations, pairs, micro_batch_size):
    def after(kind, size):
        model = tiny_lm("llama")
        if kind == "sft":
            objective = CompletionObjective(model, demonstrations, PAD, "float32")
        else:
            objective = PairObjective(new_reward_model(model), pairs, PAD, "float32", PreferenceConfig(centering=0.1))
        return step_with(objective, size), snapshot(objective.model)

    for kind in ("sft", "reward"):
        (whole, weights), (split, split_weights) = after(kind, 4), after(kind, micro_batch_size)
        assert split["loss"] == pytest.approx(whole["loss"], rel=1e-5)
        assert split["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)
        # Adam's first step is the sign of the gradient, so only gradients near 0 could tell them apart.
        assert all(torch.allclose(weights[name], split_weights[name], atol=2e-4) for name in weights)


def test_a_new_reward_model_knows_nothing_and_the_language_model_stays(pairs):
    lm = tiny_lm("llama")
    before = snapshot(lm)
    objective = PairObjective(new_reward_model(lm), pairs, PAD, "float32", PreferenceConfig(margin_scale=0.0))
    figures = step_with(objective, 4)
    assert figures["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert (figures["accuracy"], figures["gap_mean"]) == (0.5, 0.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in lm.state_dict().items())


def test_the_loss_of_pairs_is_that_of_rewards_read_one_by_one_at_the_last_token(pairs):
    model = new_reward_model(tiny_lm("gpt2"))
    with torch.no_grad():
        model.model.score.weight.normal_(0.0, 1.0, generator=torch.Generator().manual_seed(1))

    def reward(ids):
        return float(model(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64)).detach())

    columns = [pairs.column(name) for name in ("prompt", "chosen", "rejected")]
    rewards = [(reward(p + c), reward(p + r)) for p, c, r in zip(*columns, strict=True)]
    d = [c - r for c, r in rewards]
    d[1] -= 2.0 * 0.5
    losses = [math.log1p(math.exp(-x)) for x in d]
    losses[3] = (math.log1p(math.exp(-d[3])) + math.log1p(math.exp(d[3]))) / 2
    losses = [one + 0.25 * (c + r) ** 2 for one, (c, r) in zip(losses, rewards, strict=True)]
    objective = PairObjective(model, pairs, PAD, "float32", PreferenceConfig(margin_scale=2.0, centering=0.25))
    judged = objective.judge(3, lambda done: None)
    assert judged.chosen.tolist() == pytest.approx([c for c, _ in rewards], abs=1e-5)
    assert judged.rejected.tolist() == pytest.approx([r for _, r in rewards], abs=1e-5)
    assert (judged.tie.tolist(), judged.chosen_length.tolist()) == ([0, 0, 0, 1], [3, 3, 2, 4])
    assert step_with(objective, 2)["loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(demonstrations):
    model = tiny_lm("llama")
    with torch.no_grad():
        next(model.parameters())[0, 0] = math.inf
    before = snapshot(model)
    with pytest.raises(FloatingPointError, match=r"step 1: the loss is nan; lower --training\.learning-rate"):
        step_with(CompletionObjective(model, demonstrations, PAD, "float32"), 4)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_steps_and_rates():
    assert number_of_steps(TrainingConfig(epochs=2, batch_size=8), 20) == 4  # two whole batches an epoch
    assert number_of_steps(TrainingConfig(batch_size=8), 3) == 1
    assert number_of_steps(TrainingConfig(steps=7), 3) == 7
    assert width_rate(None, 3e-3, 96) == 3e-3
    assert width_rate(None, 3e-3, 192) == 1.5e-3
    assert width_rate(1e-5, 3e-3, 192) == 1e-5


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", preferences())


def options_of(stage, data):
    return (*COMMON, *MODEL, *TRAINING, "--data", data, "--held-out", "0.3")


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """The runs of both stages."""
    runs = tmp_path_factory.mktemp("stages")
    for stage in ("sft", "reward"):
        outcome = run_command(stage, *options_of(stage, data), "--runs", runs, "--name", stage)
        assert outcome.code == 0, outcome.err
    return runs


def assert_same_result(run_a, run_b):
    assert_runs_identical(run_a, run_b)
    for name in (
        "model/manifest.json",
        "evaluation.json",
        "checkpoints/step_000006/manifest.json",
        "data/manifest.json",
    ):
        assert (run_a / name).read_bytes() == (run_b / name).read_bytes(), name


@pytest.mark.parametrize("stage", ["sft", "reward"])
class TestCommand:
    def test_it_leaves_a_model_that_transformers_loads_and_a_log_of_every_step(self, finished, stage):
        run = finished / stage
        kind = AutoModelForCausalLM if stage == "sft" else AutoModelForSequenceClassification
        model, loaded = kind.from_pretrained(run / "model", output_loading_info=True)
        assert not loaded["missing_keys"]
        assert not loaded["unexpected_keys"]
        assert AutoTokenizer.from_pretrained(run / "model").eos_token == "<eos>"
        assert [row["step"] for row in runlog.read(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
        assert len(list(runlog.read(run / "timings.jsonl"))) == 6
        assert "held_out" in json.loads((run / "evaluation.json").read_text())
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [f"step_00000{n}" for n in (0, 4, 6)]
        load = load_model if stage == "sft" else load_reward_model
        assert load(run, "eager") is not None  # a run's folder names its model
        assert model.config.pad_token_id == 1

    def test_the_same_seed_gives_the_same_bytes_from_every_form_of_the_data(self, finished, stage, data, tmp_path):
        import pyarrow
        import pyarrow.parquet

        path = tmp_path / "pairs.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(preferences()), path)
        outcome = run_command(stage, *options_of(stage, path), "--runs", tmp_path, "--name", "again")
        assert outcome.code == 0, outcome.err
        assert_same_result(finished / stage, tmp_path / "again")

    def test_a_signal_saves_and_resume_ends_in_the_same_bytes_without_the_source(
        self, finished, stage, data, tmp_path, monkeypatch
    ):
        append = runlog.append

        def append_and_signal(path, rows):
            rows = list(rows)
            append(path, rows)
            if path.name == "metrics.jsonl" and rows[0]["step"] == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(runlog, "append", append_and_signal)
        source = shutil.copy(data, tmp_path / "pairs.jsonl")
        arguments = (stage, *options_of(stage, source), "--runs", tmp_path, "--name", "mine")
        outcome = run_command(*arguments)
        assert outcome.code == 143
        assert "stopped after step 3 of 6, saved; continue with: rlhf " + stage in outcome.complaint
        monkeypatch.setattr(runlog, "append", append)
        source.unlink()
        outcome = run_command(stage, "--resume", "--name", "mine", "--runs", tmp_path)
        assert outcome.code == 0, outcome.err
        assert "continuing after step 3" in outcome.out
        assert_same_result(finished / stage, tmp_path / "mine")

    def test_a_damaged_checkpoint_and_a_damaged_store_are_passed_over_and_made_again(
        self, finished, stage, data, tmp_path
    ):
        shutil.copytree(finished / stage, tmp_path / "mine", symlinks=True)
        for name in ("checkpoints/step_000006/optimizer.safetensors", "data/prompt.ids"):
            with (tmp_path / "mine" / name).open("ab") as file:
                file.write(b"x")
        outcome = run_command(stage, "--resume", "--name", "mine", "--runs", tmp_path)
        assert outcome.code == 0, outcome.err
        assert "checkpoint passed over" in outcome.out
        assert "continuing after step 4" in outcome.out
        assert "pairs.jsonl: 60 rows" in " ".join(outcome.out.split())
        assert_same_result(finished / stage, tmp_path / "mine")

    def test_a_log_that_is_shorter_than_the_checkpoint_is_refused(self, finished, stage, tmp_path):
        shutil.copytree(finished / stage, tmp_path / "mine", symlinks=True)
        runlog.keep_through_step(tmp_path / "mine" / "metrics.jsonl", 5)
        outcome = run_command(stage, "--resume", "--name", "mine", "--runs", tmp_path)
        assert outcome.code == 2
        assert "metrics.jsonl ends at step 5, and the checkpoint is of step 6; put the missing" in outcome.complaint

    def test_a_model_that_was_changed_in_the_configuration_is_refused(self, finished, stage, tmp_path):
        shutil.copytree(finished / stage, tmp_path / "mine", symlinks=True)
        config = json.loads((tmp_path / "mine" / "config.json").read_text())
        config["model"]["hidden_size"] = 24
        (tmp_path / "mine" / "config.json").write_text(json.dumps(config))
        outcome = run_command(stage, "--resume", "--name", "mine", "--runs", tmp_path)
        assert outcome.code == 2
        assert re.search(r"model\.safetensors is of another model: .*; was the run's config\.json", outcome.complaint)


KILLED = """
import os, signal, sys
from rlhf_core import cli, runlog
append = runlog.append
def die(path, rows):
    rows = list(rows)
    if path.name == "metrics.jsonl" and rows[0]["step"] == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    append(path, rows)
runlog.append = die
cli.main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_kill_9_and_resume_end_in_the_same_bytes(stage, data, tmp_path):
    def real(program, *arguments):
        command = [sys.executable, "-c", program, *map(str, arguments), "--runs", str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    plain = "import sys\nfrom rlhf_core import cli\ncli.main(sys.argv[1:])"
    whole = real(plain, stage, *options_of(stage, data), "--name", "whole")
    assert whole.returncode == 0, whole.stderr
    assert real(KILLED, stage, *options_of(stage, data), "--name", "killed").returncode == -signal.SIGKILL
    resumed = real(plain, stage, "--resume", "--name", "killed")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_result(tmp_path / "whole", tmp_path / "killed")


def test_sft_learns_the_completions(tmp_path, data):
    options = ("--training.steps", "60", "--training.learning-rate", "0.01")
    outcome = run_command("sft", *options_of("sft", data), *options, "--runs", tmp_path, "--name", "mine")
    assert outcome.code == 0, outcome.err
    rows = list(runlog.read(tmp_path / "mine" / "metrics.jsonl"))
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]


def test_a_reward_model_learns_to_tell_good_from_bad(tmp_path, data):
    options = ("--training.steps", "60", "--training.learning-rate", "0.01")
    outcome = run_command("reward", *options_of("reward", data), *options, "--runs", tmp_path, "--name", "mine")
    assert outcome.code == 0, outcome.err
    report = json.loads((tmp_path / "mine" / "evaluation.json").read_text())["held_out"]
    assert report["accuracy"] == 1.0
    assert "expected calibration error" in outcome.out
    assert load_file(tmp_path / "mine" / "model" / "model.safetensors")["score.weight"].abs().sum() > 0


def test_transformers_own_forward_gives_the_same_reward(finished):
    ours = load_reward_model(finished / "reward", "eager")
    theirs = AutoModelForSequenceClassification.from_pretrained(finished / "reward" / "model")
    tokenizer = AutoTokenizer.from_pretrained(finished / "reward" / "model")
    texts = ["film 1 was good", "film was bad ."]
    rows = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    for row in rows:
        ids = torch.tensor([row])
        assert ours(ids, torch.ones_like(ids)).item() == pytest.approx(theirs(ids).logits.item(), abs=1e-6)


def test_a_reward_model_whose_padding_is_its_end_is_read_right_by_transformers_too(tmp_path):
    tokenizer = byte_pair_tokenizer(["film"], 270)
    tokenizer.pad_token = tokenizer.eos_token
    made = new_reward_model(tiny_lm("gpt2", vocabulary=len(tokenizer)))
    with torch.no_grad():
        made.model.score.weight.normal_(0.0, 1.0, generator=torch.Generator().manual_seed(1))
    save_reward_model(made, tokenizer, tmp_path / "judge")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "judge")
    ids = torch.tensor([[5, 6, 7, tokenizer.eos_token_id]])
    assert theirs(ids).logits.item() == pytest.approx(made(ids, torch.ones_like(ids)).item(), abs=1e-6)


def test_dialogues_need_no_model_with_a_chat_template(tmp_path):
    def dialogue(number, answer):
        return [{"role": "user", "content": f"film {number}?"}, {"role": "assistant", "content": answer}]

    rows = [{"chosen": dialogue(n, f"good {n}"), "rejected": dialogue(n, f"bad {n}")} for n in range(12)]
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    outcome = run_command("sft", *COMMON, *MODEL, *TRAINING, "--data", data, "--runs", tmp_path / "runs", "--name", "s")
    assert outcome.code == 0, outcome.err
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "runs" / "s" / "model")
    prompt = tokenizer.apply_chat_template(dialogue(3, "")[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "\n\nHuman: film 3?\n\nAssistant:"


@pytest.mark.parametrize(
    ("command", "rows", "options", "message"),
    [
        ("sft", None, (), "--data is missing; give a data file"),
        ("reward", [{"prompt": "p", "completion": "c"}], (), r"pairs\.jsonl:1: no preference: .*; correct the row, or"),
        ("sft", [{"prompt": "p"}], (), r"pairs\.jsonl:1: no completion"),
        (
            "sft",
            [{"prompt": "p"}],
            ("--data-errors", "skip"),
            r"no row of the data can be used: .*1 no completion, .*; correct the rows: the first is .*jsonl:1",
        ),
        ("sft", [{"prompt": "p", "completion": 3}], (), r"pairs\.jsonl:1: wrong type: completion is 3 \(int\)"),
        ("sft", [{"messages": [{"role": "user", "content": "x"}]}], (), r"pairs\.jsonl:1: no completion"),
        ("sft", [], (), "0 rows: .*; give a source that holds rows"),
        ("sft", [{"prompt": "p", "completion": "c"}], ("--data-errors", "warn"), "'warn'"),
        ("sft", [{"prompt": "p", "completion": "c"}], ("--held-out", "1"), "held_out is 1.0; it must lie in"),
        ("sft", [{"prompt": "p", "completion": "c"}], ("--training.steps", "0"), "training.steps is 0; it must be"),
        ("sft", [{"prompt": "p", "completion": "c"}], ("--model.path", "/none/m"), "no model folder '/none/m'"),
        (
            "reward",
            [{"prompt": "p", "chosen": "c", "rejected": "r"}],
            ("--held-out", "0.999999"),
            "or a smaller --held",
        ),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, command, rows, options, message):
    data = () if rows is None else ("--data", write_rows(tmp_path / "pairs.jsonl", rows))
    outcome = run_command(command, *COMMON, *MODEL, *data, *options, "--runs", tmp_path / "runs")
    assert outcome.code == 2
    assert re.search(message, outcome.complaint), outcome.complaint
    assert not (tmp_path / "runs").exists()
