"""``rlhf report``: one page that needs nothing else, with everything of the run in it, and hostile text harmless."""

import base64
import json
import re
import shutil
import weakref
from html.parser import HTMLParser

import pytest

from rlhf_core import runlog
from rlhf_core.alerting.questions import METRICS_OF
from rlhf_core.alerting.rules import QUESTIONS, RULES
from rlhf_core.config import TrainConfig
from rlhf_core.metrics import DPO_METRICS, EVAL_METRICS, METRICS, REWARD_METRICS, SFT_METRICS, TIMINGS
from rlhf_core.reporting.content import SAMPLES, last_samples, memory_advice, read_content
from rlhf_core.testing.command import TINY_RUN, run_command

pytestmark = [pytest.mark.m3, pytest.mark.usefixtures("reviews_drawn_once")]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def profiled_run(tmp_path_factory):
    runs = tmp_path_factory.mktemp("profiled")
    options = ("--ppo.steps", "2", "--log.evaluation-prompts", "4", "--profile")
    outcome = run_command("train", *TINY_RUN, *options, "--runs", runs, "--name", "mine")
    assert outcome.code == 0, outcome.err
    return runs / "mine"


@pytest.fixture(scope="module")
def page(profiled_run):
    outcome = run_command("report", profiled_run)
    assert outcome.code == 0, outcome.err
    assert outcome.out.strip() == str(profiled_run / "report" / "report.html")
    return (profiled_run / "report" / "report.html").read_text()


class Attributes(HTMLParser):
    """Every tag with its attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_the_page_loads_nothing_from_anywhere(page):
    for tag, attributes in Attributes(page).tags:
        assert tag not in {"script", "iframe", "object", "embed", "link", "base", "form"}
        for name in ("src", "href", "action", "srcset"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes[name])
        assert not any(name.startswith("on") for name in attributes)
    assert "@import" not in page
    assert "url(" not in page
    assert "default-src 'none'" in page


def test_the_pictures_lie_beside_the_page_and_in_it(page, profiled_run):
    files = {path.name: path.read_bytes() for path in (profiled_run / "report").glob("*.png")}
    assert {
        "time.png",
        "memory.png",
        "is_it_learning.png",
        "is_it_stable.png",
        "does_it_compute_what_it_should.png",
    } <= files.keys()
    assert all(data.startswith(PNG) for data in files.values())
    inside = {base64.b64decode(data) for data in re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)}
    assert inside == set(files.values())


def test_everything_that_the_issue_names_is_on_the_page(page, profiled_run):
    text = Attributes(page).text
    for part in ("Alerts", "Is it learning?", "Where the time goes", "Where the memory goes", "If it does not fit",
                 "Does it compute what it should?", "--ppo.micro-batch-size", "aten::", "own CPU ms",
                 "Completions of step 2", "Configuration and environment", "Held-out prompts"):  # fmt: skip
        assert part in text
    sample = list(runlog.read_samples(profiled_run))[-1]
    assert sample["prompt"] in text
    environment = json.loads((profiled_run / "environment.json").read_text())
    assert environment["torch"] in text
    assert '"kl_target": 4.0' in text


def test_the_same_run_gives_the_same_bytes(page, profiled_run, tmp_path):
    outcome = run_command("report", profiled_run, "--out", tmp_path / "again")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "again" / "report.html").read_text() == page


HOSTILE = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "![](http://evil.example/x.png)",
    "{{ 7 * 7 }}{% for x in c %}",
    "\x1b[2J\u202e right to left \ud800",
    "</td></table><h1>owned</h1>",
    "word " * 200_000,
)


def test_what_a_model_writes_stays_text(finished_run, tmp_path):
    copy = tmp_path / "<b>run"
    shutil.copytree(finished_run, copy, ignore=shutil.ignore_patterns("checkpoints", "models"))
    (copy / "samples.jsonl").unlink()
    rows = [
        {"step": 5, "sample": row, "prompt": text, "completion": text, "reward": 0.5, "kl": 0.25}
        for row, text in enumerate(HOSTILE)
    ]
    runlog.append(copy / "samples.jsonl", rows)
    outcome = run_command("report", copy)
    assert outcome.code == 0, outcome.err
    page = (copy / "report" / "report.html").read_text()
    parsed = Attributes(page)
    tags = [tag for tag, _ in parsed.tags]
    assert "script" not in tags
    assert "b" in tags
    assert tags.count("h1") == 1
    assert all(attributes["src"].startswith("data:") for tag, attributes in parsed.tags if tag == "img")
    assert "{{ 7 * 7 }}" in parsed.text
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert len(page) < 3_000_000


def test_without_a_profile_times_come_from_the_log_and_the_page_says_so(finished_run, tmp_path):
    outcome = run_command("report", finished_run, "--out", tmp_path)
    assert outcome.code == 0, outcome.err
    text = Attributes((tmp_path / "report.html").read_text()).text
    assert "From timings.jsonl. With rlhf train --profile" in text
    assert "Where the memory goes" not in text
    summary = read_content(finished_run).summary
    assert 0.9 < sum(row["share"] for row in summary.values()) <= 1.0


@pytest.mark.parametrize(
    "damage",
    [{"stages_s": None}, {"stages_s": {"rollout": "long"}}, {"step_time_s": None}, {"step_time_s": 0.0}],
    ids=str,
)
def test_a_row_of_timings_without_its_seconds_is_one_line(finished_run, tmp_path, damage):
    copy = tmp_path / "copy"
    shutil.copytree(finished_run, copy, ignore=shutil.ignore_patterns("checkpoints", "models"))
    rows = list(runlog.read(copy / "timings.jsonl"))
    changed = {name: value for name, value in {**rows[2], **damage}.items() if value is not None}
    (copy / "timings.jsonl").unlink()
    runlog.append(copy / "timings.jsonl", [*rows[:2], changed, *rows[3:]])
    outcome = run_command("report", copy)
    assert outcome.code == 2
    assert "timings.jsonl: step 3 has no step_time_s above 0 with a table stages_s of numbers" in outcome.complaint


@pytest.mark.parametrize(("text", "why"), [('{"torch": ', "Expecting value"), ("[" * 100_000, "nested too deeply")])
def test_an_environment_that_is_no_json_is_named_in_one_line(finished_run, tmp_path, text, why):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    (run / "environment.json").write_text(text)
    outcome = run_command("report", run)
    assert outcome.code == 2
    assert f"environment.json is not valid JSON: {why}" in outcome.complaint


def test_a_metric_stands_under_the_question_of_the_alerts_that_speak_of_it():
    question_of = {name: question for question, names in METRICS_OF.items() for name in names}
    assert sum(map(len, METRICS_OF.values())) == len(question_of)
    tables = (METRICS, TIMINGS, SFT_METRICS, REWARD_METRICS, DPO_METRICS, EVAL_METRICS)
    assert question_of.keys() == {metric.name for table in tables for metric in table}
    assert tuple(METRICS_OF) == QUESTIONS
    spoken_of = {rule.metrics[0]: set() for rule in RULES}
    for rule in RULES:
        spoken_of[rule.metrics[0]].add(rule.question)
    assert all(question_of[name] in questions for name, questions in spoken_of.items() if name in question_of)


def test_of_the_samples_only_those_that_are_shown_are_held():
    class Row(dict):
        """A dict that can be watched."""

    held = weakref.WeakValueDictionary()

    def rows():
        for number in range(600):
            row = Row(step=number // 20, sample=number % 20)
            held[number] = row
            yield row
            assert len(held) <= SAMPLES + 2

    assert last_samples(rows()) == [{"step": 29, "sample": sample} for sample in range(SAMPLES)]


def test_a_damaged_profile_is_named_on_the_page_and_the_rest_is_shown(profiled_run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(profiled_run, copy, ignore=shutil.ignore_patterns("checkpoints", "report"))
    (copy / "profiles" / "summary.csv").write_text("nonsense\n")
    outcome = run_command("report", copy)
    assert outcome.code == 0, outcome.err
    assert "the columns are nonsense" in (copy / "report" / "report.html").read_text()


def test_a_run_without_steps_says_so(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text("")
    outcome = run_command("report", tmp_path)
    assert outcome.code == 2
    assert "step" in outcome.complaint


def row(peak):
    return {"cpu_peak_bytes": peak * 2**20, "cuda_peak_bytes": 0}


def test_the_first_advice_is_what_takes_the_memory():
    config = TrainConfig()
    assert (config.ppo.micro_batch_size, config.sampling.max_new_tokens) == (16, 20)
    # 16 x 20 x 50,000 x 4 bytes are 61 MiB, twice that of 200 MiB is most of it; of 2,000 MiB it is little.
    model = {"model_type": "gpt_neox", "vocab_size": 50_000}
    first, second, *_ = memory_advice({"rollout": row(100), "update": row(300)}, config, model)
    assert first == "update takes most: 300 MiB, 200 MiB above the stage that takes least."
    assert "linear_token_logprobs" in second
    assert "122.1 MiB" in second
    _, second, *_ = memory_advice({"rollout": row(100), "update": row(2100)}, config, model)
    assert "--ppo.micro-batch-size from 16 to 8" in second


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_a_run_whose_update_holds_no_logits_is_not_told_to_avoid_them(model_type):
    model = {"model_type": model_type, "vocab_size": 50_000}
    stages = {"rollout": row(100), "update": row(300)}
    advice = " ".join(memory_advice(stages, TrainConfig(), model))
    assert "--ppo.micro-batch-size from 16 to 8" in advice
    assert "logits" not in advice
    portable = " ".join(memory_advice(stages, TrainConfig(numerics="portable"), model))
    assert "122.1 MiB together; --numerics native" in portable
    assert "logits_to_keep" in portable
