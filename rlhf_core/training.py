"""``rlhf train`` from beginning to end: the experiment, PPO, evaluation."""

import copy
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch

from rlhf_core import checkpoint, run_folder, runlog
from rlhf_core.alerting.watch import Watch, WatchOptions, in_words
from rlhf_core.config import TrainConfig
from rlhf_core.data import batches
from rlhf_core.durable_files import write_atomically
from rlhf_core.evaluation import Evaluation, evaluate
from rlhf_core.experiment import Experiment, Inputs, prepare
from rlhf_core.metrics import log_row
from rlhf_core.policy import ActorCritic, Reference
from rlhf_core.ppo import train
from rlhf_core.profiler import Profiler, timing_row
from rlhf_core.profiles.files import PROFILES_FOLDER
from rlhf_core.profiling import StageClock
from rlhf_core.reporting.evaluation_table import evaluation_summary, print_evaluation
from rlhf_core.reporting.trackers import Destination, Reporter
from rlhf_core.reward import decode
from rlhf_core.rollout_file import keep_rollout, prune_rollouts
from rlhf_core.run_setup import begin_run
from rlhf_core.step_rows import sample_rows
from rlhf_core.stopping import StopRequest, by_alert, by_signal
from rlhf_core.terminal import console, progress_bar
from rlhf_core.trainer_state import load_state, new_state, save_state
from rlhf_core.updates import PPOState


def run_training(
    config: TrainConfig,
    inputs: Inputs,
    run: Path,
    *,
    resumed: bool,
    watch: WatchOptions,
    profile: bool = False,
    report_to: Sequence[Destination] = (),
) -> None:
    """Train as configured in the run's folder, and print the result; ``profile`` writes ``profiles/`` too.

    Raises:
        Stopped: a signal arrived, or an alert that ``watch`` stops at; the state is saved.
        FileNotFoundError, ValueError, FloatingPointError, OSError: what went wrong, in one line.
    """
    device = begin_run(config, run, resumed=resumed)
    with StopRequest().listening() as stop:
        experiment = prepare(config, inputs, run, device, stop)
        state = start_or_resume(experiment, config, run, device)
        profiling = Profiler(run / PROFILES_FOLDER) if profile else nullcontext()
        with profiling as profiler, Reporter(report_to, run, asdict(config)) as reporter:
            run_ppo(state, experiment, config, run, stop, Watch(run, watch), reporter, profiler)
    if config.log.evaluation_prompts and len(experiment.held_out_ids):
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
        # Its own parameters; the reference's are frozen.
        policy = copy.deepcopy(experiment.base).requires_grad_(True)
        state = new_state(ActorCritic(policy, config.value_model).to(device), reference, config)
        save_checkpoint(state, experiment, config, run)
    else:
        state = load_state(newest, reference, config, device)
        console.print(f"continuing after step {state.step} from {newest}", markup=False, soft_wrap=True)
    shown = state.step if config.log.samples_per_step else 0
    # A step's time is known when its checkpoint is saved, so that a kill in between leaves a row less.
    at_least = {runlog.METRICS_FILE: state.step, runlog.SAMPLES_FILE: shown, runlog.TIMINGS_FILE: state.step - 1}
    runlog.cut_back(run, state.step, at_least)
    return state


def save_checkpoint(state: PPOState, experiment: Experiment, config: TrainConfig, run: Path) -> None:
    """Write the checkpoint of ``state.step`` and drop old ones."""
    folder = checkpoint.step_folder(run / "checkpoints", state.step)
    checkpoint.write_folder(folder, lambda partial: save_state(state, experiment.task.tokenizer, partial))
    checkpoint.prune(run / "checkpoints", config.log.keep)
    prune_rollouts(run)


def run_ppo(
    state: PPOState,
    experiment: Experiment,
    config: TrainConfig,
    run: Path,
    stop: StopRequest,
    watch: Watch,
    reporter: Reporter,
    profiler: Profiler | None = None,
) -> None:
    """Do the remaining steps, log each, save checkpoints and watch for alerts."""
    prompt_ids, prompts = experiment.prompt_ids, config.ppo.prompts_per_step

    def prompts_of_step(step: int) -> list[list[int]]:
        return [prompt_ids[row] for row in batches.prompt_rows(len(prompt_ids), prompts, step, config.seed)]

    steps = train(
        state,
        prompts_of_step,
        experiment.reward,
        config,
        eos_id=experiment.eos_id,
        pad_id=experiment.pad_id,
        new_clock=StageClock if profiler is None else profiler.new_clock,
    )
    with progress_bar("ppo", config.ppo.steps, done=state.step) as bar, watch.for_what_is_not_finite():
        for result in steps:
            metrics = log_row(state.step, result.metrics)
            with result.clock.stage("logging"):
                runlog.append(run / runlog.METRICS_FILE, [metrics])
                parts = getattr(experiment.reward, "parts", {})
                samples = sample_rows(state.step, result, experiment.task.tokenizer, config.log.samples_per_step, parts)
                runlog.append(run / runlog.SAMPLES_FILE, samples)
                keep_rollout(run, state.step, result)
            last = state.step == config.ppo.steps or stop.signal_number is not None
            saved = last or state.step % config.log.save_every == 0
            if saved:
                with result.clock.stage("checkpoint"):
                    save_checkpoint(state, experiment, config, run)
            result.clock.stop(int(result.metrics["response_tokens"]))
            timings = timing_row(result.clock, profiler)
            runlog.append(run / runlog.TIMINGS_FILE, [timings])
            reporter.after_step(metrics, timings)
            bar.advance(f"reward {result.metrics['reward_mean']:+.3f}  kl {result.metrics['kl']:.2f}")
            alert = watch.after_step(metrics, timings)
            if alert is not None and state.step < config.ppo.steps:
                if not saved:
                    save_checkpoint(state, experiment, config, run)
                raise by_alert(f"stopped after step {state.step} of {config.ppo.steps}, saved: {in_words(alert)}")
            if stop.signal_number is not None and state.step < config.ppo.steps:
                raise by_signal(stop.signal_number, f"stopped after step {state.step} of {config.ppo.steps}, saved")


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
    write_atomically(run / run_folder.EVALUATION_FILE, (json.dumps(summary, sort_keys=True, indent=2) + "\n").encode())
    completions = {name: decode(experiment.task.tokenizer, one.response_ids[:5]) for name, one in results.items()}
    shown = zip(decode(experiment.task.tokenizer, prompts[:5]), *completions.values(), strict=False)
    print_evaluation(summary, list(shown))
