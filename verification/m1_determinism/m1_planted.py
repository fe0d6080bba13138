"""Run ``rlhf`` with something planted in the trainer: ``python m1_planted.py [--host NAME] [WHAT] -- train ...``.

--host NAME               the machine says that this is its name
--plant A,B,...           a run for each, named after it: a fault that makes it depend on more than its seed
                          (``FAULTS``), or junk in whatever lies outside the response mask (nan, 1e30, tokens)
--kill-in-pretraining N   the process dies by signal 9 in the N-th step of pre-training

The trainer's modules are loaded only after the environment has been set as the trainer sets it.
"""

import argparse
import dataclasses
import functools
import os
import platform
import signal
import socket
import sys
import time
from typing import Any


def plant_host(name: str) -> None:
    uname = os.uname()
    socket.gethostname = lambda: name
    platform.node = lambda: name
    os.uname = lambda: os.uname_result((uname.sysname, name, uname.release, uname.version, uname.machine))


def plant_clock() -> None:
    from rlhf_core import training

    log_row = training.log_row
    training.log_row = lambda step, values: log_row(step, values) | {"started_s": time.perf_counter()}


def plant_host_name() -> None:
    from rlhf_core import training

    sample_rows = training.sample_rows
    training.sample_rows = lambda *args: [row | {"host": socket.gethostname()} for row in sample_rows(*args)]


def plant_unseeded_shuffle() -> None:
    import numpy as np

    from rlhf_core import updates

    generator = np.random.default_rng()
    updates.permutation = lambda seed, purpose, n, *counter: generator.permutation(n)


def plant_hash_order() -> None:
    """Take a step's prompts in the order of a set of strings."""
    from rlhf_core.data import batches

    prompt_rows = batches.prompt_rows
    batches.prompt_rows = lambda *args: [int(name) for name in {str(row) for row in prompt_rows(*args)}]


def plant_identity_order() -> None:
    """Take a step's prompts in the order of a set of objects that hash by where they lie in memory."""
    from rlhf_core.data import batches

    class Prompt:
        def __init__(self, row: int) -> None:
            self.row = row

    def prompt_rows(n_prompts: int, batch_size: int, step: int, seed: int) -> list[int]:
        return [prompt.row for prompt in {Prompt(row) for row in range(n_prompts)}][:batch_size]

    batches.prompt_rows = prompt_rows


FAULTS = {
    "clock": plant_clock,
    "host-name": plant_host_name,
    "unseeded-shuffle": plant_unseeded_shuffle,
    "hash-order": plant_hash_order,
    "identity-order": plant_identity_order,
}


def plant_junk(kind: str) -> None:
    """Fill every tensor of the step with junk where the response mask is False."""
    import torch

    from rlhf_core import ppo, scoring, targets, updates

    planted = [0]

    def spoil(mask: torch.Tensor, *tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
        planted[0] += int((~mask).sum()) * sum(tensor is not None for tensor in tensors)
        return [None if tensor is None else torch.where(mask, tensor, float(kind)) for tensor in tensors]

    sample, evaluate_rows, score_rollout = ppo.sample, updates.evaluate_rows, ppo.score_rollout
    token_rewards, make_targets, gae = ppo.token_rewards, ppo.make_targets, targets.gae

    def sample_with_junk_tokens(*args: Any, **kwargs: Any) -> Any:
        rollout = sample(*args, **kwargs)
        padding = rollout.attention_mask_BL == 0
        junk = torch.arange(padding.numel()).reshape(padding.shape) % 100 + 1
        planted[0] += int(padding.sum())
        return dataclasses.replace(rollout, input_ids_BL=torch.where(padding, junk, rollout.input_ids_BL))

    def spoiled_sample(*args: Any, **kwargs: Any) -> Any:
        rollout = sample(*args, **kwargs)
        [logprobs] = spoil(rollout.response_mask_BT, rollout.sampler_logprobs_BT)
        return dataclasses.replace(rollout, sampler_logprobs_BT=logprobs)

    def spoiled_rows(model: Any, rollout: Any, rows: Any, *args: Any) -> Any:
        return tuple(spoil(rollout.response_mask_BT[rows], *evaluate_rows(model, rollout, rows, *args)))

    def spoiled_scores(model: Any, reference: Any, rollout: Any, *args: Any) -> Any:
        scores = score_rollout(model, reference, rollout, *args)
        names = [field.name for field in dataclasses.fields(scores)]
        tensors = spoil(rollout.response_mask_BT, *(getattr(scores, name) for name in names))
        return scoring.Scores(**dict(zip(names, tensors, strict=True)))

    def spoiled_rewards(scores: Any, logprobs: Any, ref_logprobs: Any, mask: Any, **kwargs: Any) -> Any:
        return spoil(mask, token_rewards(scores, logprobs, ref_logprobs, mask, **kwargs))[0]

    def spoiled_gae(rewards: Any, values: Any, mask: Any, **kwargs: Any) -> Any:
        return tuple(spoil(mask, *gae(rewards, values, mask, **kwargs)))

    def spoiled_targets(rewards: Any, values: Any, mask: Any, config: Any) -> Any:
        right, raw = make_targets(rewards, values, mask, config)
        advantages, returns, raw = spoil(mask, right.advantages_BT, right.returns_BT, raw)
        return targets.Targets(advantages, returns), raw

    if kind == "tokens":
        ppo.sample = sample_with_junk_tokens
    else:
        ppo.sample, ppo.score_rollout = spoiled_sample, spoiled_scores
        updates.evaluate_rows = scoring.evaluate_rows = spoiled_rows
        ppo.token_rewards, ppo.make_targets, targets.gae = spoiled_rewards, spoiled_targets, spoiled_gae

    train = ppo.train

    def counting_train(*args: Any, **kwargs: Any) -> Any:
        yield from train(*args, **kwargs)
        if not planted[0]:
            sys.exit("no position lies outside the mask, so nothing was planted")

    from rlhf_core import training

    training.train = counting_train


PLANTS = FAULTS | {kind: functools.partial(plant_junk, kind) for kind in ("nan", "1e30", "tokens")}


def plant_kill_in_pretraining(step: int) -> None:
    from rlhf_core import experiment

    train_language_model = experiment.train_language_model

    def train(*args: Any, report: Any, **kwargs: Any) -> None:
        losses: list[float] = []

        def hear(loss: float) -> None:
            losses.append(loss)
            if len(losses) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            report(loss)

        train_language_model(*args, report=hear, **kwargs)

    experiment.train_language_model = train


def set_environment(arguments: list[str]) -> None:
    """Do what ``rlhf train`` does before it loads torch."""
    from pathlib import Path

    from rlhf_core.config import TrainConfig
    from rlhf_core.config_files import read_config_file
    from rlhf_core.numerics import apply_environment

    config = read_config_file(Path(arguments[arguments.index("--config") + 1]), TrainConfig())
    apply_environment(config.numerics, config.resolved_threads)


def train_each(names: list[str], arguments: list[str]) -> None:
    """Fork a run for each plant: importing the trainer takes longer than the run."""
    from rlhf_core import cli
    from rlhf_core import training as training  # loaded before the fork, so once

    at = arguments.index("--name") + 1
    codes = []
    for name in names:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            PLANTS[name]()
            cli.main([*arguments[:at], f"{arguments[at]}-{name}", *arguments[at + 1 :]])
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    sys.exit(max(codes, key=abs))


def main() -> None:
    at = sys.argv.index("--")
    parser = argparse.ArgumentParser()
    for name in ("--host", "--plant"):
        parser.add_argument(name)
    parser.add_argument("--kill-in-pretraining", type=int)
    planted, arguments = parser.parse_args(sys.argv[1:at]), sys.argv[at + 1 :]
    set_environment(arguments)
    if planted.host:
        plant_host(planted.host)
    if planted.kill_in_pretraining:
        plant_kill_in_pretraining(planted.kill_in_pretraining)
    if planted.plant:
        train_each(planted.plant.split(","), arguments)
    from rlhf_core import cli

    cli.main(arguments)


if __name__ == "__main__":
    main()
