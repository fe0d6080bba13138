"""``rlhf train`` from beginning to end: task, language model, judges, PPO, evaluation."""

import json
import os
import platform
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from rlhf_core import checkpoint, data, reviews, runlog
from rlhf_core.config import TrainConfig
from rlhf_core.evaluation import Evaluation, evaluate
from rlhf_core.metrics import log_row, rounded
from rlhf_core.numerics import cpu_name
from rlhf_core.policy import ActorCritic, Reference, build_model, load_model
from rlhf_core.ppo import PPOState, StepResult, train
from rlhf_core.profiling import peak_memory_bytes
from rlhf_core.report import evaluation_summary, print_evaluation
from rlhf_core.reward import Classifier, ClassifierReward, Reward, TextReward, decode
from rlhf_core.reward_model import accuracy, train_classifier
from rlhf_core.rollout import check_context
from rlhf_core.seeding import set_all_seeds
from rlhf_core.sft import train_language_model
from rlhf_core.tasks import Task, load_task
from rlhf_core.terminal import console, progress_bar
from rlhf_core.trainer_state import load_state, new_state, save_state


class Stopped(Exception):
    """The run was asked to stop, and has saved what it had."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class StopRequest:
    """Remembers SIGTERM or Ctrl-C until the work at hand is done; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None:
            raise KeyboardInterrupt
        self.signal_number = number

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Take the signals inside the block and give them back to their former handlers after it."""
        numbers = (signal.SIGTERM, signal.SIGINT)
        former = {number: signal.signal(number, self._receive) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)


@dataclass(frozen=True)
class Inputs:
    """The task with its prompts in tokens: checked, and not yet in need of a run's folder."""

    task: Task
    prompt_ids: list[list[int]]
    held_out_ids: list[list[int]]


@dataclass(frozen=True)
class Experiment:
    """Everything that PPO starts from."""

    task: Task
    base: PreTrainedModel
    reward: Reward
    judges: dict[str, Reward]
    """What completions are evaluated by: the reward, and an evaluator that PPO never sees where there is one."""
    prompt_ids: list[list[int]]
    held_out_ids: list[list[int]]

    @property
    def eos_id(self) -> int:
        """The token that ends a response."""
        return self.task.tokenizer.eos_token_id

    @property
    def pad_id(self) -> int:
        """The token that fills."""
        return self.task.tokenizer.pad_token_id


def load_inputs(config: TrainConfig) -> Inputs:
    """Load what a run needs, so that whatever is wrong with it shows before there is a run.

    Raises:
        FileNotFoundError, ValueError: the device, the data, the tokenizer or the model cannot be used, or they do not
            fit together.
    """
    choose_device(config)
    task = load_task(config)
    model = starting_model(task, config)
    data.check_vocabulary(task.tokenizer, model.config.get_text_config().vocab_size)
    ids = [data.encode_prompts(task.tokenizer, prompts) for prompts in (task.prompts, task.held_out_prompts)]
    for prompt_ids in ids:
        check_context(model, prompt_ids, config.sampling.max_new_tokens)
    return Inputs(task, *ids)


def starting_model(task: Task, config: TrainConfig) -> PreTrainedModel:
    """Return the language model that pre-training, or PPO, starts from."""
    path, attention = config.model.path, config.model.attention
    return load_model(path, attention) if path else build_model(config.model, task.tokenizer)


def run_training(config: TrainConfig, inputs: Inputs, run: Path, *, resumed: bool) -> None:
    """Train as configured in the run's folder, and print the result.

    Raises:
        Stopped: a signal arrived; the state is saved.
        FileNotFoundError, ValueError, FloatingPointError, OSError: what went wrong, in one line.
    """
    torch.set_num_threads(config.resolved_threads)
    transformers.utils.logging.disable_progress_bar()
    set_all_seeds(config.seed)
    device = choose_device(config)
    if not resumed:
        runlog.write_atomically(
            run / runlog.ENVIRONMENT_FILE, (json.dumps(environment(device), indent=2) + "\n").encode()
        )
    with StopRequest().listening() as stop:
        experiment = prepare(config, inputs, run, device, stop)
        state = start_or_resume(experiment, config, run, device)
        run_ppo(state, experiment, config, run, stop)
    if config.log.evaluation_prompts:
        report(state, experiment, config, run)
    console.print(f"run folder: {run}", soft_wrap=True, markup=False)


def choose_device(config: TrainConfig) -> torch.device:
    """Return the device of ``config.device``.

    Raises:
        ValueError: CUDA was asked for and is not there.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here; take --device cpu or auto")
    cuda = config.device == "cuda" or (
        config.device == "auto" and torch.cuda.is_available() and config.numerics == "native"
    )
    return torch.device("cuda" if cuda else "cpu")


def prepare(config: TrainConfig, inputs: Inputs, run: Path, device: torch.device, stop: StopRequest) -> Experiment:
    """Return the experiment; models that the run's folder holds already are loaded, not trained again."""
    task = inputs.task
    base: PreTrainedModel = _stage(
        run / "models" / "base",
        train=lambda: _pretrained(task, config, device, stop),
        save=lambda model, folder: (model.save_pretrained(folder), task.tokenizer.save_pretrained(folder)),
        load=lambda folder: load_model(folder, config.model.attention),
    )
    move(base, device)
    if task.labelled is None:
        reward: Reward = TextReward(reviews.score, task.tokenizer)
        judges = {"reward": reward}
    else:
        judges = {
            "reward model": _classifier_reward("reward", task, base, config, run, device, stop),
            "unseen evaluator": _classifier_reward("evaluator", task, base, config, run, device, stop),
        }
        reward = judges["reward model"]
    return Experiment(task, base, reward, judges, inputs.prompt_ids, inputs.held_out_ids)


def move(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Move a model in place; transformers' own ``to`` has lost its types."""
    torch.nn.Module.to(model, device)
    return model


def _stage(
    folder: Path, *, train: Callable[[], Any], save: Callable[[Any, Path], Any], load: Callable[[Path], Any]
) -> Any:
    if not checkpoint.is_sound(folder):
        trained = train()
        checkpoint.write_folder(folder, lambda partial: save(trained, partial))
    # Loaded even when just trained, so that a resumed run starts from the very same object as an uninterrupted one.
    return load(folder)


def _pretrained(task: Task, config: TrainConfig, device: torch.device, stop: StopRequest) -> PreTrainedModel:
    model, steps = starting_model(task, config), config.pretrain.steps
    if steps is None:
        steps = 0 if config.model.path else task.pretrain_steps
    if steps == 0:
        return model
    sequences = data.encode_sentences(task.tokenizer, task.texts, _context(model, config))
    with progress_bar("language model", steps) as bar:

        def hear(loss: float) -> None:
            bar.advance(f"loss {loss:.3f} nats/token")
            _stop_between_stages(stop, "pre-training")

        train_language_model(
            move(model, device),
            sequences,
            config.pretrain,
            steps=steps,
            pad_id=task.tokenizer.pad_token_id,
            seed=config.seed,
            report=hear,
        )
    return model


def _context(model: PreTrainedModel, config: TrainConfig) -> int:
    return min(getattr(model.config.get_text_config(), "max_position_embeddings", config.model.context), 1024)


def _stop_between_stages(stop: StopRequest, stage: str) -> None:
    if stop.signal_number is not None:
        raise Stopped(stop.signal_number, f"stopped during {stage}, which starts anew on resume")


def _classifier_reward(
    part: data.Part,
    task: Task,
    base: PreTrainedModel,
    config: TrainConfig,
    run: Path,
    device: torch.device,
    stop: StopRequest,
) -> ClassifierReward:
    assert task.labelled is not None
    pad_id = task.tokenizer.pad_token_id
    longest = _context(base, config)

    def encoded(name: data.Part) -> tuple[list[list[int]], list[bool]]:
        members = task.labelled[name] if task.labelled else []
        sequences = data.encode_sentences(task.tokenizer, [member.text for member in members], longest)
        return sequences, [member.positive for member in members]

    def trained() -> Classifier:
        title = "reward model" if part == "reward" else "evaluator"
        with progress_bar(title, config.classifier.steps) as bar:

            def hear(loss: float) -> None:
                bar.advance(f"loss {loss:.3f}")
                _stop_between_stages(stop, f"the training of the {title}")

            return train_classifier(
                base, *encoded(part), config.classifier, pad_id=pad_id, seed=config.seed, purpose=part, report=hear
            )

    def load(folder: Path) -> Classifier:
        classifier = Classifier(base).to(device)
        classifier.load_state_dict(load_file(folder / "classifier.safetensors"))
        return classifier.requires_grad_(False)

    classifier = _stage(
        run / "models" / part,
        train=trained,
        save=lambda model, folder: save_file(model.state_dict(), folder / "classifier.safetensors"),
        load=load,
    )
    console.print(
        f"{part}: {accuracy(classifier, *encoded('held_out'), pad_id=pad_id):.1%} of held-out sentences right"
    )
    return ClassifierReward(classifier, pad_id)


def start_or_resume(experiment: Experiment, config: TrainConfig, run: Path, device: torch.device) -> PPOState:
    """Return the newest sound checkpoint's state with the logs cut back to it, or a new state, saved as step 0."""
    reference = Reference(experiment.base)
    checkpoints = run / "checkpoints"
    newest = checkpoint.newest_sound(checkpoints, report=lambda line: console.print(line, markup=False, soft_wrap=True))
    if newest is None:
        if checkpoint.steps(checkpoints):
            console.print("no checkpoint is sound; starting over at step 0")
        copy = load_model(run / "models" / "base", config.model.attention)
        state = new_state(ActorCritic(copy, config.model.value).to(device), reference, config)
        save_checkpoint(state, experiment, config, run)
    else:
        state = load_state(newest, reference, config, device)
        console.print(f"continuing after step {state.step} from {newest}", markup=False, soft_wrap=True)
    for name in runlog.STEP_LOGS:
        runlog.keep_through_step(run / name, state.step)
    return state


def save_checkpoint(state: PPOState, experiment: Experiment, config: TrainConfig, run: Path) -> None:
    """Write the checkpoint of ``state.step`` and drop old ones."""
    folder = checkpoint.step_folder(run / "checkpoints", state.step)
    checkpoint.write_folder(folder, lambda partial: save_state(state, experiment.task.tokenizer, partial))
    checkpoint.prune(run / "checkpoints", config.log.keep)


def run_ppo(state: PPOState, experiment: Experiment, config: TrainConfig, run: Path, stop: StopRequest) -> None:
    """Do the remaining steps, log each and save checkpoints."""
    prompt_ids, batch_size = experiment.prompt_ids, config.ppo.batch_size

    def prompts_of_step(step: int) -> list[list[int]]:
        return [prompt_ids[row] for row in data.prompt_rows(len(prompt_ids), batch_size, step, config.seed)]

    steps = train(state, prompts_of_step, experiment.reward, config, eos_id=experiment.eos_id, pad_id=experiment.pad_id)
    with progress_bar("ppo", config.ppo.steps, done=state.step) as bar:
        for result in steps:
            with result.clock.stage("logging"):
                runlog.append(run / runlog.METRICS_FILE, [log_row(state.step, result.metrics)])
                runlog.append(run / runlog.SAMPLES_FILE, sample_rows(state.step, result, experiment, config))
            last = state.step == config.ppo.steps or stop.signal_number is not None
            if last or state.step % config.log.save_every == 0:
                with result.clock.stage("checkpoint"):
                    save_checkpoint(state, experiment, config, run)
            runlog.append(run / runlog.TIMINGS_FILE, [timing_row(state.step, result)])
            bar.advance(f"reward {result.metrics['reward_mean']:+.3f}  kl {result.metrics['kl']:.2f}")
            if stop.signal_number is not None and state.step < config.ppo.steps:
                raise Stopped(stop.signal_number, f"stopped after step {state.step} of {config.ppo.steps}, saved")


def sample_rows(step: int, result: StepResult, experiment: Experiment, config: TrainConfig) -> list[dict[str, Any]]:
    """Return the rows of samples.jsonl: the first few rollouts of a step."""
    tokenizer, rollout = experiment.task.tokenizer, result.rollout
    shown = range(min(config.log.samples_per_step, len(result.rewards_B)))
    whole, responses = rollout.token_ids(), rollout.response_token_ids()
    return [
        {
            "step": step,
            "sample": row,
            "prompt": decode(tokenizer, [whole[row][: -len(responses[row])]])[0],
            "completion": decode(tokenizer, [responses[row]])[0],
            "token_ids": responses[row],
            "reward": rounded(result.rewards_B[row].item()),
            "kl": rounded(result.kl_B[row].item()),
        }
        for row in shown
    ]


def timing_row(step: int, result: StepResult) -> dict[str, Any]:
    """Return the row of timings.jsonl: nothing in it can be reproduced, which is why it has a file of its own."""
    seconds = result.clock.total()
    return {
        "step": step,
        "step_time_s": seconds,
        "stages_s": result.clock.seconds,
        "tokens_per_second": result.metrics["response_tokens"] / seconds,
        "peak_mem_bytes": peak_memory_bytes(),
    }


def environment(device: torch.device) -> dict[str, Any]:
    """Return what a reader needs to judge whether another machine should give the same bits."""
    names = ("ATEN_CPU_CAPABILITY", "MKL_CBWR", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUBLAS_WORKSPACE_CONFIG")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
        "libc": " ".join(platform.libc_ver()),
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "flags": {name: os.environ.get(name) for name in names},
        "commit": commit(),
    }


def commit() -> str | None:
    """Return the commit of the kit's checkout, with ``-dirty`` when it has changes; None outside a checkout."""
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return None
    return result.stdout.strip() or None


def report(state: PPOState, experiment: Experiment, config: TrainConfig, run: Path) -> None:
    """Evaluate the policy before and after on held-out prompts, write evaluation.json and print it."""
    results: dict[str, Evaluation] = {}
    prompts = experiment.held_out_ids
    with progress_bar("evaluation", 2 * len(prompts)) as bar:
        for name, lm in (("before", experiment.base), ("after", state.model.lm)):
            results[name] = evaluate(
                lm,
                state.reference,
                prompts,
                experiment.judges,
                config.sampling,
                seed=config.seed,
                dtype=config.dtype,
                eos_id=experiment.eos_id,
                pad_id=experiment.pad_id,
                advance=lambda done: bar.advance(by=done),
            )
    summary = evaluation_summary(results["before"], results["after"], config.seed)
    runlog.write_atomically(
        run / runlog.EVALUATION_FILE, (json.dumps(summary, sort_keys=True, indent=2) + "\n").encode()
    )
    completions = {name: decode(experiment.task.tokenizer, one.response_ids[:5]) for name, one in results.items()}
    shown = zip(experiment.task.held_out_prompts, completions["before"], completions["after"], strict=False)
    print_evaluation(summary, list(shown))
