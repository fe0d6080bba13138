"""The trainer's state as a checkpoint folder, and back.

``policy/`` is an ordinary transformers folder with its tokenizer; beside it lie the value model where there is one,
the optimizer, the random generators (all safetensors) and ``state.json``. The data order and the sampler's uniforms are
functions of (seed, step), so the step is all that is needed of them.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from rlhf_core.checkpoint import load_optimizer, load_tensors, read_numbers, save_optimizer
from rlhf_core.config import TrainConfig
from rlhf_core.optim import adamw
from rlhf_core.policy import ActorCritic, Reference, load_model
from rlhf_core.seeding import rng_state, set_rng_state
from rlhf_core.updates import PPOState


def new_state(model: ActorCritic, reference: Reference, config: TrainConfig) -> PPOState:
    """Return the state before the first step."""
    ppo = config.ppo
    optimizer = adamw(
        (parameter for parameter in model.parameters() if parameter.requires_grad),
        lr=ppo.learning_rate,
        beta2=ppo.adam_beta2,
        eps=ppo.adam_eps,
        weight_decay=ppo.weight_decay,
    )
    if model.value_trunk is not None:  # frozen, and the same in both: one of them is enough
        model.value_trunk.set_input_embeddings(reference.lm.get_input_embeddings())
    return PPOState(model, reference, optimizer, ppo.kl_coef)


def save_state(state: PPOState, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a state's files into a folder."""
    state.model.lm.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    if state.model.has_value:
        save_file(_value_tensors(state.model), folder / "value.safetensors")
    save_optimizer(state.optimizer, _parameter_names(state.model), folder / "optimizer.safetensors")
    save_file(rng_state(), folder / "rng.safetensors")
    numbers = {"step": state.step, "kl_coef": state.kl_coef}
    (folder / "state.json").write_text(json.dumps(numbers, sort_keys=True) + "\n", encoding="utf-8")


def load_state(folder: Path, reference: Reference, config: TrainConfig, device: torch.device) -> PPOState:
    """Read back what :func:`save_state` wrote; torch's, NumPy's and Python's generators are restored too.

    Raises:
        ValueError: a tensor or a number is missing, or is not what the configuration asks for; the message names it.
    """
    lm = load_model(folder / "policy", config.model.attention)
    model = ActorCritic(lm, config.value_model)
    if model.has_value:
        # Not strict, as the file has the value model alone; that it has all of that was checked.
        model.load_state_dict(load_tensors(folder / "value.safetensors", _value_tensors(model)), strict=False)
    state = new_state(model.to(device), reference, config)
    load_optimizer(state.optimizer, _parameter_names(model), folder / "optimizer.safetensors")
    set_rng_state(load_file(folder / "rng.safetensors"))
    numbers = read_numbers(folder / "state.json", {"step": int, "kl_coef": float})
    state.step, state.kl_coef = numbers["step"], numbers["kl_coef"]
    return state


def _value_tensors(model: ActorCritic) -> dict[str, torch.Tensor]:
    return {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.named_parameters()
        if name.startswith(("value_trunk.", "value_head.")) and tensor.requires_grad
    }


def _parameter_names(model: ActorCritic) -> dict[torch.Tensor, str]:
    return {parameter: name for name, parameter in model.named_parameters()}
