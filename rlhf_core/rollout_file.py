"""The rollouts that a run keeps to compute its metrics from again: those of the steps right after its checkpoints."""

from pathlib import Path

import torch
from safetensors.torch import save

from rlhf_core import checkpoint
from rlhf_core.durable_files import write_atomically
from rlhf_core.ppo import StepResult

ROLLOUTS_FOLDER = "rollouts"


def rollout_path(run: Path, step: int) -> Path:
    """Return where a step's rollout is kept."""
    return run / ROLLOUTS_FOLDER / f"step_{step:06d}.safetensors"


def keep_rollout(run: Path, step: int, result: StepResult) -> None:
    """Write a step's tokens, masks, rewards and the sampler's log-probs, if the weights that drew them are kept."""
    if not checkpoint.step_folder(run / "checkpoints", step - 1).is_dir():
        return
    rollout = result.rollout
    tensors = {
        "input_ids": rollout.input_ids_BL,
        "attention_mask": rollout.attention_mask_BL,
        "response_mask": rollout.response_mask_BT,
        "sampler_logprobs": rollout.sampler_logprobs_BT,
        "rewards": result.rewards_B,
    }
    path = rollout_path(run, step)
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def prune_rollouts(run: Path) -> None:
    """Remove the rollouts whose checkpoint is gone."""
    for path in (run / ROLLOUTS_FOLDER).glob("step_*.safetensors"):
        step = int(path.stem.removeprefix("step_"))
        if not checkpoint.step_folder(run / "checkpoints", step - 1).is_dir():
            path.unlink()


def steps_with_rollouts(run: Path) -> list[int]:
    """Return the steps whose rollout and the checkpoint before it are there."""
    found = (int(path.stem.removeprefix("step_")) for path in (run / ROLLOUTS_FOLDER).glob("step_*.safetensors"))
    return sorted(step for step in found if checkpoint.step_folder(run / "checkpoints", step - 1).is_dir())


def read_rollout(path: Path) -> dict[str, torch.Tensor]:
    """Return a rollout's tensors.

    Raises:
        ValueError: the file is damaged, or its tensors do not fit together; the message names it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}); it was damaged") from None
    names = {"input_ids", "attention_mask", "response_mask", "sampler_logprobs", "rewards"}
    if tensors.keys() != names:
        raise ValueError(f"{path} holds {', '.join(sorted(tensors))}; it must hold {', '.join(sorted(names))}")
    rows, length = tensors["response_mask"].shape
    shapes_fit = (
        tensors["input_ids"].shape == tensors["attention_mask"].shape
        and len(tensors["input_ids"]) == rows == len(tensors["rewards"])
        and tensors["sampler_logprobs"].shape == (rows, length)
        and tensors["input_ids"].shape[1] > length
    )
    if not shapes_fit:
        raise ValueError(f"{path}: its tensors are of shapes that do not fit together")
    return tensors
