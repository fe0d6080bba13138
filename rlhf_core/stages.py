"""``rlhf sft``, ``rlhf reward`` and ``rlhf dpo`` from beginning to end."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich import box
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_core import checkpoint, run_folder
from rlhf_core.data.dataset import DataReport, Rows, build_store, open_rows, texts_of, to_train_on
from rlhf_core.data.examples import Need
from rlhf_core.data.tokenization import byte_pair_tokenizer, check_vocabulary, load_tokenizer, saved_tokenizer
from rlhf_core.dpo import DPOObjective
from rlhf_core.durable_files import write_atomically
from rlhf_core.policy import build_model, context_length, load_model
from rlhf_core.reward_model import PairObjective, new_reward_model, save_reward_model
from rlhf_core.reward_report import pair_report
from rlhf_core.run_setup import BASE_FOLDER, DATA_FOLDER, DataPlace, base_path, begin_run, choose_device
from rlhf_core.sft import CompletionObjective
from rlhf_core.stage_config import DPOConfig, RewardConfig, SFTConfig
from rlhf_core.stopping import StopRequest
from rlhf_core.supervised import run_supervised, width_rate
from rlhf_core.terminal import console, progress_bar

TOKENIZER_FOLDER = "tokenizer"
SPLITS: tuple[Literal["train", "held_out"], ...] = ("train", "held_out")
SFT_RATE, REWARD_RATE, DPO_RATE = 3e-3, 1e-3, 3e-4


@dataclass(frozen=True)
class StageInputs:
    """What a stage starts from."""

    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel | None
    """The model that ``--model.path`` names; None: it is built."""


def load_stage_inputs(config: SFTConfig | RewardConfig | DPOConfig, need: Need, place: DataPlace) -> StageInputs:
    """Load the model, and prepare the data unless the resumed run has it.

    Raises:
        FileNotFoundError, ValueError: the device, the data, the tokenizer or the model cannot be used.
    """
    choose_device(config)
    if config.data is None:
        raise ValueError("--data is missing; give a data file, a folder of them, or hub:NAME")
    if isinstance(config, DPOConfig) and config.model.path is None:
        raise ValueError("--model.path is missing; DPO starts from a language model, as rlhf sft leaves in its model/")
    source, path = config.data, base_path(config.model.path, place.run)
    model = load_model(path, config.model.attention) if path else None
    if place.kept is not None:
        return StageInputs(saved_tokenizer(place.kept / TOKENIZER_FOLDER), model)
    if path:
        tokenizer = load_tokenizer(path)
    else:
        tokenizer = byte_pair_tokenizer(texts_of(source, config.data_errors), config.model.vocabulary)
    if model is not None:
        check_vocabulary(tokenizer, model.config.get_text_config().vocab_size)
    context = (context_length(model) if model is not None else config.model.context) or config.training.max_length

    def build(folder: Path) -> DataReport:
        tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)
        report = build_store(
            source,
            need,
            folder,
            tokenizer=tokenizer,
            longest=min(context, config.training.max_length),
            errors=config.data_errors,
            held_out_share=config.held_out,
        )
        return to_train_on(report)

    place.prepare(build)
    return StageInputs(saved_tokenizer(place.scratch / DATA_FOLDER / TOKENIZER_FOLDER), model)


def starting_model(
    config: SFTConfig | RewardConfig | DPOConfig, inputs: StageInputs, run: Path, device: torch.device
) -> PreTrainedModel:
    """Return the model to train, on its device; of one that was named the run keeps a copy, to be resumed from."""
    named, tokenizer = inputs.model, inputs.tokenizer
    if named is not None and not checkpoint.is_sound(run / BASE_FOLDER):
        checkpoint.write_folder(run / BASE_FOLDER, lambda folder: _save(named, tokenizer, folder))
    model = named if named is not None else build_model(config.model, tokenizer)
    torch.nn.Module.to(model, device)
    return model


def run_sft(config: SFTConfig, inputs: StageInputs, run: Path, *, resumed: bool) -> None:
    """Fine-tune as configured in the run's folder: logs, checkpoints, ``evaluation.json``, and the model in ``model/``.

    Raises:
        Stopped: a signal arrived; the state is saved.
        ValueError, FloatingPointError, OSError: what went wrong, in one line.
    """
    device = begin_run(config, run, resumed=resumed)
    tokenizer, data = inputs.tokenizer, run / DATA_FOLDER
    model = starting_model(config, inputs, run, device)
    objective = CompletionObjective(model, open_rows(data, "train"), tokenizer.pad_token_id, config.dtype)
    rate = width_rate(config.training.learning_rate, SFT_RATE, model.config.get_text_config().hidden_size)
    with StopRequest().listening() as stop:
        run_supervised("sft", objective, config.training, run, stop, seed=config.seed, peak_rate=rate)
    model.requires_grad_(False)
    checkpoint.write_folder(run / "model", lambda folder: _save(model, tokenizer, folder))
    held_out = open_rows(data, "held_out")
    if len(held_out):
        judged = CompletionObjective(model, held_out, tokenizer.pad_token_id, config.dtype)
        summary = _with_bar(len(held_out), lambda advance: judged.evaluate(config.training.batch_size, advance))
        write_evaluation(run, {"held_out": summary})
        console.print(
            f"held out: {summary['loss']:.3f} nats a token (perplexity {summary['perplexity']:.1f}), "
            f"{summary['token_accuracy']:.1%} of {summary['tokens']:,} tokens the likeliest"
        )
    console.print(f"model: {run / 'model'}", soft_wrap=True, markup=False)


def run_reward(config: RewardConfig, inputs: StageInputs, run: Path, *, resumed: bool) -> None:
    """Train a reward model in the run's folder, as :func:`run_sft` does a policy, and report on held-out pairs."""
    device = begin_run(config, run, resumed=resumed)
    tokenizer, data = inputs.tokenizer, run / DATA_FOLDER
    reward_model = new_reward_model(starting_model(config, inputs, run, device))
    pad_id, preference = tokenizer.pad_token_id, config.preference
    objective = PairObjective(reward_model, open_rows(data, "train"), pad_id, config.dtype, preference)
    width = reward_model.model.config.get_text_config().hidden_size
    rate = width_rate(config.training.learning_rate, REWARD_RATE, width)
    with StopRequest().listening() as stop:
        run_supervised("reward", objective, config.training, run, stop, seed=config.seed, peak_rate=rate)
    reward_model.requires_grad_(False)
    checkpoint.write_folder(run / "model", lambda folder: save_reward_model(reward_model, tokenizer, folder))
    held_out = open_rows(data, "held_out")
    if len(held_out):
        judged = PairObjective(reward_model, held_out, pad_id, config.dtype, preference)
        pairs = _with_bar(len(held_out), lambda advance: judged.judge(config.training.batch_size, advance))
        summary = pair_report(pairs)
        write_evaluation(run, {"held_out": summary})
        print_pair_report(summary)
    console.print(f"reward model: {run / 'model'}", soft_wrap=True, markup=False)


def run_dpo(config: DPOConfig, inputs: StageInputs, run: Path, *, resumed: bool) -> None:
    """Train a policy on preferences in the run's folder, as :func:`run_sft` does on demonstrations."""
    device = begin_run(config, run, resumed=resumed)
    tokenizer, data = inputs.tokenizer, run / DATA_FOLDER
    model = starting_model(config, inputs, run, device)
    # Measured before training, under the model that training starts from: on a resume too, to the same bits.
    objectives = {name: _pairs(config, model, open_rows(data, name), tokenizer) for name in SPLITS}
    objective, held_out = objectives["train"], objectives["held_out"]
    if objective is None:
        raise ValueError(f"{config.data} leaves no pair to train on; lower --held-out or give more pairs")
    rate = width_rate(config.training.learning_rate, DPO_RATE, model.config.get_text_config().hidden_size)
    with StopRequest().listening() as stop:
        run_supervised("dpo", objective, config.training, run, stop, seed=config.seed, peak_rate=rate)
    model.requires_grad_(False)
    checkpoint.write_folder(run / "model", lambda folder: _save(model, tokenizer, folder))
    if held_out is not None:
        summary = _with_bar(len(held_out), lambda advance: held_out.evaluate(config.training.micro_batch_size, advance))
        write_evaluation(run, {"held_out": summary})
        console.print(
            f"{summary['pairs']} held-out pairs: {summary['accuracy']:.1%} ordered as labelled, margin "
            f"{summary['reward_margin']:+.3f} (chosen {summary['reward_chosen']:+.3f}, rejected "
            f"{summary['reward_rejected']:+.3f})"
        )
    console.print(f"model: {run / 'model'}", soft_wrap=True, markup=False)


def _pairs(
    config: DPOConfig, model: PreTrainedModel, rows: Rows, tokenizer: PreTrainedTokenizerBase
) -> DPOObjective | None:
    """Return the objective of a split's pairs, measured under the model as it is; None when there are none."""
    if not len(rows):
        return None
    with progress_bar("reference", len(rows)) as bar:
        return DPOObjective(
            model,
            rows.column("prompt"),
            rows.column("chosen"),
            rows.column("rejected"),
            config.dpo,
            pad_id=tokenizer.pad_token_id,
            dtype=config.dtype,
            ties=rows.margins_and_ties()[:, 1].tolist(),
            batch_size=config.training.micro_batch_size,
            advance=lambda done: bar.advance(by=done),
        )


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _with_bar(total: int, judge: Callable[[Callable[[int], None]], Any]) -> Any:
    with progress_bar("evaluation", total) as bar:
        return judge(lambda done: bar.advance(by=done))


def write_evaluation(run: Path, summary: dict[str, Any]) -> None:
    """Write ``evaluation.json``."""
    content = json.dumps(summary, sort_keys=True, indent=2) + "\n"
    write_atomically(run / run_folder.EVALUATION_FILE, content.encode())


def print_pair_report(summary: dict[str, Any]) -> None:
    """Print a reward model's report on held-out pairs."""
    length = summary["length"]
    table = Table(title=f"{summary['pairs']} held-out pairs, {summary['ties']} ties", box=box.SIMPLE, show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    rows = [
        ("accuracy", _number(summary["accuracy"])),
        ("log loss, nats (0.693 knows nothing)", _number(summary["log_loss"])),
        ("expected calibration error", _number(summary["ece"])),
        ("reward, mean and standard deviation", f"{_number(summary['reward_mean'])}, {_number(summary['reward_std'])}"),
        ("correlation of reward and length", f"{_number(length['pearson'])}, ranks {_number(length['spearman'])}"),
    ]
    names = (("chosen_longer", "is longer"), ("chosen_shorter", "is shorter"), ("equally_long", "is as long"))
    rows += [
        (f"accuracy where the chosen one {text}", f"{_number(length[name]['accuracy'])} of {length[name]['pairs']}")
        for name, text in names
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    bins = Table("confidence", "pairs", "mean confidence", "accuracy", box=box.SIMPLE_HEAD, title="reliability")
    for one in summary["reliability"]:
        cells = (str(one["pairs"]), _number(one["confidence"]), _number(one["accuracy"]))
        bins.add_row(f"{one['from']:.2f} to {one['to']:.2f}", *cells)
    console.print(bins)


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
