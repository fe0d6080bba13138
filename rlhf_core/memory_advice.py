"""What to do about the memory that a training will take, where it is limited."""

import dataclasses
import re

from rlhf_core.memory_plan import (
    ACTIVATIONS,
    ATTENTION,
    CLASSIFIERS,
    EVALUATION,
    FITTED,
    KEPT,
    LOGITS,
    MIB,
    PRETRAINING,
    PROCESS,
    ROLLOUT,
    SAMPLING,
    TEXTS,
    Costs,
    ModelShape,
    Workload,
    plan_memory,
)


def largest_micro_batch(shape: ModelShape, work: Workload, limit: int, costs: Costs = FITTED) -> int | None:
    """Return the largest divisor of the minibatch with which no stage exceeds ``limit`` bytes; None: not even 1."""
    for rows in range(work.minibatch, 0, -1):
        if work.minibatch % rows == 0:
            plan = plan_memory(shape, dataclasses.replace(work, micro_batch=rows), costs)
            if plan.peak.total <= limit:
                return rows
    return None


def remedy(shape: ModelShape, work: Workload, limit: int, costs: Costs = FITTED) -> str:
    """Return what to change first where no micro-batch fits: what makes the largest part of the peak smaller."""
    peak = plan_memory(shape, dataclasses.replace(work, micro_batch=1), costs).peak
    if peak.parts[PROCESS] > limit:
        return f"the process alone takes {in_mib(peak.parts[PROCESS])}, so no run fits"
    part = max((name for name in peak.parts if name != PROCESS), key=lambda name: peak.parts[name])
    return f"at the peak, {peak.name}, {part} take {in_mib(peak.parts[part])}: {_change(part, peak.name, work)}"


def _change(part: str, stage: str, work: Workload) -> str:
    if stage == EVALUATION:
        return "lower --log.evaluation-prompts (0 leaves the evaluation out)"
    if stage == PRETRAINING and part in (ACTIVATIONS, ATTENTION, LOGITS):
        return "lower --pretrain.batch-size"
    if stage == CLASSIFIERS and part in (ACTIVATIONS, ATTENTION, LOGITS):
        return "lower --classifier.batch-size"
    if part == ROLLOUT:
        return "lower --ppo.batch-size"
    if part in (ACTIVATIONS, ATTENTION, LOGITS, KEPT):
        return "lower --sampling.max-new-tokens" if stage != SAMPLING else "lower --ppo.batch-size"
    if part == TEXTS:
        return "give fewer texts"
    if work.value == "separate":
        return "take --model.value shared, or an --ppo.algorithm without a value model such as rloo"
    return "take a smaller model"


def in_mib(count: int) -> str:
    """Return bytes as MiB."""
    return f"{count / MIB:,.0f} MiB"


def parse_size(text: str) -> int:
    """Return the bytes of a size such as ``2GiB``, ``1500MiB``, ``1.5GB``.

    Raises:
        ValueError: it is no such size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?)B?\s*", text, re.IGNORECASE)
    if not found or float(found[1]) == 0:
        raise ValueError(f"--memory-limit {text!r} is no size; write it as in 2GiB or 1500MiB")
    unit = found[2].upper()
    base = 1024 if unit.endswith("I") else 1000
    return int(float(found[1]) * base ** (" KMGT".index(unit[0])))
