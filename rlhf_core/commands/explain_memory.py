"""``rlhf train --explain-memory``: the memory of a run before there is one."""

from pathlib import Path

from rich.table import Table

from rlhf_core.config import TrainConfig
from rlhf_core.memory_advice import in_mib, largest_micro_batch, remedy
from rlhf_core.memory_inputs import planned
from rlhf_core.memory_plan import (
    EVALUATION,
    MIB,
    MemoryPlan,
    ModelShape,
    Workload,
    plan_memory,
)
from rlhf_core.profiling import peak_memory_bytes
from rlhf_core.terminal import console


def explain(config: TrainConfig, limit: int | None, runs: Path) -> int:
    """Print what a run will hold and, given a limit, the micro-batch that fits; return 1 if the run exceeds it."""
    shape, work = planned(config, peak_memory_bytes(), runs)
    plan = plan_memory(shape, work)
    console.print(_table(plan))
    console.print(
        f"peak: {in_mib(plan.peak.total)} during {plan.peak.name}, with micro-batches of {work.micro_batch}, prompts "
        f"of {work.prompt} tokens and responses of {work.response}, the longest there can be",
        soft_wrap=True,
    )
    if plan.peak.name == EVALUATION:
        console.print(f"up to the last step, as timings.jsonl has it: {in_mib(plan.training_peak)}")
    if limit is None:
        return 0
    console.print(_against(limit, shape, work, plan), soft_wrap=True)
    return int(plan.peak.total > limit)


def _table(plan: MemoryPlan) -> Table:
    table = Table("MiB", title="Memory by part and stage")
    for stage in plan.stages:
        table.add_column(stage.name, justify="right", style="bold" if stage is plan.peak else None)
    names = dict.fromkeys(name for stage in plan.stages for name in stage.parts)
    for name in names:
        sizes = [stage.parts.get(name, 0) for stage in plan.stages]
        if any(sizes):
            table.add_row(name, *(f"{size / MIB:,.1f}" if size else "" for size in sizes))
    table.add_section()
    table.add_row("together", *(f"{stage.total / MIB:,.0f}" for stage in plan.stages))
    return table


def _against(limit: int, shape: ModelShape, work: Workload, plan: MemoryPlan) -> str:
    best = largest_micro_batch(shape, work, limit)
    if best is None:
        return f"no micro-batch fits into {in_mib(limit)}: {remedy(shape, work, limit)}"
    fits = "fits into" if plan.peak.total <= limit else "exceeds"
    return f"this run {fits} {in_mib(limit)}; the largest micro-batch that fits: --ppo.micro-batch-size {best}"
