"""What PPO starts from: the task, the language model it is trained from, and the judges of its completions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from rlhf_core import checkpoint
from rlhf_core.config import TrainConfig
from rlhf_core.data import reviews
from rlhf_core.data.dataset import build_store, open_rows, to_train_on
from rlhf_core.data.labelled import Part
from rlhf_core.data.tokenization import check_vocabulary, encode_prompts, encode_sentences
from rlhf_core.policy import build_model, context_length, load_model
from rlhf_core.reward import Classifier, ClassifierReward, Reward, TextReward
from rlhf_core.reward_model import accuracy, train_classifier
from rlhf_core.reward_sources import LoadedReward, load_rewards, weighted
from rlhf_core.rollout import check_prompts
from rlhf_core.run_setup import BASE_FOLDER, DATA_FOLDER, DataPlace, base_path, choose_device
from rlhf_core.sft import train_language_model
from rlhf_core.stopping import StopRequest, stop_between_stages
from rlhf_core.tasks import Task, cut_prompt, load_task
from rlhf_core.terminal import console, progress_bar


@dataclass(frozen=True)
class Inputs:
    """The task with its prompts in tokens: checked, and not yet in need of a run's folder."""

    task: Task
    model: PreTrainedModel | None
    """The model that was named; None: it is built."""
    prompt_ids: Sequence[list[int]] | None
    """None where the run's folder keeps them."""
    held_out_ids: Sequence[list[int]] | None
    rewards: list[LoadedReward]
    """What was named with ``--reward``."""


@dataclass(frozen=True)
class Experiment:
    """Everything that PPO starts from."""

    task: Task
    base: PreTrainedModel
    reward: Reward
    judges: dict[str, Reward]
    """What completions are evaluated by: the reward, and an evaluator that PPO never sees where there is one."""
    prompt_ids: Sequence[list[int]]
    held_out_ids: Sequence[list[int]]

    @property
    def eos_id(self) -> int:
        """The token that ends a response."""
        return self.task.tokenizer.eos_token_id

    @property
    def pad_id(self) -> int:
        """The token that fills."""
        return self.task.tokenizer.pad_token_id


def load_inputs(config: TrainConfig, place: DataPlace) -> Inputs:
    """Load what a run needs, so that whatever is wrong with it shows before there is a run.

    Raises:
        FileNotFoundError, ValueError: the device, the data, the tokenizer, the model or a reward cannot be used, or
            they do not fit together.
    """
    choose_device(config)
    config = replace(config, model=replace(config.model, path=base_path(config.model.path, place.run)))
    rewards = load_rewards(config, config.model.attention)
    task = load_task(config)
    model = load_model(config.model.path, config.model.attention) if config.model.path else None
    vocabulary = len(task.tokenizer) if model is None else model.config.get_text_config().vocab_size
    check_vocabulary(task.tokenizer, vocabulary)
    limit = config.model.context if model is None else context_length(model)
    if task.prompts is None or task.held_out_prompts is None:
        if place.kept is None:
            prepare_prompts(config, task, limit, place)
        return Inputs(task, model, None, None, rewards)
    prompt_ids, held_out_ids = (encode_prompts(task.tokenizer, one) for one in (task.prompts, task.held_out_prompts))
    for ids in (prompt_ids, held_out_ids):
        check_prompts(limit, ids, config.sampling.max_new_tokens)
    return Inputs(task, model, prompt_ids, held_out_ids, rewards)


def prepare_prompts(config: TrainConfig, task: Task, limit: int | None, place: DataPlace) -> None:
    """Write the prompts of the task's data, in tokens, where ``place`` has them; ``limit`` is the model's context.

    Raises:
        FileNotFoundError, ValueError: a row cannot be used, or no prompt fits.
    """
    longest = (limit or 2**20) - config.sampling.max_new_tokens
    if longest < 1:
        raise ValueError(
            f"sampling.max_new_tokens is {config.sampling.max_new_tokens} and the model's context {limit}, so there is "
            "no room for a prompt; lower --sampling.max-new-tokens"
        )
    place.prepare(
        lambda folder: to_train_on(
            build_store(
                str(config.data),
                "prompt",
                folder,
                tokenizer=task.tokenizer,
                longest=longest,
                errors=config.data_errors,
                held_out_share=config.held_out,
                cut_prompt=lambda text, row: cut_prompt(text, config.seed, row),
            )
        )
    )


def prepare(config: TrainConfig, inputs: Inputs, run: Path, device: torch.device, stop: StopRequest) -> Experiment:
    """Return the experiment; models that the run's folder holds already are loaded, not trained again."""
    task = inputs.task
    base: PreTrainedModel = _stage(
        run / BASE_FOLDER,
        train=lambda: _pretrained(inputs, config, device, stop),
        save=lambda model, folder: (model.save_pretrained(folder), task.tokenizer.save_pretrained(folder)),
        load=lambda folder: load_model(folder, config.model.attention),
    )
    move(base, device)
    reward, judges = _reward_and_judges(inputs, base, config, run, device, stop)
    prompt_ids, held_out_ids = inputs.prompt_ids, inputs.held_out_ids
    if prompt_ids is None or held_out_ids is None:
        prompt_ids = open_rows(run / DATA_FOLDER, "train").column("prompt")
        held_out_ids = open_rows(run / DATA_FOLDER, "held_out").column("prompt")[: config.log.evaluation_prompts]
    return Experiment(task, base, reward, judges, prompt_ids, held_out_ids)


def _reward_and_judges(
    inputs: Inputs,
    base: PreTrainedModel,
    config: TrainConfig,
    run: Path,
    device: torch.device,
    stop: StopRequest,
) -> tuple[Reward, dict[str, Reward]]:
    task = inputs.task
    if inputs.rewards:
        named = weighted(inputs.rewards, task.tokenizer, config.reward_timeout_s, device)
        parts = {name: part for name, (_, part) in named.rewards.items()}
        return named, parts if len(parts) == 1 else {"weighted sum": named, **parts}
    if task.labelled is None:
        text_reward = TextReward(reviews.score, task.tokenizer)
        return text_reward, {"reward": text_reward}
    judges: dict[str, Reward] = {
        "reward model": _classifier_reward("reward", task, base, config, run, device, stop),
        "unseen evaluator": _classifier_reward("evaluator", task, base, config, run, device, stop),
    }
    return judges["reward model"], judges


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
        return trained
    return load(folder)


def _pretrained(inputs: Inputs, config: TrainConfig, device: torch.device, stop: StopRequest) -> PreTrainedModel:
    task, steps = inputs.task, config.pretrain.steps
    model = inputs.model if inputs.model is not None else build_model(config.model, task.tokenizer)
    if steps is None:
        steps = 0 if config.model.path else task.pretrain_steps
    if steps == 0:
        return model
    if task.prompts is None:
        raise ValueError(f"pretrain.steps is {steps}, and prompts give nothing to read; train with rlhf sft first")
    sequences = encode_sentences(task.tokenizer, task.texts(), _context(model, config))
    with progress_bar("language model", steps) as bar:

        def hear(loss: float) -> None:
            bar.advance(f"loss {loss:.3f} nats/token")
            stop_between_stages(stop, "pre-training")

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


def _classifier_reward(
    part: Part,
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

    def encoded(name: Part) -> tuple[list[list[int]], list[bool]]:
        members = task.labelled[name] if task.labelled else []
        sequences = encode_sentences(task.tokenizer, [member.text for member in members], longest)
        return sequences, [member.positive for member in members]

    def trained() -> Classifier:
        title = "reward model" if part == "reward" else "evaluator"
        with progress_bar(title, config.classifier.steps) as bar:

            def hear(loss: float) -> None:
                bar.advance(f"loss {loss:.3f}")
                stop_between_stages(stop, f"the training of the {title}")

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
