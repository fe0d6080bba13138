"""`rlhf eval`: best-of-n against enumeration, the summary against its rows, and continuing to the same bytes."""

import itertools
import json
import re
import shutil

import numpy as np
import pytest
import torch
from pipeline_data import COMMON, write_rows
from tiny_models import ARCHITECTURES, tiny_lm

from rlhf_core import runlog
from rlhf_core.data.tokenization import byte_pair_tokenizer
from rlhf_core.judging import JudgingInputs, best_of_n, judge_batch, judging_summary
from rlhf_core.policy import as_computed_here
from rlhf_core.reward import WeightedRewards
from rlhf_core.stage_config import EvalConfig
from rlhf_core.testing.command import run_command


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_the_mean_over_all_subsets(n):
    generator = np.random.default_rng(n)
    score, judge = generator.normal(size=(4, 5)), generator.normal(size=(4, 5))
    expected = [
        np.mean(
            [judge[row, max(subset, key=lambda at: score[row, at])] for subset in itertools.combinations(range(5), n)]
        )
        for row in range(4)
    ]
    assert best_of_n(judge, score, n) == pytest.approx(expected, rel=1e-12)


def row(prompt, draw, reward, kl, ids):
    return {
        "step": 1, "sample": draw, "prompt_row": prompt, "draw": draw, "reward": reward, "rewards": {"a": reward},
        "kl": kl, "entropy": 2.0 * len(ids), "token_ids": ids, "ended": bool(draw),
    }  # fmt: skip


def test_the_summary_counted_by_hand():
    rows = [
        row(1, 0, 4.0, 1.0, [5]),
        row(0, 0, 1.0, 0.0, [5, 6]),
        row(0, 1, 2.0, 2.0, [5, 6]),
        row(1, 1, 6.0, 3.0, [7]),
    ]
    summary = judging_summary(rows, {"a": 1.0}, 2, 0, with_kl=True)
    assert (summary["prompts"], summary["completions"]) == (2, 4)
    assert summary["rewards"]["a"]["mean"] == 3.25
    assert summary["kl"]["mean"] == 1.5
    assert summary["entropy"] == 2.0
    assert summary["response_length"]["mean"] == 1.5
    assert (summary["eos_rate"], summary["distinct_completions"], summary["distinct_bigrams"]) == (0.5, 0.75, 0.5)
    assert [(one["n"], one["rewards"]["a"]["mean"]) for one in summary["best_of"]] == [(1, 3.25), (2, 4.0)]
    assert summary["best_of"][1]["kl_bound"] == pytest.approx(0.19314718)
    assert judging_summary(rows, {"a": 1.0}, 2, 0, with_kl=False)["kl"] is None


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A policy, another one, prompts, and two reward functions in the working directory."""
    folder = tmp_path_factory.mktemp("judging")
    tokenizer = byte_pair_tokenizer(["film"], 270)
    for name, seed in (("policy", 0), ("reference", 1)):
        tiny_lm("llama", vocabulary=len(tokenizer), seed=seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    write_rows(folder / "prompts.jsonl", [{"prompt": f"film {number}"} for number in range(9)])
    source = "def length(p, c): return [len(x) for x in c]\ndef vowels(p, c): return [x.count('e') / 10 for x in c]\n"
    (folder / "kit_judges.py").write_text(source)
    return folder


OPTIONS = (
    *("eval", *COMMON, "--data", "prompts.jsonl", "--model.path", "policy", "--reference", "reference"),
    *("--reward", "kit_judges:length=0.1", "--reward", "kit_judges:vowels", "--judging.best-of", "3"),
    *("--judging.batch-size", "4", "--sampling.max-new-tokens", "5"),
)


@pytest.fixture(scope="module")
def judged(place):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        outcome = run_command(*OPTIONS, "--name", "judged")
    assert outcome.code == 0, outcome.err
    return place / "runs" / "judged"


def test_every_prompt_has_its_completions_and_the_parts_add_up(judged):
    rows = list(runlog.read_samples(judged))
    assert sorted((one["prompt_row"], one["draw"]) for one in rows) == [(p, d) for p in range(9) for d in range(3)]
    for one in rows:
        parts = one["rewards"]
        assert one["reward"] == pytest.approx(0.1 * parts["kit_judges:length"] + parts["kit_judges:vowels"], abs=1e-6)
        assert parts["kit_judges:length"] == len(one["completion"])
    assert len({tuple(one["token_ids"]) for one in rows}) > 20
    assert len(list(runlog.read(judged / "metrics.jsonl"))) == 7
    summary = json.loads((judged / "evaluation.json").read_text())
    assert list(summary["rewards"]) == ["kit_judges:length", "kit_judges:vowels", "weighted sum"]
    assert [one["n"] for one in summary["best_of"]] == [1, 2, 3]


def test_the_kl_is_that_of_the_two_policies_by_hand(judged, place):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    models = [AutoModelForCausalLM.from_pretrained(place / name).double() for name in ("policy", "reference")]
    tokenizer = AutoTokenizer.from_pretrained(place / "policy")
    for one in list(runlog.read_samples(judged))[:5]:
        prompt = tokenizer(one["prompt"])["input_ids"]
        ids = torch.tensor([prompt + one["token_ids"]])
        with torch.no_grad():
            logs = [model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for model in models]
        drawn = torch.tensor(one["token_ids"])[:, None]
        assert one["kl"] == pytest.approx(float((logs[0] - logs[1]).gather(1, drawn).sum()), abs=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_logits_of_policy_or_reference_are_held(architecture, monkeypatch):
    tokenizer = byte_pair_tokenizer(["film"], 270)
    models = [as_computed_here(tiny_lm(architecture, vocabulary=len(tokenizer), seed=seed)) for seed in (0, 1)]

    def forward(*arguments, **options):
        raise AssertionError("this pass would hold the logits of every position")

    for model in models:
        monkeypatch.setattr(model, "forward", forward)
    inputs = JudgingInputs(*models, tokenizer, [])
    rows = judge_batch(EvalConfig(), inputs, WeightedRewards({}), [[5, 6], [7]], [(0, 0), (1, 0)], 1)
    assert all(row["kl"] != 0.0 and row["entropy"] > 0.0 for row in rows)


@pytest.mark.parametrize("torn", ["samples.jsonl", "metrics.jsonl"])
def test_a_torn_evaluation_continues_to_the_same_bytes(judged, place, tmp_path, monkeypatch, torn):
    shutil.copytree(judged, tmp_path / "mine")
    for name in ("metrics.jsonl", "samples.jsonl"):
        path = tmp_path / "mine" / name
        lines = path.read_bytes().splitlines(keepends=True)
        kept = lines[: 3 if name == "metrics.jsonl" else 14]
        path.write_bytes(b"".join(kept) + (b'{"st' if name == torn else b""))
    (tmp_path / "mine" / "evaluation.json").unlink()
    monkeypatch.chdir(tmp_path)  # paths are those of where it began
    outcome = run_command("eval", "--resume", "--name", "mine", "--runs", tmp_path)
    assert outcome.code == 0, outcome.err
    for name in ("metrics.jsonl", "samples.jsonl", "evaluation.json"):
        assert (tmp_path / "mine" / name).read_bytes() == (judged / name).read_bytes()


@pytest.mark.parametrize("name", ["samples.jsonl", "metrics.jsonl"])
def test_an_evaluation_with_a_batch_missing_is_refused_and_the_remedy_ends_in_the_same_bytes(
    judged, place, tmp_path, monkeypatch, name
):
    shutil.copytree(judged, tmp_path / "mine")
    path = tmp_path / "mine" / name
    rows = [(json.loads(line)["step"], line) for line in path.read_text().splitlines(keepends=True)]
    path.write_text("".join(line for step, line in rows if step != 2))
    monkeypatch.chdir(tmp_path)
    outcome = run_command("eval", "--resume", "--name", "mine", "--runs", tmp_path)
    assert outcome.code == 2
    said = "has no row of step 2; put the missing rows back, or remove all rows after step 1 from it"
    assert f"{name} {said}" in outcome.complaint
    path.write_text("".join(line for step, line in rows if step < 2))
    outcome = run_command("eval", "--resume", "--name", "mine", "--runs", tmp_path)
    assert outcome.code == 0, outcome.err
    for one in ("metrics.jsonl", "samples.jsonl", "evaluation.json"):
        assert (tmp_path / "mine" / one).read_bytes() == (judged / one).read_bytes()


def test_a_completion_does_not_depend_on_how_many_are_drawn(judged, place, monkeypatch):
    monkeypatch.chdir(place)
    outcome = run_command(*OPTIONS, "--judging.best-of", "1", "--judging.batch-size", "9", "--name", "one")
    assert outcome.code == 0, outcome.err
    first = {one["prompt_row"]: one["token_ids"] for one in runlog.read_samples(judged) if one["draw"] == 0}
    assert {one["prompt_row"]: one["token_ids"] for one in runlog.read_samples(place / "runs" / "one")} == first


def test_prompts_that_are_all_held_out_can_be_judged(place, monkeypatch):
    monkeypatch.chdir(place)
    options = ("--model.path", "policy", "--data", "prompts.jsonl", "--held-out", "0.999999", "--judging.prompts", "4")
    outcome = run_command("eval", *COMMON, *options, "--sampling.max-new-tokens", "3", "--name", "held-out")
    assert outcome.code == 0, outcome.err
    assert "0 to train on, 9 held out" in outcome.out
    assert len(list(runlog.read_samples(place / "runs" / "held-out"))) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data", "prompts.jsonl"), "--model.path is missing"),
        (("--model.path", "policy"), "--data is missing"),
        (("--model.path", "policy", "--data", "prompts.jsonl", "--judging.best-of", "2"), "nothing says which is best"),
        (("--model.path", "policy", "--data", "prompts.jsonl", "--reward", "kit_judges:none"), "has no 'none'"),
        (("--model.path", "policy", "--data", "prompts.jsonl", "--reward", "policy"), "'policy' is no reward model"),
        (("--model.path", "policy", "--data", "prompts.jsonl", "--sampling.max-new-tokens", "99"), "leaves no prompt"),
        (("--model.path", "policy", "--data", "prompts.jsonl", "--reference", "none/none/none"), "no model folder"),
    ],
)
def test_bad_input_is_one_line(place, monkeypatch, options, message):
    monkeypatch.chdir(place)
    outcome = run_command("eval", *COMMON, *options, "--runs", "other")
    assert outcome.code == 2
    assert re.search(message, outcome.complaint), outcome.complaint
    assert not (place / "other").exists()
