import dataclasses
import json

import pytest

from rlhf_core import config_files
from rlhf_core.commands import train as train_command
from rlhf_core.commands.options import parse
from rlhf_core.config import ModelConfig, PPOConfig, TrainConfig, for_data
from rlhf_core.testing.assertions import assert_runs_identical
from rlhf_core.testing.command import run_command


class TestFile:
    def test_toml_sets_what_it_names_and_leaves_the_rest(self, tmp_path):
        path = tmp_path / "mine.toml"
        path.write_text('seed = 9\n[ppo]\nlearning_rate = 1\nkl_control = "fixed"\n[model]\nlayers = 2\n')
        wanted = TrainConfig(
            seed=9,
            ppo=PPOConfig(learning_rate=1.0, kl_control="fixed"),
            model=dataclasses.replace(ModelConfig(), layers=2),
        )
        read = config_files.read_config_file(path, TrainConfig())
        assert read == wanted
        assert type(read.ppo.learning_rate) is float

    def test_the_command_line_goes_before_the_file(self, tmp_path):
        path = tmp_path / "mine.toml"
        path.write_text("seed = 9\n[ppo]\nsteps = 7\nepochs = 3\n")
        options = train_command.Options(train=config_files.defaults(None, path))
        train = parse(train_command.Options, ["--config", str(path), "--ppo.steps", "5"], "train", options).train
        assert (train.seed, train.ppo.steps, train.ppo.epochs) == (9, 5, 3)

    def test_config_json_fed_back_is_the_same_configuration(self, tmp_path):
        path = tmp_path / "config.json"
        for written in (TrainConfig(seed=3), for_data("somewhere"), TrainConfig(threads=1, numerics="portable")):
            path.write_text(config_files.to_json(written))
            assert config_files.defaults(None, path) == written

    def test_a_data_folder_brings_its_own_defaults_under_the_file(self, tmp_path):
        path = tmp_path / "mine.toml"
        path.write_text('data = "d"\n[ppo]\nepochs = 3\n')
        read = config_files.defaults(None, path)
        assert read == dataclasses.replace(for_data("d"), ppo=dataclasses.replace(for_data("d").ppo, epochs=3))
        assert config_files.defaults("other", path).data == "other"

    def test_json_has_sorted_keys(self):
        tree = json.loads(config_files.to_json(TrainConfig()))
        assert list(tree) == sorted(tree)
        assert list(tree["ppo"]) == sorted(tree["ppo"])

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.toml", "seeds = 3", "unknown option 'seeds'; known here: seed, data"),
            ("a.toml", "[ppo]\nlr = 3", r"unknown option 'ppo\.lr'; known here: algorithm"),
            ("a.toml", "ppo = 3", "ppo is 3; it must be a table"),
            ("a.toml", "[ppo]\nsteps = 3.5", r"ppo\.steps is 3\.5; it must be int"),
            ("a.toml", "[ppo]\nsteps = true", r"ppo\.steps is True; it must be int"),
            ("a.toml", '[ppo]\nlearning_rate = "1e-3"', r"ppo\.learning_rate is '1e-3'; it must be float"),
            ("a.toml", "[ppo]\nwhiten_rewards = 1", r"ppo\.whiten_rewards is 1; it must be bool"),
            ("a.toml", '[ppo]\nschedule = "cosine"', r"ppo\.schedule is 'cosine'; choose from linear, constant"),
            ("a.toml", '[ppo]\nalgorithm = "GRPO"', r"is 'GRPO'; choose from ppo, grpo, dr-grpo, rloo, reinforce"),
            ("a.toml", '[ppo]\nkl_place = "score"', r"ppo\.kl_place is 'score'; choose from reward, loss, null"),
            ("a.toml", "[ppo]\nadvantage = 1", r"is 1; choose from gae, reward-to-go, .*, null"),
            ("a.toml", "[model]\narchitecture = [1]", r"is \[1\]; choose from llama, gpt2"),
            ("a.toml", "threads = 'two'", "threads is 'two'; it must be int or null"),
            ("a.toml", "[ppo]\nlearning_rate = -1.0", r"a\.toml: ppo\.learning_rate is -1\.0; it must be greater"),
            ("a.toml", "[ppo]\nkl_coef = nan", r"ppo\.kl_coef is nan; it must be a finite number"),
            ("a.json", '{"ppo": {"kl_coef": Infinity}}', r"ppo\.kl_coef is inf; it must be a finite number"),
            ("a.toml", "[ppo]\nvalue_clip_range = 1e39", r"value_clip_range is 1e\+39; it must be .* in float32"),
            ("a.toml", "reward_timeout_s = 1e30", r"reward_timeout_s is 1e\+30; it must be .* at most 1e\+09"),
            ("a.json", '{"ppo": {"kl_coef": 1' + "0" * 400 + "}}", "must be a finite number"),
            ("a.json", "[1]", "holds a list; it must hold a table"),
            ("a.json", '{"seed": 1', "not valid JSON: .*line 1"),
            ("a.json", "[" * 100_000, "not valid JSON"),
            ("a.toml", "seed = ", r"a\.toml is not valid TOML: .*end of document"),
            ("a.toml", b"seed = 1 # \xff", "not valid TOML: .*0xff"),
        ],
    )  # fmt: skip
    def test_what_is_wrong_with_a_file_is_said_with_its_name(self, tmp_path, name, content, message):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ValueError, match=message) as caught:
            config_files.read_config_file(path, TrainConfig())
        assert str(path) in str(caught.value)

    def test_a_missing_file_says_what_may_be_given(self, tmp_path):
        with pytest.raises(
            FileNotFoundError, match=r"no configuration file .*none\.toml'; give a \.toml file or a run's"
        ):
            config_files.read_config_file(tmp_path / "none.toml", TrainConfig())


def test_differences_name_each_changed_field_with_its_section():
    changed = TrainConfig(seed=4, ppo=PPOConfig(lam=0.9))
    assert config_files.differences(TrainConfig(seed=3), changed) == [("seed", 3, 4), ("ppo.lam", 0.95, 0.9)]
    assert config_files.differences(changed, changed) == []


@pytest.mark.usefixtures("reviews_drawn_once")
def test_the_config_json_of_a_run_fed_back_gives_the_same_bytes(finished_run, tmp_path):
    outcome = run_command("train", "--config", finished_run / "config.json", "--runs", tmp_path, "--name", "again")
    assert outcome.code == 0, outcome.err
    assert_runs_identical(finished_run, tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (finished_run / "config.json").read_bytes()
