"""Bad input: exit code 2, one line that names the value and the remedy, and nothing lost or half-made."""

import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_core import checkpoint, cli, run_folder, runlog, training
from rlhf_core.data import reviews
from rlhf_core.data.tokenization import word_tokenizer
from rlhf_core.testing.assertions import assert_runs_identical
from rlhf_core.testing.command import TINY_RUN, run_command

pytestmark = pytest.mark.usefixtures("reviews_drawn_once")


@pytest.fixture
def runs(tmp_path, finished_run):
    """A folder of runs in which ``latest`` is a finished one."""
    shutil.copytree(finished_run, tmp_path / "runs" / "earlier")
    run_folder.point_latest(tmp_path / "runs" / "earlier")
    return tmp_path / "runs"


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refuse(runs, *options, code=2):
    """Run ``train`` and return its complaint; no run appears, ``latest`` stays, no file changes."""
    before = files_of(runs)
    outcome = run_command("train", *TINY_RUN, "--runs", runs, *options)
    assert outcome.code == code, outcome
    assert files_of(runs) == before
    assert os.readlink(runs / "latest") == "earlier"
    assert not [path for path in runs.iterdir() if path.name not in ("earlier", "latest")]
    return outcome.complaint


def assert_matches(pattern, text):
    __tracebackhide__ = True
    print(text)
    assert re.search(pattern, text), f"{pattern!r} is not in: {text}"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A GPT-2 of the embedded task's vocabulary, as save_pretrained writes it."""
    folder = tmp_path_factory.mktemp("model") / "gpt2"
    tokenizer = word_tokenizer(reviews.VOCABULARY)
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    shape = AutoConfig.for_model(
        "gpt2", n_embd=8, n_layer=1, n_head=2, n_positions=32, vocab_size=len(tokenizer), **ends
    )
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model(model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "model")
    return tmp_path / "model"


def change_json(path, **changes):
    tree = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in tree.items() if value is not None}))


@pytest.fixture
def sentences(tmp_path):
    """A folder of labelled sentences that can be trained on."""
    folder = tmp_path / "sentences"
    folder.mkdir()
    for suffix, word in (("pos", "good"), ("neg", "bad")):
        lines = [f"the film number {number} of this year was really {word} ." for number in range(60)]
        (folder / f"a.{suffix}").write_text("\n".join(lines) + "\n")
    return folder


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
        assert "SEED in the environment is 'seven'; give a whole number" in refuse(runs)

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


class TestData:
    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda folder: (folder / "a.pos").write_bytes(b""), r"a\.pos holds no sentence; it must have one a line"),
            (lambda folder: (folder / "a.neg").write_bytes(b"x\n\xff\n"), r"a\.neg:2: not UTF-8 .*; convert the file"),
            (lambda folder: (folder / "a.pos").unlink(), r"no \*\.pos file; put the positive sentences there"),
            (lambda folder: (folder / "a.pos").write_text("one\n"), "has .* sentences and not both labels; give more"),
            (
                lambda folder: [
                    (folder / f"a.{suffix}").write_text("\n".join(f"{suffix}{number}" for number in range(90)))
                    for suffix in ("pos", "neg")
                ],
                "the sentences give no prompt: none has more than a few words; give longer ones",
            ),
        ],
    )
    def test_is_named_by_file(self, runs, sentences, spoil, message):
        spoil(sentences)
        assert_matches(message, refuse(runs, "--data", sentences, "--model.vocabulary", "300"))

    def test_a_folder_without_data_is_named_with_the_folder_in_it_that_has_some(self, runs, tmp_path):
        (tmp_path / "data" / "train").mkdir(parents=True)
        message = r"data' has neither \*\.pos and \*\.neg files nor a data file \(.*\)"
        assert_matches(message, refuse(runs, "--data", tmp_path / "data"))
        (tmp_path / "data" / "train" / "a.jsonl").write_text('{"prompt": "p"}\n')
        assert_matches(message + r"; its folder '.*/train' has", refuse(runs, "--data", tmp_path / "data"))

    def test_a_vocabulary_too_small(self, runs, sentences):
        complaint = refuse(runs, "--data", sentences, "--model.vocabulary", "200")
        assert "vocabulary is 200; a byte-pair vocabulary has at least 259 tokens" in complaint


class TestModel:
    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda folder: (folder / "config.json").unlink(), r"model folder '.*model' has no config\.json"),
            (lambda folder: (folder / "config.json").write_text("{"), "'.*model'"),
            (lambda folder: (folder / "tokenizer.json").write_text("[]"), "cannot load the tokenizer of '.*model' "),
            (lambda folder: change_json(folder / "tokenizer_config.json", eos_token=None), "no end-of-sequence token"),
            (lambda folder: (folder / "model.safetensors").unlink(), "cannot load model '.*model': "),
            (lambda folder: os.truncate(folder / "model.safetensors", 999), "cannot load model '.*': .* are damaged"),
            (lambda folder: change_json(folder / "config.json", n_positions=12), "cannot load model '.*model': .*wpe"),
            (lambda folder: change_json(folder / "config.json", architectures=3), "is 3; it must be a list of names"),
        ],
    )  # fmt: skip
    def test_is_named_with_the_remedy(self, runs, model, spoil, message):
        spoil(model)
        assert_matches(message, refuse(runs, "--model.path", model))

    def test_a_tokenizer_with_more_tokens_than_the_model(self, runs, model):
        word_tokenizer([*reviews.VOCABULARY, "more", "words"]).save_pretrained(model)
        assert_matches("the tokenizer has .* tokens and the model .*; take", refuse(runs, "--model.path", model))

    def test_a_tokenizer_without_a_padding_token_is_no_error(self, tmp_path, model):
        change_json(model / "tokenizer_config.json", pad_token=None)
        outcome = run_command("train", *TINY_RUN, "--runs", tmp_path / "r", "--model.path", model, "--ppo.steps", "1")
        assert outcome.code == 0, outcome.err


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


class TestDisk:
    def test_runs_cannot_be_a_file(self, tmp_path):
        (tmp_path / "file").write_text("mine")
        outcome = run_command("train", *TINY_RUN, "--runs", tmp_path / "file")
        assert outcome.code == 2
        assert_matches(r"cannot make a run in '.*file' \('.*file' is a file\); give --runs a folder", outcome.complaint)
        assert (tmp_path / "file").read_text() == "mine"

    def test_a_read_only_place_is_named(self, tmp_path, monkeypatch):
        def read_only(path, mode=0o777, parents=False, exist_ok=False):
            raise OSError(errno.EROFS, "Read-only file system", str(path))

        monkeypatch.setattr(Path, "mkdir", read_only)
        outcome = run_command("train", *TINY_RUN, "--runs", tmp_path / "runs")
        assert outcome.code == 2
        assert_matches(
            r"cannot make a run in '.*runs' \(Read-only file system\); give --runs a folder", outcome.complaint
        )

    def test_a_disk_that_fills_up_keeps_the_checkpoints_and_resume_ends_in_the_same_bytes(
        self, finished_run, tmp_path, monkeypatch
    ):
        save = training.save_state

        def full_at_step_4(state, tokenizer, folder):
            save(state, tokenizer, folder)
            if state.step == 4:
                raise OSError(errno.ENOSPC, "No space left on device", str(folder / "optimizer.safetensors"))

        monkeypatch.setattr(training, "save_state", full_at_step_4)
        outcome = run_command("train", *TINY_RUN, "--runs", tmp_path, "--name", "mine")
        assert outcome.code == 2
        assert_matches(
            "No space left on device; put that right, then continue with: rlhf train --resume", outcome.complaint
        )
        steps = checkpoint.steps(tmp_path / "mine" / "checkpoints")
        assert [step for step, folder in steps if checkpoint.is_sound(folder)] == [0, 2]
        monkeypatch.setattr(training, "save_state", save)
        assert run_command("train", "--resume", "--name", "mine", "--runs", tmp_path).code == 0
        assert_runs_identical(finished_run, tmp_path / "mine")

    def test_a_log_that_is_torn_by_a_full_disk_is_mended_by_resume(self, finished_run, tmp_path, monkeypatch):
        append = runlog.append

        def full_at_step_3(path, rows):
            rows = list(rows)
            if path.name == "metrics.jsonl" and rows[0]["step"] == 3:
                with path.open("ab") as file:
                    file.write(runlog.encode(rows[0]).encode()[:20])
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            append(path, rows)

        monkeypatch.setattr(runlog, "append", full_at_step_3)
        outcome = run_command("train", *TINY_RUN, "--runs", tmp_path, "--name", "mine")
        assert outcome.code == 2
        assert_matches(r"metrics\.jsonl: No space left on device; put that right", outcome.complaint)
        monkeypatch.setattr(runlog, "append", append)
        assert run_command("train", "--resume", "--name", "mine", "--runs", tmp_path).code == 0
        assert_runs_identical(finished_run, tmp_path / "mine")

    @pytest.mark.parametrize(
        ("error", "said"),
        [
            (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore"), "Tried to allocate 9 GiB"),
            (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 99 bytes"), "99 bytes"),
            (MemoryError("Unable to allocate 8 TiB"), "Unable to allocate 8 TiB"),
        ],
    )
    def test_memory_that_runs_out_is_one_line_and_resume_ends_in_the_same_bytes(
        self, finished_run, tmp_path, monkeypatch, error, said
    ):
        save = training.save_state

        def full_at_step_4(state, tokenizer, folder):
            if state.step == 4:
                raise error
            save(state, tokenizer, folder)

        monkeypatch.setattr(training, "save_state", full_at_step_4)
        outcome = run_command("train", *TINY_RUN, "--runs", tmp_path, "--name", "mine")
        assert outcome.code == 2
        assert_matches(
            f"out of memory: .*{said}.*; a smaller batch or micro-batch needs less; .*: rlhf train --resume",
            outcome.complaint,
        )
        monkeypatch.setattr(training, "save_state", save)
        assert run_command("train", "--resume", "--name", "mine", "--runs", tmp_path).code == 0
        assert_runs_identical(finished_run, tmp_path / "mine")

    def test_an_error_of_ours_is_not_called_a_lack_of_memory(self, tmp_path, monkeypatch):
        def broken(state, tokenizer, folder):
            raise RuntimeError("shapes do not fit")

        monkeypatch.setattr(training, "save_state", broken)
        with pytest.raises(RuntimeError, match="shapes do not fit"):
            run_command("train", *TINY_RUN, "--runs", tmp_path)

    def test_a_run_that_another_process_writes_is_left_alone(self, runs):
        script = "import sys; from pathlib import Path; from rlhf_core.run_folder import writing\n"
        script += "with writing(Path(sys.argv[1])): print('mine', flush=True); sys.stdin.read()"
        other = [sys.executable, "-c", script, str(runs / "earlier")]
        before = files_of(runs)
        with subprocess.Popen(other, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "mine\n"
            outcome = run_command("train", "--resume", "--runs", runs)
            assert outcome.code == 2
            assert_matches("earlier is being written by another process; wait for it, or end it", outcome.complaint)
            assert files_of(runs) == before
            process.kill()
        assert run_command("train", "--resume", "--runs", runs).code == 0

    @pytest.mark.parametrize("kib", [64, 400, 700])
    def test_a_disk_that_is_really_full(self, finished_run, tmp_path, kib):
        """64 KiB hold no model, 400 none of the later checkpoints; 700 hold some."""
        disk = tmp_path / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(disk)]
        if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
            pytest.skip("needs the right to mount a small disk")
        try:
            outcome = run_command("train", *TINY_RUN, "--runs", disk, "--name", "mine")
            assert outcome.code == 2
            assert_matches(
                "/mine.*: No space left on device; put that right, then continue with: rlhf train", outcome.complaint
            )
            for _, folder in checkpoint.steps(disk / "mine" / "checkpoints"):
                checkpoint.check_folder(folder)
            subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
            outcome = run_command("train", "--resume", "--name", "mine", "--runs", disk)
            assert outcome.code == 0, outcome.err
            assert_runs_identical(finished_run, disk / "mine")
        finally:
            subprocess.run(["umount", str(disk)], check=True)


class TestNotFinite:
    def test_a_reward_that_is_nan_stops_at_its_step_with_its_name_and_keeps_the_checkpoint(self, tmp_path, monkeypatch):
        scores = iter([0.5] * 4 * 3)  # four completions a step: the fourth step has none left
        monkeypatch.setattr(reviews, "score", lambda text: next(scores, math.nan))
        outcome = run_command("train", *TINY_RUN, "--runs", tmp_path, "--name", "mine")
        assert outcome.code == 2
        run = tmp_path / "mine"
        assert_matches(
            rf"step 4: reward is not finite.*; earlier checkpoints stay in {run}/checkpoints", outcome.complaint
        )
        assert checkpoint.newest_sound(run / "checkpoints", print).name == "step_000002"
        assert [row["step"] for row in runlog.read(run / "metrics.jsonl")] == [1, 2, 3]

    @pytest.mark.parametrize("rate", ["1e20", "1e38"])
    def test_a_learning_rate_that_explodes_stops_with_step_and_tensor(self, tmp_path, rate):
        outcome = run_command("train", *TINY_RUN, "--runs", tmp_path, "--name", "mine", "--ppo.learning-rate", rate)
        assert outcome.code == 2
        assert_matches(
            r"step [12]: \S.* is not finite.*lower the learning rate.*earlier checkpoints stay", outcome.complaint
        )
        newest = checkpoint.newest_sound(tmp_path / "mine" / "checkpoints", print)
        assert newest.name == "step_000000"

    def test_a_loss_of_pre_training_that_explodes_stops_with_its_step(self, tmp_path):
        outcome = run_command(
            "train", *TINY_RUN, "--runs", tmp_path, "--name", "mine", "--pretrain.learning-rate", "1e30"
        )
        assert outcome.code == 2
        assert_matches("at supervised step [123]; lower the learning rate; nothing was saved yet", outcome.complaint)
        assert not (tmp_path / "mine" / "models" / "base").exists()
