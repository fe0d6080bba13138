"""What the profiler costs: off, on, and in a step whose operators are recorded; printed with ``-s``.

The step is that of ``rlhf train`` without options. The step that is profiled and the step that is not take turns, so
that a machine that slows down slows both; the median of their ratios is what counts.
"""

import copy
import itertools
import statistics
import time

import pytest
import torch

from rlhf_core.config import TrainConfig
from rlhf_core.data import reviews
from rlhf_core.data.batches import prompt_rows
from rlhf_core.experiment import load_inputs
from rlhf_core.policy import ActorCritic, Reference, build_model
from rlhf_core.ppo import ppo_step
from rlhf_core.profiler import Profiler
from rlhf_core.profiling import StageClock
from rlhf_core.reward import TextReward
from rlhf_core.trainer_state import new_state

ROUNDS = 8


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """A function that does the next step on a clock, and returns its seconds."""
    from rlhf_core.run_setup import DataPlace

    config = TrainConfig(seed=1, device="cpu")
    inputs = load_inputs(config, DataPlace(tmp_path_factory.mktemp("data"), None))
    task = inputs.task
    threads = torch.get_num_threads()
    torch.set_num_threads(config.resolved_threads)
    torch.manual_seed(0)
    base = build_model(config.model, task.tokenizer)
    state = new_state(ActorCritic(copy.deepcopy(base), config.value_model), Reference(base), config)
    reward = TextReward(reviews.score, task.tokenizer)

    def step(new_clock):
        start = time.perf_counter()
        clock = new_clock(state.step + 1)
        rows = prompt_rows(len(inputs.prompt_ids), config.ppo.prompts_per_step, state.step + 1, config.seed)
        result = ppo_step(
            state, [inputs.prompt_ids[row] for row in rows], reward, config,
            eos_id=task.tokenizer.eos_token_id, pad_id=task.tokenizer.pad_token_id, clock=clock,
        )  # fmt: skip
        clock.stop(int(result.metrics["response_tokens"]))
        return time.perf_counter() - start

    for _ in range(2):
        step(StageClock)
    yield step
    torch.set_num_threads(threads)


def seconds_of_off(calls):
    """What the clock takes in a step when nobody looks: its own calls, as many as a step has, and no work in them."""
    clock = StageClock()
    start = time.perf_counter()
    for _ in range(calls["stages"]):
        with clock.stage("a"):
            pass
    with clock.stage("a"):
        for _ in range(calls["inner"]):
            with clock.stage("b"):
                pass
    return time.perf_counter() - start


@pytest.mark.slow
def test_profiling_off_costs_less_than_1_percent_of_a_step_and_on_less_than_15(steps, tmp_path, capsys):
    off, on = [], []
    with Profiler(tmp_path / "stages", records_operators=lambda number: False) as profiler:
        for _ in range(ROUNDS):
            off.append(steps(StageClock))
            on.append(steps(profiler.new_clock))
    with Profiler(tmp_path / "operators", records_operators=lambda number: True) as profiler:
        recorded = steps(profiler.new_clock)
    plain = statistics.median(off)
    idle = min(seconds_of_off({"stages": 10, "inner": 16 * 4 + 16 * 3}) for _ in range(5)) / plain
    share = statistics.median(b / a for a, b in zip(off, on, strict=True)) - 1.0
    once = recorded / plain - 1.0
    whole = share + once / TrainConfig().ppo.steps
    with capsys.disabled():
        print(
            f"\na step without profiler: {plain * 1e3:.0f} ms\n"
            f"profiling off: {100 * idle:.3f}% of a step\n"
            f"profiling on: {100 * share:.1f}% of a step, and {once:.1f} steps more for the one whose operators are "
            f"recorded\nof a run of {TrainConfig().ppo.steps} steps: {100 * whole:.1f}%"
        )
    assert idle < 0.01
    # A busy machine is not a failure: only an order of magnitude is.
    assert whole < 1.5


def test_a_look_at_the_clock_costs_microseconds(benchmark):
    clock = StageClock()
    names = itertools.cycle("ab")

    def stage():
        with clock.stage(next(names)):
            pass

    benchmark(stage)
