"""`rlhf pipeline` and `rlhf export`: stages are kept, resumed or done again, and what comes out loads anywhere."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from pipeline_data import COMMON, MODEL, PPO, preferences, write_rows
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_core import checkpoint, runlog
from rlhf_core.policy import load_model
from rlhf_core.testing.assertions import assert_runs_identical
from rlhf_core.testing.command import run_command

STAGES = ("sft", "reward", "ppo", "eval-sft", "eval-ppo")
OPTIONS = (
    *("pipeline", *COMMON, *MODEL, *PPO, "--held-out", "0.3"),
    *("--sft.steps", "4", "--reward-model.steps", "4", "--judging.prompts", "6", "--judging.best-of", "2"),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished pipeline ``p`` beside its data."""
    folder = tmp_path_factory.mktemp("pipeline")
    write_rows(folder / "pairs.jsonl", preferences())
    outcome = run_command(*OPTIONS, "--data", folder / "pairs.jsonl", "--runs", folder / "runs", "--name", "p")
    assert outcome.code == 0, outcome.err
    assert [line for line in outcome.out.splitlines() if line.endswith(": begins")] == [f"{s}: begins" for s in STAGES]
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy", symlinks=True)
    return tmp_path / "copy"


def again(folder, *options):
    outcome = run_command(
        *OPTIONS, "--data", folder / "pairs.jsonl", "--runs", folder / "runs", "--name", "p", *options
    )
    return outcome, states(outcome.out)


def states(out):
    """What was said of each stage, in short."""
    found = {}
    for line in out.splitlines():
        name, _, text = line.partition(": ")
        if name in STAGES:
            found[name] = "again" if text.endswith("done again") else text.split()[0]
    return [found[name] for name in STAGES]


KEPT = ["kept"] * 5


def assert_same(folder_a, folder_b):
    for stage in STAGES:
        assert_runs_identical(folder_a / "runs" / "p" / stage, folder_b / "runs" / "p" / stage)


def resume(folder):
    return run_command("pipeline", "--resume", "--name", "p", "--runs", folder / "runs")


def test_each_stage_is_a_run_and_starts_from_the_one_before(finished):
    run = finished / "runs" / "p"
    for stage in STAGES:
        assert list(runlog.read(run / stage / "metrics.jsonl"))
        assert (run / stage / "config.json").is_file()
    assert json.loads((run / "ppo" / "config.json").read_text())["model"]["path"] == "sft"  # no machine's path
    sample = next(iter(runlog.read_samples(run / "ppo")))
    assert sample["rewards"] == {"reward": sample["reward"]}
    policy = json.loads((run / "eval-sft" / "evaluation.json").read_text())
    assert policy["kl"]["mean"] == 0.0


def test_a_finished_pipeline_is_kept_whole(copied, finished):
    # The copy lies elsewhere, and its data too: content counts, and not where it is.
    outcome = resume(copied)
    assert outcome.code == 0, outcome.err
    assert states(outcome.out) == KEPT
    assert_same(finished, copied)


@pytest.mark.parametrize(
    ("name", "what", "expected"),
    [
        ("sft/model/model.safetensors", "damaged or changed", ["again", "kept", "kept", "kept", "kept"]),
        ("reward/evaluation.json", "damaged or changed", ["kept", "again", "kept", "kept", "kept"]),
        ("ppo/metrics.jsonl", "damaged or changed", ["kept", "kept", "again", "kept", "kept"]),
        ("sft/model/stray.txt", "new", ["again", "kept", "kept", "kept", "kept"]),
    ],
)
def test_a_damaged_stage_is_named_and_done_again_to_the_same_bytes(finished, copied, name, what, expected):
    with (copied / "runs" / "p" / name).open("ab") as file:
        file.write(b"x")
    outcome = resume(copied)
    assert outcome.code == 0, outcome.err
    stage, _, path = name.partition("/")
    is_new = "is new" if what == "new" else "was damaged or changed"
    assert f"{stage}: {path} {is_new}, so it is done again" in outcome.out
    # What depends on it is kept, because the same came out.
    assert states(outcome.out) == expected
    assert_same(finished, copied)


def test_a_stage_of_which_a_report_was_made_is_kept(copied):
    for made in ("ppo/report/index.html", "eval-ppo/notes.txt"):
        path = copied / "runs" / "p" / made
        path.parent.mkdir(exist_ok=True)
        path.write_text("made later")
    outcome = resume(copied)
    assert outcome.code == 0, outcome.err
    assert states(outcome.out) == KEPT
    assert path.is_file()


def test_a_missing_file_and_an_unreadable_note_are_damage_too(copied):
    (copied / "runs" / "p" / "reward" / "model" / "config.json").unlink()
    (copied / "runs" / "p" / "eval-sft" / "stage.json").write_text("{")
    outcome = resume(copied)
    assert outcome.code == 0, outcome.err
    assert "reward: model/config.json is missing, so it is done again" in outcome.out
    assert "eval-sft: has no readable stage.json, so it is done again" in outcome.out


def test_a_changed_option_redoes_its_stage_and_what_follows(finished, copied):
    outcome, found = again(copied, "--ppo.steps", "1")
    assert outcome.code == 0, outcome.err
    assert found == ["kept", "kept", "again", "kept", "again"]
    outcome, found = again(copied, "--ppo.steps", "1")
    assert found == KEPT


def test_an_option_that_a_stage_cannot_use_costs_no_finished_stage(copied):
    place = ("--data", copied / "pairs.jsonl", "--runs", copied / "runs", "--name", "p")
    outcome = run_command(*OPTIONS, *place, "--sampling.max-new-tokens", "64")
    assert outcome.code == 2
    assert "max_new_tokens is 64" in outcome.complaint
    outcome, found = again(copied)
    assert found == KEPT


def test_changed_data_redo_everything(copied):
    write_rows(copied / "pairs.jsonl", preferences(59))
    outcome, found = again(copied)
    assert outcome.code == 0, outcome.err
    assert found == ["again"] * 5


def test_resume_refuses_a_changed_option(copied):
    outcome = run_command("pipeline", "--resume", "--name", "p", "--runs", copied / "runs", "--ppo.steps", "9")
    assert outcome.code == 2
    assert "in which ppo.steps is 2 and not 9" in outcome.complaint


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_signal_in_a_stage_and_resume_end_in_the_same_bytes(finished, tmp_path, monkeypatch, stage):
    shutil.copy(finished / "pairs.jsonl", tmp_path / "pairs.jsonl")
    append = runlog.append

    def append_and_signal(path, rows):
        rows = list(rows)
        append(path, rows)
        if path.name == "metrics.jsonl" and path.parent.name == stage and rows[0]["step"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(runlog, "append", append_and_signal)
    outcome, _ = again_or_stop(tmp_path)
    assert outcome.code == 143
    assert "stopped after step 1 of" in outcome.complaint
    assert "continue with: rlhf pipeline --resume --name p" in outcome.complaint
    monkeypatch.setattr(runlog, "append", append)
    outcome = resume(tmp_path)
    assert outcome.code == 0, outcome.err
    assert f"{stage}: was interrupted and goes on" in outcome.out
    assert_same(finished, tmp_path)


def again_or_stop(folder):
    outcome = run_command(*OPTIONS, "--data", folder / "pairs.jsonl", "--runs", folder / "runs", "--name", "p")
    return outcome, None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*preferences(30), {"prompt": "p", "chosen": "c"}], r"pairs\.jsonl:31: missing keys: there is no rejected"),
        ([{"prompt": "p"}], r"pairs\.jsonl:1: no preference"),
    ],
)
def test_bad_rows_are_named_before_anything_is_trained(tmp_path, rows, message):
    write_rows(tmp_path / "pairs.jsonl", rows)
    outcome, _ = again_or_stop(tmp_path)
    assert outcome.code == 2
    assert re.search(message, outcome.complaint)
    assert not (tmp_path / "runs").exists()


class TestExport:
    def export(self, finished, run, out):
        return run_command("export", run, out, "--runs", finished / "runs")

    @pytest.mark.parametrize("run", ["p", "p/ppo", "p/sft"])
    def test_a_policy_loads_back_and_is_that_of_the_run(self, finished, tmp_path, run):
        outcome = self.export(finished, run, tmp_path / "out")
        assert outcome.code == 0, outcome.err
        model, loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not loaded["missing_keys"]
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
        source = "sft/model" if run == "p/sft" else "ppo/checkpoints/step_000002/policy"
        own = load_model(finished / "runs" / "p" / source, "eager")
        ids = tokenizer("film", return_tensors="pt", return_token_type_ids=False)
        texts = [tokenizer.decode(one.generate(**ids, max_new_tokens=8, do_sample=False)[0]) for one in (model, own)]
        assert texts[0] == texts[1] != "film"
        made = (finished / "runs" / "p" / source / "model.safetensors").read_bytes()
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == made
        checkpoint.check_folder(tmp_path / "out")

    def test_a_weight_file_is_copied_piece_by_piece(self, finished, tmp_path, monkeypatch):
        def refuse(path):
            raise AssertionError(f"{path} is read whole")

        monkeypatch.setattr(Path, "read_bytes", refuse)
        outcome = self.export(finished, "p/sft", tmp_path / "out")
        assert outcome.code == 0, outcome.err

    def test_a_reward_model_loads_back(self, finished, tmp_path):
        assert self.export(finished, "p/reward", tmp_path / "out").code == 0
        _, loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not loaded["missing_keys"]

    def test_the_card_says_what_and_how_and_names_no_machine(self, finished, tmp_path):
        assert self.export(finished, "p", tmp_path / "out").code == 0
        card = (tmp_path / "out" / "README.md").read_text()
        assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\n")
        for part in ("after 2 steps, with seed 3", "from_pretrained(folder)", "`pairs.jsonl`", "| kl |", '"steps": 2'):
            assert part in card, part
        assert str(finished) not in card
        [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        compile(code, "card", "exec")

    @pytest.mark.parametrize(
        ("run", "out", "message"),
        [
            ("none", "out", "no run 'none'"),
            ("p/eval-ppo", "out", "is an evaluation, which makes no model"),
            ("p", "full", "'.*full' exists; give a new folder to export to"),
            ("p", "full/file", "'.*file' exists; give a new folder"),
        ],
    )
    def test_bad_input_is_one_line(self, finished, tmp_path, run, out, message):
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "file").write_text("mine")
        outcome = self.export(finished, run, tmp_path / out)
        assert outcome.code == 2
        assert re.search(message, outcome.complaint)
        assert (tmp_path / "full" / "file").read_text() == "mine"
        assert not (tmp_path / "out").exists()

    def test_a_damaged_model_is_not_exported(self, copied, tmp_path):
        with (copied / "runs/p/sft/model/model.safetensors").open("ab") as file:
            file.write(b"x")
        outcome = self.export(copied, "p/sft", tmp_path / "out")
        assert outcome.code == 2
        assert "model.safetensors does not have the SHA-256 of the manifest" in outcome.complaint
        assert not (tmp_path / "out").exists()
