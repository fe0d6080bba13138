import dataclasses
import math

import pytest

from rlhf_core.config import PPOConfig, TrainConfig

SECTIONS = ("model", "pretrain", "classifier", "sampling", "ppo", "log")


def test_messages_name_a_field_as_the_command_line_does():
    for section in SECTIONS:
        part = getattr(TrainConfig(), section)
        number = next(field.name for field in dataclasses.fields(part) if field.type in ("int", int, "int | None"))
        with pytest.raises(ValueError, match=rf"^{section}\.{number} is -1; it must "):
            dataclasses.replace(part, **{number: -1})


def test_an_option_of_the_whole_configuration_has_no_section():
    with pytest.raises(ValueError, match=r"^seed is -1; it must "):
        TrainConfig(seed=-1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_field_takes_nan_or_infinity(value):
    for section in SECTIONS:
        part = getattr(TrainConfig(), section)
        for field in dataclasses.fields(part):
            if isinstance(getattr(part, field.name), float):
                with pytest.raises(ValueError, match=f"{section}.{field.name} is {value}"):
                    dataclasses.replace(part, **{field.name: value})


def test_an_indivisible_batch_names_the_sizes_that_divide():
    with pytest.raises(ValueError, match=r"batch_size 12 .* minibatch_size 5; choose .* from 1, 2, 3, 4, 6, 12$"):
        PPOConfig(batch_size=12, minibatch_size=5)
    with pytest.raises(ValueError, match=r"minibatch_size 16 .* micro_batch_size 3; .* from 1, 2, 4, 8, 16$"):
        PPOConfig(micro_batch_size=3)


def test_a_huge_batch_is_judged_at_once():
    PPOConfig(batch_size=2**20, kl_control="fixed")
    with pytest.raises(ValueError, match=r"ppo\.batch_size is 16000000000000000; it must be at most 1048576"):
        PPOConfig(batch_size=16 * 10**15, kl_control="fixed")
    with pytest.raises(ValueError, match="not divisible by minibatch_size 16"):
        PPOConfig(batch_size=10**15 + 1)
