"""What :mod:`rlhf_core.memory_plan` plans with, from a run's configuration and data, without making any weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_core.config import TrainConfig
from rlhf_core.data.dataset import open_rows
from rlhf_core.data.tokenization import encode_prompts, encode_sentences
from rlhf_core.evaluation import PROMPTS_AT_A_TIME
from rlhf_core.experiment import prepare_prompts
from rlhf_core.memory_plan import ModelShape, Workload
from rlhf_core.packing import packable
from rlhf_core.policy import (
    as_computed_here,
    build_model,
    context_length,
    model_source,
    quiet_transformers,
    require_model_source,
)
from rlhf_core.reward_sources import parse_reward
from rlhf_core.run_setup import DATA_FOLDER, choose_device, data_place
from rlhf_core.tasks import Task, load_task

GPT2_LIKE = ("gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "gpt_bigcode")
TEXTS_READ = 2_000
"""Texts of which the lengths are taken; those of the others are like theirs."""


def planned(config: TrainConfig, process: int, runs: Path) -> tuple[ModelShape, Workload]:
    """Return the shape and the sizes of a run.

    Args:
        config: of the run.
        process: bytes of a process that has loaded what a run loads.
        runs: where runs are kept; prompts of a file are prepared beside them and removed again.

    Raises:
        FileNotFoundError, ValueError: what the run itself would raise; or it would run on a GPU.
    """
    if choose_device(config).type != "cpu":
        raise ValueError("--explain-memory knows the memory of runs on the CPU; take --device cpu")
    task = load_task(config)
    model = _without_weights(config, task)
    shape = shape_of(model, config.model.attention)
    limit = context_length(model)
    prompts, held_out = _prompt_lengths(config, task, limit, runs)
    steps = config.pretrain.steps
    if steps is None:
        steps = 0 if config.model.path else task.pretrain_steps
    texts = _text_lengths(task, min(limit or 1024, 1024)) if steps or task.labelled else []
    ppo, judged = config.ppo, bool(task.labelled) and not config.reward
    return shape, Workload(
        process=process,
        prompt=max(prompts),
        response=config.sampling.max_new_tokens,
        batch=ppo.batch_size,
        minibatch=ppo.minibatch_size,
        micro_batch=ppo.micro_batch_size,
        workers=1 if config.numerics == "portable" else config.resolved_threads,
        value=config.value_model,
        bfloat16=config.dtype == "bfloat16",
        evaluation_rows=min(PROMPTS_AT_A_TIME, config.log.evaluation_prompts, held_out),
        pretrain_rows=config.pretrain.batch_size if steps else 0,
        classifier_rows=config.classifier.batch_size if judged else 0,
        longest_text=max(texts, default=0),
        text_tokens=sum(texts),
        reward_weights=sum(map(_reward_weights, config.reward)),
    )


def shape_of(model: Any, attention: str) -> ModelShape:
    """Return the shape of a causal language model; its weights may be on torch's meta device."""
    shape = model.config.get_text_config()
    width, heads = shape.hidden_size, shape.num_attention_heads
    head_width = getattr(shape, "head_dim", None) or width // heads
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    return ModelShape(
        family="gpt2" if shape.model_type in GPT2_LIKE else "llama",
        layers=shape.num_hidden_layers,
        width=width,
        inner=getattr(shape, "intermediate_size", None) or getattr(shape, "n_inner", None) or 4 * width,
        heads=heads,
        key_value_width=(getattr(shape, "num_key_value_heads", None) or heads) * head_width,
        vocabulary=embeddings.shape[0],
        weights=_count(model),
        embeddings=embeddings.numel(),
        head=0 if head is None or head.weight is embeddings else head.weight.numel(),
        eager=attention == "eager",
        packed=packable(model) is not None,
    )


def _count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _without_weights(config: TrainConfig, task: Task) -> Any:
    with torch.device("meta"):
        if config.model.path is None:
            return build_model(config.model, task.tokenizer)
        return as_computed_here(_from_config(AutoModelForCausalLM, config.model.path))


def _from_config(kind: Any, path: str) -> Any:
    require_model_source(path)
    with quiet_transformers(), torch.device("meta"):
        return kind.from_config(AutoConfig.from_pretrained(model_source(path)), dtype=torch.float32)


def _reward_weights(text: str) -> int:
    folder = parse_reward(text).folder
    return 0 if folder is None else _count(_from_config(AutoModelForSequenceClassification, folder))


def _prompt_lengths(config: TrainConfig, task: Task, limit: int | None, runs: Path) -> tuple[Sequence[int], int]:
    """Return the lengths of the prompts in tokens, and the number of held-out ones."""
    if task.prompts is not None and task.held_out_prompts is not None:
        return [len(ids) for ids in encode_prompts(task.tokenizer, task.prompts)], len(task.held_out_prompts)
    with data_place(runs, None) as place:
        prepare_prompts(config, task, limit, place)
        folder = place.scratch / DATA_FOLDER
        rows = open_rows(folder, "train").column("prompt").lengths().tolist()
        return rows, len(open_rows(folder, "held_out").column("prompt"))


def _text_lengths(task: Task, longest: int) -> list[int]:
    """Return a length for each text that models are trained on before PPO, of every n-th the true one."""
    texts = task.texts()
    every = max(1, len(texts) // TEXTS_READ)
    lengths = [len(ids) for ids in encode_sentences(task.tokenizer, texts[::every], longest)]
    return [length for length in lengths for _ in range(every)][: len(texts)]
