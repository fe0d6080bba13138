"""Bad options, on the command line, in the environment and in a file: exit code 2 and one line with the remedy."""

import pytest
import torch
from refusals import assert_matches, refuse

from rlhf_core import cli
from rlhf_core.testing.command import TINY_RUN, run_command

pytestmark = pytest.mark.usefixtures("reviews_drawn_once")


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--bogus", "1"], r"Unrecognized options: --bogus, 1; see rlhf train --help"),
            (["stray"], "Unrecognized options: stray"),
            (["--ppo.learning-rat", "1"], "--ppo.learning-rat, 1; Perhaps you meant: --ppo.learning-rate"),
            (["--ppo.learning-rate", "-1e-4"], r"ppo\.learning_rate is -0\.0001; it must be greater than 0"),
            (["--ppo.learning-rate", "nan"], r"ppo\.learning_rate is nan; it must be a finite number"),
            (["--ppo.learning-rate", "fast"], "--ppo.learning-rate: .*'fast'"),
            (["--ppo.kl-coef", "inf"], r"ppo\.kl_coef is inf; it must be a finite number"),
            (["--ppo.steps", "2.5"], r"--ppo.steps: .*'2\.5'"),
            (["--ppo.steps"], "Missing value for argument '--ppo.steps'"),
            (["--ppo.batch-size", "7"], r"ppo\.batch_size 7 is not divisible by minibatch_size 2; .* from 1, 7;"),
            (["--ppo.micro-batch-size", "3"], r"minibatch_size 2 is not divisible by micro_batch_size 3; .* 1, 2;"),
            (["--model.architecture", "bert"], r"'bert'.*--model.architecture.*'llama', 'gpt2'"),
            (["--model.heads", "3"], r"hidden_size 16 does not divide into 3 heads .*; take a multiple of 6"),
            (["--sampling.temperature", "0"], r"sampling\.temperature is 0\.0; it must be greater than 0"),
            (["--seed", "-1"], "seed is -1; it must lie in"),
            (["--threads", "0"], "threads is 0; it must be greater than 0"),
            (["--threads", "1000000"], "threads is 1000000; it must be greater than 0 and at most 1024"),
            (["--ppo.batch-size", "1000000000000"], r"ppo\.batch_size is 1000000000000; it must be at most 1048576"),
            (["--reward-timeout-s", "1e300"], r"reward_timeout_s is 1e\+300; .* greater than 0 and at most 1e\+09"),
            (["--name", "a" * 260], r"run name 'a{20}'\.\.\. has 260 characters; give one of 200 or fewer"),
            (["--numerics", "portable", "--model.attention", "sdpa"], "'portable' needs --model.attention eager"),
            (["--data"], "argument --data: expected one argument"),
            (["--data", "/none/here"], "no data folder '/none/here', nor a file of that name; give a folder with a"),
            (["--name", "../up"], r"run name '\.\./up': use letters"),
            (["--name", "earlier"], "run '.*earlier' exists; continue it with --resume, or give another --name"),
            (["--config", "/none/mine.toml"], r"no configuration file '/none/mine\.toml'; give a"),
            (["--model.path", "/none/model"], "no model folder '/none/model'; give a folder written by"),
            (["--sampling.max-new-tokens", "30"], "prompt .* together more than the model's context of 32; shorten"),
            (["--sampling.max-new-tokens", "40"], "prompt .* together more than the model's context of 32; shorten"),
        ],
    )  # fmt: skip
    def test_is_named_with_what_to_do(self, runs, options, message):
        assert_matches(message, refuse(runs, *options))

    def test_an_unknown_command_is_answered_with_those_that_there_are(self):
        outcome = run_command("trane")
        assert outcome.code == 2
        assert outcome.complaint == f"rlhf: unknown command 'trane'; choose from {', '.join(cli.COMMANDS)}"

    def test_the_value_is_quoted_whole_however_long(self, runs):
        value = "/a/very-long-folder-name" * 20 + "/end"
        assert f"'{value}'" in refuse(runs, "--ppo.kl-control", value)
        assert f"'{value}'" in refuse(runs, "--data", value)

    def test_escape_codes_in_a_value_are_spelled_out(self, runs):
        for option in ("--data", "--name", "--ppo.schedule"):
            complaint = refuse(runs, option, "\x1b[2J\nsecond line")
            assert "\\x1b[2J" in complaint
            assert complaint.isprintable()

    def test_a_seed_in_the_environment_that_is_no_number(self, runs, monkeypatch):
        monkeypatch.setenv("SEED", "seven")
        at = TINY_RUN.index("--seed")
        usual = (*TINY_RUN[:at], *TINY_RUN[at + 2 :])
        assert "SEED in the environment is 'seven'; give a whole number" in refuse(runs, usual=usual)

    def test_cuda_without_a_gpu(self, runs, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert "--device cuda: torch finds no GPU here; take --device cpu or auto" in refuse(runs, "--device", "cuda")

    @pytest.mark.parametrize(
        ("command", "message"),
        [
            (["compare", "earlier"], "Missing from rlhf compare: B"),
            (["samples", "--last", "0"], "--last is 0; it must be 1 or more"),
            (["samples", "none"], "no run 'none' .*; runs in '.*': earlier"),
            (["samples", "--step", "x"], "--step: .*'x'"),
        ],
    )
    def test_of_the_other_commands(self, runs, command, message):
        outcome = run_command(*command, "--runs", runs)
        assert outcome.code == 2
        assert_matches(message, outcome.complaint)


class TestConfigFile:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("[ppo", r"mine\.toml is not valid TOML: .*; correct the file$"),
            ("[ppo]\nlr = 1", r"mine\.toml: unknown option 'ppo\.lr'; known here: algorithm, steps, batch_size"),
            ('[ppo]\nsteps = "ten"', r"mine\.toml: ppo\.steps is 'ten'; it must be int"),
            ("[ppo]\nlearning_rate = -1", r"mine\.toml: ppo\.learning_rate is -1\.0; it must be greater than 0"),
        ],
    )
    def test_is_named_with_the_option(self, runs, tmp_path, content, message):
        (tmp_path / "mine.toml").write_text(content)
        assert_matches(message, refuse(runs, "--config", tmp_path / "mine.toml"))
