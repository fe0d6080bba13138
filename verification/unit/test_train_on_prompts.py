"""`rlhf train` on prompts from files with given rewards, on labelled rows, and resuming from elsewhere."""

import json
import re
import shutil
import sys

import pytest
from pipeline_data import COMMON, PPO, write_rows
from tiny_models import tiny_lm

from rlhf_core import policy, runlog
from rlhf_core.data import reviews
from rlhf_core.data.tokenization import byte_pair_tokenizer, word_tokenizer
from rlhf_core.reward_model import new_reward_model, save_reward_model
from rlhf_core.testing.assertions import assert_runs_differ, assert_runs_identical
from rlhf_core.testing.command import TINY_RUN, run_command

SOURCE = """
import os

def length(prompts, completions):
    return [len(text) for text in completions]

def worse(prompts, completions):
    return [1.0]

def moves(prompts, completions):
    os.chdir("/")
    return length(prompts, completions)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A policy, a reward model, prompts in three forms, and a reward function."""
    folder = tmp_path_factory.mktemp("train")
    tokenizer = byte_pair_tokenizer(["film"], 270)
    tiny_lm("llama", vocabulary=len(tokenizer)).save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    save_reward_model(new_reward_model(tiny_lm("gpt2", vocabulary=len(tokenizer))), tokenizer, folder / "judge")
    prompts = [f"film {number}" for number in range(30)]
    write_rows(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    pairs = [{"prompt": prompt, "chosen": "a", "rejected": "b"} for prompt in prompts for _ in range(2)]
    write_rows(folder / "pairs.jsonl", pairs)
    (folder / "kit_rewards.py").write_text(SOURCE)
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path / "place"


def train(name, *options, data="prompts.jsonl"):
    rest = ("--log.evaluation-prompts", "3", "--held-out", "0.2", "--name", name)
    return run_command("train", *COMMON, *PPO, *rest, "--data", data, *options)


TWO = ("--model.path", "policy", "--reward", "kit_rewards:length=0.5", "--reward", "judge=2")


def test_prompts_and_weighted_rewards_train_and_the_parts_are_in_the_samples(place):
    outcome = train("a", *TWO)
    assert outcome.code == 0, outcome.err
    assert "30 rows" in outcome.out
    assert "weighted sum" in outcome.out
    for row in runlog.read_samples(place / "runs" / "a"):
        assert row["rewards"] == {"kit_rewards:length": len(row["completion"]), "judge": 0.0}
        assert row["reward"] == 0.5 * len(row["completion"])


def test_the_prompts_of_preferences_are_the_same_prompts(place):
    assert train("a", *TWO).code == 0
    outcome = train("b", *TWO, data="pairs.jsonl")
    assert outcome.code == 0, outcome.err
    assert "30 repeated and left out" in outcome.out
    assert_runs_identical(place / "runs" / "a", place / "runs" / "b")


@pytest.fixture
def interrupted(place, monkeypatch):
    """The runs ``whole`` and, ended in its second step, ``half``."""
    assert train("whole", *TWO, "--ppo.steps", "3").code == 0
    append = runlog.append

    def full(path, rows):
        if path.name == "timings.jsonl" and rows[0]["step"] == 2:
            raise OSError(28, "No space left on device", str(path))
        append(path, rows)

    monkeypatch.setattr(runlog, "append", full)
    outcome = train("half", *TWO, "--ppo.steps", "3")
    assert outcome.code == 2, outcome
    monkeypatch.setattr(runlog, "append", append)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Another working directory."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "elsewhere"


def test_a_run_resumed_in_another_folder_finds_what_was_named_and_needs_the_data_no_more(place, interrupted, elsewhere):
    (place / "prompts.jsonl").write_text("")
    outcome = run_command("train", "--resume", "--name", "half", "--runs", place / "runs")
    assert outcome.code == 0, outcome.err
    assert_runs_identical(place / "runs" / "whole", place / "runs" / "half")


def test_a_resumed_run_needs_the_folder_of_its_model_no_more(place, interrupted):
    shutil.rmtree(place / "policy")
    outcome = run_command("train", "--resume", "--name", "half")
    assert outcome.code == 0, outcome.err
    assert_runs_identical(place / "runs" / "whole", place / "runs" / "half")


def test_a_reward_module_of_the_same_name_in_the_folder_of_a_resume_does_not_stand_in(
    place, interrupted, elsewhere, monkeypatch
):
    (elsewhere / "kit_rewards.py").write_text("def length(prompts, completions): return [9.0] * len(completions)")
    monkeypatch.delitem(sys.modules, "kit_rewards")
    outcome = run_command("train", "--resume", "--name", "half", "--runs", place / "runs")
    assert outcome.code == 0, outcome.err
    assert_runs_identical(place / "runs" / "whole", place / "runs" / "half")


def test_resume_may_repeat_its_rewards_and_refuses_others(place):
    assert train("a", *TWO).code == 0
    assert run_command("train", "--resume", "--name", "a", *TWO).code == 0
    outcome = run_command("train", "--resume", "--name", "a", "--reward", "judge")
    assert outcome.code == 2
    assert "the recorded run, in which reward is ('kit_rewards:length=0.5', 'judge=2')" in outcome.complaint


def test_a_run_and_its_config_file_give_the_same_bytes(place):
    assert train("a", *TWO).code == 0
    outcome = run_command("train", "--config", "runs/a/config.json", "--name", "b")
    assert outcome.code == 0, outcome.err
    assert_runs_identical(place / "runs" / "a", place / "runs" / "b")


def test_the_named_model_is_read_once(place, monkeypatch):
    load, read = policy.load_pretrained, []
    monkeypatch.setattr(
        policy, "load_pretrained", lambda kind, path, *rest: read.append(str(path)) or load(kind, path, *rest)
    )
    assert train("a", "--model.path", "policy", "--reward", "kit_rewards:length").code == 0
    assert read == ["policy"]


def test_a_reward_model_with_another_tokenizer_reads_the_text_anew(place):
    words = word_tokenizer(["film", "0"])
    save_reward_model(new_reward_model(tiny_lm("llama", vocabulary=len(words))), words, place / "other")
    outcome = train("a", "--model.path", "policy", "--reward", "other")
    assert outcome.code == 0, outcome.err


def test_a_reward_model_reads_the_last_tokens_of_what_is_too_long_for_it(place):
    tokenizer = byte_pair_tokenizer(["film"], 270)
    short = tiny_lm("gpt2", vocabulary=len(tokenizer), context=4)
    save_reward_model(new_reward_model(short), tokenizer, place / "short")
    outcome = train("a", "--model.path", "policy", "--reward", "short")
    assert outcome.code == 0, outcome.err


def test_a_run_without_a_model_is_named_as_such(place):
    assert train("a", *TWO).code == 0
    shutil.rmtree(place / "runs" / "a" / "checkpoints")
    outcome = train("b", "--model.path", "runs/a", "--reward", "kit_rewards:length")
    assert outcome.code == 2
    assert "run 'runs/a' has made no model yet; continue it with --resume" in outcome.complaint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model.path", "policy"), "nothing scores their completions; give --reward"),
        (("--reward", "kit_rewards:length"), "no policy completes them; give --model.path"),
        (("--model.path", "policy", "--reward", "kit_rewards:none"), "kit_rewards has no 'none'"),
        (("--model.path", "policy", "--reward", "policy"), "'policy' is no reward model .*score.weight"),
        (("--model.path", "policy", "--reward", "judge", "--reward", "judge=2"), "there are two rewards 'judge'"),
        (
            ("--model.path", "policy", "--reward", "judge", "--reward-timeout-s", "0"),
            "reward_timeout_s is 0.0; it must",
        ),
        (("--model.path", "policy", "--reward", "judge", "--sampling.max-new-tokens", "31"), "prompt too long"),
        (("--model.path", "policy", "--reward", "judge", "--pretrain.steps", "1"), "prompts give nothing to read"),
    ],
)
def test_what_does_not_fit_together_is_named(place, options, message):
    outcome = train("a", *options)
    assert outcome.code == 2
    assert re.search(message, outcome.complaint), outcome.complaint


def test_a_reward_that_fails_names_the_function_and_how_to_go_on(place):
    outcome = train("a", "--model.path", "policy", "--reward", "kit_rewards:worse")
    assert outcome.code == 2
    assert "reward function kit_rewards:worse returned 1 scores for 4 completions; put that right" in outcome.complaint
    assert "rlhf train --resume --name a" in outcome.complaint


def test_a_reward_function_that_changes_the_working_directory_loses_nothing(place):
    outcome = train("a", "--model.path", "policy", "--reward", "kit_rewards:moves", "--ppo.steps", "2")
    assert outcome.code == 0, outcome.err
    assert [row["step"] for row in runlog.read(place / "runs" / "a" / "metrics.jsonl")] == [1, 2]
    assert (place / "runs" / "a" / "checkpoints" / "step_000002").is_dir()


def test_labelled_rows_are_labelled_sentences(tmp_path):
    folder, rows = tmp_path / "folder", []
    folder.mkdir()
    for suffix, word, label in (("pos", "good", 1), ("neg", "bad", 0)):
        lines = [f"the film number {number} of this year was really {word} ." for number in range(60)]
        (folder / f"a.{suffix}").write_text("\n".join(lines) + "\n")
        rows += [{"text": line, "label": label} for line in lines]
    write_rows(tmp_path / "rows.jsonl", rows)
    small = (*TINY_RUN, "--model.vocabulary", "300", "--classifier.steps", "2", "--ppo.steps", "1")
    for name, data in (("a", folder), ("b", tmp_path / "rows.jsonl")):
        outcome = run_command("train", *small, "--data", data, "--runs", tmp_path, "--name", name)
        assert outcome.code == 0, outcome.err
    assert_runs_identical(tmp_path / "a", tmp_path / "b")


def test_data_none_is_the_embedded_task_and_a_reward_function_may_replace_its_own(
    place, finished_run, reviews_drawn_once, monkeypatch
):
    outcome = run_command("train", *TINY_RUN, "--data", "None", "--name", "a")
    assert outcome.code == 0, outcome.err
    assert_runs_identical(finished_run, place / "runs" / "a")
    outcome = run_command("train", *TINY_RUN, "--ppo.steps", "1", "--reward", "kit_rewards:length", "--name", "b")
    assert outcome.code == 0, outcome.err
    assert assert_runs_differ(finished_run, place / "runs" / "b").name == "adv_var"


def test_resuming_draws_no_sentences(finished_run, tmp_path, monkeypatch):
    shutil.copytree(finished_run, tmp_path / "copy", symlinks=True)

    def refuse(*arguments):
        raise AssertionError("the sentences were drawn, though the language model is there")

    monkeypatch.setattr(reviews, "generate", refuse)
    outcome = run_command("train", "--resume", "--name", "copy", "--runs", tmp_path)
    assert outcome.code == 0, outcome.err


def test_the_working_directory_is_noted_beside_the_machine_and_not_in_the_configuration(place):
    assert train("a", *TWO).code == 0
    run = place / "runs" / "a"
    assert json.loads((run / "environment.json").read_text())["working_directory"] == str(place)
    for name in ("config.json", "metrics.jsonl", "samples.jsonl", "data/report.json"):
        assert str(place) not in (run / name).read_text()
