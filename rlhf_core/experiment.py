"""What PPO starts from: the task, the language model it is trained from, and the judges of its completions."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from rlhf_core import checkpoint, reviews
from rlhf_core.config import TrainConfig
from rlhf_core.labelled import Part
from rlhf_core.policy import build_model, load_model
from rlhf_core.reward import Classifier, ClassifierReward, Reward, TextReward
from rlhf_core.reward_model import accuracy, train_classifier
from rlhf_core.rollout import check_context
from rlhf_core.sft import train_language_model
from rlhf_core.stopping import StopRequest, stop_between_stages
from rlhf_core.tasks import Task, load_task
from rlhf_core.terminal import console, progress_bar
from rlhf_core.tokenization import check_vocabulary, encode_prompts, encode_sentences


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
    check_vocabulary(task.tokenizer, model.config.get_text_config().vocab_size)
    ids = [encode_prompts(task.tokenizer, prompts) for prompts in (task.prompts, task.held_out_prompts)]
    for prompt_ids in ids:
        check_context(model, prompt_ids, config.sampling.max_new_tokens)
    return Inputs(task, *ids)


def starting_model(task: Task, config: TrainConfig) -> PreTrainedModel:
    """Return the language model that pre-training, or PPO, starts from."""
    path, attention = config.model.path, config.model.attention
    return load_model(path, attention) if path else build_model(config.model, task.tokenizer)


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
    sequences = encode_sentences(task.tokenizer, task.texts, _context(model, config))
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
