import ast
import dataclasses
import math
import re
from pathlib import Path

import pytest

from rlhf_core import config, config_files
from rlhf_core.algorithms import ALGORITHMS, Algorithm
from rlhf_core.commands import train as train_command
from rlhf_core.commands.options import parse
from rlhf_core.config import LogConfig, ModelConfig, PPOConfig, PretrainConfig, SamplingConfig, TrainConfig
from rlhf_core.testing.command import run_command

SOURCE = Path(config.__file__)
COMMANDS = sorted(Path(train_command.__file__).parent.glob("*.py"))
SECTIONS = ("model", "pretrain", "classifier", "sampling", "ppo", "log")


def parsed(*arguments: str) -> TrainConfig:
    return parse(train_command.Options, list(arguments), "train").train


def documentation(source: Path) -> dict[str, str | None]:
    """The string under each field of the dataclasses of a file, by ``Class.field``."""
    found = {}
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(one) for one in node.decorator_list):
            for field, below in zip(node.body, [*node.body[1:], ast.Pass()], strict=True):
                if isinstance(field, ast.AnnAssign):
                    documented = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                    found[f"{node.name}.{ast.unparse(field.target)}"] = below.value.value if documented else None
    return found


def undocumented(source: Path) -> list[str]:
    return [name for name, text in documentation(source).items() if not text]


def option_names(of: object, prefix: str = "") -> list[str]:
    names = []
    for field in dataclasses.fields(of):
        value = getattr(of, field.name)
        nested = dataclasses.is_dataclass(value)
        names += option_names(value, f"{prefix}{field.name}.") if nested else [prefix + field.name.replace("_", "-")]
    return names


def test_every_field_has_a_line_of_documentation_under_it():
    assert undocumented(SOURCE) == []
    undocumented_options = {path.stem: undocumented(path) for path in COMMANDS if undocumented(path)}
    # The wrappers around a configuration are no options.
    stages = ("dpo", "eval", "pipeline", "reward", "sft", "train")
    assert undocumented_options == {name: [f"Options.{name}"] for name in stages}
    assert undocumented(SOURCE.with_name("stage_config.py")) == []


def test_the_check_for_documentation_finds_a_field_without(tmp_path):
    path = tmp_path / "module.py"
    path.write_text('@dataclass\nclass A:\n    """Doc."""\n    x: int = 1\n    y: int = 2\n    """Documented."""\n')
    assert undocumented(path) == ["A.x"]


def test_every_field_is_an_option_with_its_documentation_in_the_help(monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    help_text = run_command("train", "--help").out
    for name in option_names(TrainConfig()):
        assert re.search(rf"--{re.escape(name)}[ ,]", help_text), name
    for name, text in documentation(SOURCE).items():
        assert text in help_text, name


def test_every_dataclass_is_frozen():
    for part in (TrainConfig(), *(getattr(TrainConfig(), name) for name in SECTIONS)):
        name = dataclasses.fields(part)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, name, getattr(part, name))


class TestSeedInTheEnvironment:
    def test_is_the_default(self, monkeypatch):
        monkeypatch.setenv("SEED", "17")
        assert TrainConfig().seed == 17
        assert parsed().seed == 17

    def test_gives_way_to_the_command_line(self, monkeypatch):
        monkeypatch.setenv("SEED", "17")
        assert parsed("--seed", "4").seed == 4

    def test_without_it_the_seed_is_0(self, monkeypatch):
        monkeypatch.delenv("SEED", raising=False)
        assert TrainConfig().seed == 0

    @pytest.mark.parametrize("text", ["abc", "1.5", ""])
    def test_must_be_a_whole_number(self, monkeypatch, text):
        monkeypatch.setenv("SEED", text)
        with pytest.raises(ValueError, match=f"SEED in the environment is '{text}'; give a whole number"):
            TrainConfig()

    def test_cannot_change_a_configuration_that_is_fed_back(self, monkeypatch, tmp_path):
        path = tmp_path / "config.json"
        path.write_text(config_files.to_json(TrainConfig(seed=5)))
        monkeypatch.setenv("SEED", "6")
        assert config_files.defaults(None, path).seed == 5


REFUSED = [
    (ModelConfig, "layers", 0),
    (ModelConfig, "hidden_size", 97),
    (ModelConfig, "hidden_size", -96),
    (ModelConfig, "context", 0),
    (PretrainConfig, "steps", -1),
    (PretrainConfig, "learning_rate", -1e-3),
    (SamplingConfig, "temperature", 0.0),
    (SamplingConfig, "top_k", -1),
    (SamplingConfig, "top_p", 0.0),
    (SamplingConfig, "top_p", 1.1),
    (PPOConfig, "learning_rate", 0.0),
    (PPOConfig, "learning_rate", math.nan),
    (PPOConfig, "learning_rate", math.inf),
    (PPOConfig, "kl_coef", math.inf),
    (PPOConfig, "kl_coef", -0.1),
    (PPOConfig, "gamma", 1.01),
    (PPOConfig, "lam", -0.1),
    (PPOConfig, "lam", math.nan),
    (PPOConfig, "adam_beta2", 1.0),
    (PPOConfig, "kl_horizon", 0),
    (LogConfig, "keep", 0),
    (LogConfig, "samples_per_step", -1),
    (TrainConfig, "seed", -1),
    (TrainConfig, "seed", 2**63),
    (TrainConfig, "threads", 0),
    (TrainConfig, "held_out", math.nan),
    (TrainConfig, "reward_timeout_s", math.nan),
    (TrainConfig, "reward_timeout_s", math.inf),
]


@pytest.mark.parametrize(("kind", "name", "value"), REFUSED)
def test_a_value_out_of_range_is_named(kind, name, value):
    with pytest.raises(ValueError, match=rf"{name} (is )?{value}\b.*(must|take)"):
        kind(**{name: value})


def test_k1_in_the_loss_is_refused_with_the_reason_and_the_remedy():
    with pytest.raises(ValueError, match=r"kl_place loss: .* expectation is zero, .* take k3-weighted or k2, or kl_pl"):
        PPOConfig(kl_place="loss")
    with pytest.raises(ValueError, match="expectation is zero"):
        PPOConfig(algorithm="grpo", kl_estimator="k1")


def test_an_importance_weight_in_the_reward_is_refused():
    with pytest.raises(ValueError, match="a reward has no importance weight; take k1"):
        PPOConfig(kl_estimator="k3-weighted")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"algorithm": "rloo", "group_size": 1}, "ppo.group_size is 1; it must be 2 or more, as 'leave-one-out' comp"),
        ({"advantage": "group-mean"}, "ppo.group_size is 1; it must be 2 or more"),
        ({"group_size": 0}, "ppo.group_size is 0; it must be greater than 0"),
        ({"algorithm": "grpo", "group_size": 5}, "ppo.batch_size 64 is not divisible by group_size 5"),
        ({"algorithm": "grpo", "whiten_rewards": True}, "whiten_rewards scales rewards of tokens, which advantage 'gr"),
    ],
)
def test_what_does_not_go_together_in_an_algorithm_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(**settings)


def test_an_algorithm_decides_what_is_left_open_and_an_option_goes_before_it():
    assert PPOConfig().recipe == Algorithm("gae", 1, True, "token", "reward", "k1")
    assert PPOConfig(algorithm="grpo").recipe == Algorithm("group-standard-score", 8, False, "sequence", "loss", "k3")
    mixed = PPOConfig(algorithm="grpo", loss_mean="token", group_size=4, kl_estimator="k2", whiten_advantages=True)
    assert mixed.recipe == Algorithm("group-standard-score", 4, True, "token", "loss", "k2")
    assert mixed.prompts_per_step == 16


def test_there_is_a_value_model_where_the_advantage_needs_one():
    assert TrainConfig().value_model == "separate"
    assert TrainConfig(model=ModelConfig(value="shared")).value_model == "shared"
    for name in ALGORITHMS:
        assert (TrainConfig(ppo=PPOConfig(algorithm=name)).value_model is None) == (name != "ppo")


@pytest.mark.parametrize("options", [{"threads": 2}, {"device": "cuda"}, {"dtype": "bfloat16"}])
def test_portable_numerics_refuse_what_has_other_bits(options):
    with pytest.raises(ValueError, match="'portable'"):
        TrainConfig(numerics="portable", **options)


def test_portable_numerics_run_on_one_thread_and_native_on_two():
    assert TrainConfig(numerics="portable").resolved_threads == 1
    assert TrainConfig().resolved_threads == 2
    assert TrainConfig(threads=3).resolved_threads == 3


def test_an_adaptive_coefficient_that_could_become_negative_is_refused():
    with pytest.raises(ValueError, match=r"ppo\.kl_horizon is 10: .* more than a fifth of ppo\.batch_size"):
        PPOConfig(batch_size=64, minibatch_size=16, micro_batch_size=16, kl_horizon=10)
    PPOConfig(batch_size=64, minibatch_size=16, micro_batch_size=16, kl_horizon=13)
    PPOConfig(batch_size=64, minibatch_size=16, micro_batch_size=16, kl_horizon=10, kl_control="fixed")
