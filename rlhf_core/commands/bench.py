"""``rlhf bench``."""

import json
from dataclasses import dataclass

from rlhf_core.commands.options import parse


@dataclass(frozen=True)
class Options:
    """Time the kernels beside their peers and the limit of the machine, and print the ratios as one table."""

    match: str = ""
    """Only contests whose name contains this, such as gae or 65536x258."""
    rounds: int = 5
    """Times each contestant runs; the shortest counts."""
    threads: int = 2
    """Threads of torch and of the kernels."""
    json: bool = False
    """Print one JSON object instead of the table: contest, contestant, milliseconds, ratio to ours."""


def run(arguments: list[str]) -> int:
    """Run the contests; return the exit code."""
    options = parse(Options, arguments, "bench")
    if options.rounds < 1 or options.threads < 1:
        raise ValueError(f"--rounds is {options.rounds} and --threads {options.threads}; both must be at least 1")
    import torch

    from rlhf_kernels import contests

    chosen = [name for name in contests.CONTESTS if options.match in name]
    if not chosen:
        raise ValueError(f"--match {options.match!r} fits no contest; there are {', '.join(contests.CONTESTS)}")
    torch.set_num_threads(options.threads)
    results: dict[str, dict[str, dict[str, float]]] = {}
    missing: dict[str, str] = {}
    for name in chosen:
        ready: contests.Contestants = {}
        for who in contests.CONTESTS[name]:
            try:
                ready[who] = contests.prepare(name, who)
            except contests.PeerMissingError as error:
                missing[who] = str(error)
        best = contests.best_times_s(ready, options.rounds)
        ours = best[contests.OURS]
        results[name] = {who: {"ms": seconds * 1e3, "ratio": seconds / ours} for who, seconds in best.items()}
    if options.json:
        print(json.dumps({"contests": results, "missing": missing}, indent=2))
        return 0
    _print_table(results, missing)
    return 0


def _print_table(results: dict[str, dict[str, dict[str, float]]], missing: dict[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("contest", "who", caption="ratio: time over ours")
    table.add_column("ms", justify="right")
    table.add_column("ratio", justify="right")
    for name, contestants in results.items():
        for place, (who, times) in enumerate(contestants.items()):
            table.add_row("" if place else name, who, f"{times['ms']:.2f}", f"{times['ratio']:.2f}")
        table.add_section()
    console = Console()
    console.print(table)
    for who, reason in missing.items():
        console.print(f"left out: {who} ({reason})", style="dim", markup=False)
