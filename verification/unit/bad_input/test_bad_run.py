"""A run that cannot be resumed or read: named with what to do, and not a file of it changes."""

import pytest
from refusals import assert_matches, files_of

from rlhf_core.testing.command import run_command

pytestmark = pytest.mark.usefixtures("reviews_drawn_once")


class TestResume:
    def resume(self, runs, *options, name="earlier"):
        before = files_of(runs)
        outcome = run_command("train", "--resume", "--name", name, "--runs", runs, *options)
        assert outcome.code == 2, outcome
        assert files_of(runs) == before
        return outcome.complaint

    def test_without_a_run(self, runs, tmp_path):
        assert_matches("no run 'none' .*; runs in '.*': earlier", self.resume(runs, name="none"))
        outcome = run_command("train", "--resume", "--runs", tmp_path / "nowhere")
        assert outcome.code == 2
        assert "no run 'latest'" in outcome.complaint
        assert not (tmp_path / "nowhere").exists()

    def test_with_a_changed_option(self, runs):
        complaint = self.resume(runs, "--ppo.lam", "0.5")
        assert (
            "the recorded run, in which ppo.lam is 0.95 and not 0.5; leave the option out, or start a new" in complaint
        )

    def test_with_a_changed_option_in_a_file(self, runs, tmp_path):
        (tmp_path / "mine.toml").write_text("seed = 11\n")
        assert "in which seed is 3 and not 11" in self.resume(runs, "--config", tmp_path / "mine.toml")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b'{"seed": 3', r"config\.json is not valid JSON"),
            (b"\xff\x00", r"config\.json is not valid JSON"),
            (b"[]", r"config\.json holds a list"),
            (b'{"ppo": {"nonsense": 1}}', r"config\.json: unknown option 'ppo\.nonsense'"),
        ],
    )
    def test_a_damaged_configuration_is_named(self, runs, content, message):
        (runs / "earlier" / "config.json").write_bytes(content)
        assert_matches(message, self.resume(runs))

    def test_a_damaged_log_is_named_by_line_and_not_cut(self, runs):
        path = runs / "earlier" / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join([lines[0], b"garbage\n", *lines[2:]]))
        assert_matches(r"metrics\.jsonl:2: not JSON", self.resume(runs))


class TestLogs:
    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("nonsense", r"samples\.jsonl:2: not JSON"),
            ("[]", r"samples\.jsonl:2: each line must be a JSON object"),
            ('{"step": 1}', r"samples\.jsonl:2: sample is None; it must be int"),
            ('{"step": 1, "sample": 0, "prompt": "p", "completion": null}', r"samples\.jsonl:2: completion is None"),
        ],
    )
    def test_a_malformed_sample_is_named_by_line(self, runs, line, message):
        path = runs / "earlier" / "samples.jsonl"
        path.write_text(path.read_text().splitlines()[0] + "\n" + line + "\n")
        outcome = run_command("samples", "earlier", "--runs", runs)
        assert outcome.code == 2
        assert_matches(message, outcome.complaint)

    def test_a_run_that_has_not_begun_its_steps_says_so(self, runs):
        (runs / "earlier" / "samples.jsonl").unlink()
        outcome = run_command("samples", "earlier", "--runs", runs)
        assert outcome.code == 2
        assert_matches(r"no log '.*samples\.jsonl'; is '.*earlier' a run that has begun its steps\?", outcome.complaint)
