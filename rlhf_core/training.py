"""``rlhf train`` from beginning to end: the experiment, PPO, evaluation."""

import json
from pathlib import Path

import torch
import transformers

from rlhf_core import checkpoint, data, runlog
from rlhf_core.config import TrainConfig
from rlhf_core.environment import environment
from rlhf_core.evaluation import Evaluation, evaluate
from rlhf_core.experiment import Experiment, Inputs, choose_device, prepare
from rlhf_core.metrics import log_row
from rlhf_core.policy import ActorCritic, Reference, load_model
from rlhf_core.ppo import PPOState, train
from rlhf_core.report import evaluation_summary, print_evaluation
from rlhf_core.reward import decode
from rlhf_core.seeding import set_all_seeds
from rlhf_core.step_rows import sample_rows, timing_row
from rlhf_core.stopping import Stopped, StopRequest
from rlhf_core.terminal import console, progress_bar
from rlhf_core.trainer_state import load_state, new_state, save_state


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


def start_or_resume(experiment: Experiment, config: TrainConfig, run: Path, device: torch.device) -> PPOState:
    """Return the newest sound checkpoint's state with the logs cut back to it, or a new state, saved as step 0."""
    reference = Reference(experiment.base)
    checkpoints = run / "checkpoints"
    newest = checkpoint.newest_sound(checkpoints, report=lambda line: console.print(line, markup=False, soft_wrap=True))
    if newest is None:
        if checkpoint.steps(checkpoints):
            console.print("no checkpoint is sound; starting over at step 0")
        copy = load_model(run / "models" / "base", config.model.attention)
        state = new_state(ActorCritic(copy, config.value_model).to(device), reference, config)
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
    prompt_ids, prompts = experiment.prompt_ids, config.ppo.prompts_per_step

    def prompts_of_step(step: int) -> list[list[int]]:
        return [prompt_ids[row] for row in data.prompt_rows(len(prompt_ids), prompts, step, config.seed)]

    steps = train(state, prompts_of_step, experiment.reward, config, eos_id=experiment.eos_id, pad_id=experiment.pad_id)
    with progress_bar("ppo", config.ppo.steps, done=state.step) as bar:
        for result in steps:
            with result.clock.stage("logging"):
                runlog.append(run / runlog.METRICS_FILE, [log_row(state.step, result.metrics)])
                samples = sample_rows(state.step, result, experiment.task.tokenizer, config.log.samples_per_step)
                runlog.append(run / runlog.SAMPLES_FILE, samples)
            last = state.step == config.ppo.steps or stop.signal_number is not None
            if last or state.step % config.log.save_every == 0:
                with result.clock.stage("checkpoint"):
                    save_checkpoint(state, experiment, config, run)
            runlog.append(run / runlog.TIMINGS_FILE, [timing_row(state.step, result)])
            bar.advance(f"reward {result.metrics['reward_mean']:+.3f}  kl {result.metrics['kl']:.2f}")
            if stop.signal_number is not None and state.step < config.ppo.steps:
                raise Stopped(stop.signal_number, f"stopped after step {state.step} of {config.ppo.steps}, saved")


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
