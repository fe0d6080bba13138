"""How the PPO step's time and memory grow with batch, response length, vocabulary and layers, beside its arithmetic.

    python verification/benchmarks/bench_cost.py

measures five sizes of each, every one in a process of its own, and writes the table and the plot of `docs/cost.md`.

What grows is found by fitting y = a + b · size^p, a and b not negative, to the relative error: the constant part, such
as the libraries' memory or what a step does for one token as for many, would bend a straight line in logarithms. The
counted operations are fitted in the same way, so that p can be compared with p.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar, nnls

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import bench_ppo_step  # noqa: E402 - a script: its folder is no package
import ppo_workload as workload  # noqa: E402

DOCS = HERE.parents[1] / "docs"


SMALL = workload.Shape(layers=2, heads=4, width=128, vocabulary=2048)


@dataclass(frozen=True)
class Point:
    """A workload: model shape, completions a step, response length."""

    shape: workload.Shape = SMALL
    batch: int = 16
    new_tokens: int = 48

    def measured(self, steps: int) -> dict[str, Any]:
        """Return the step's figures, measured in this process."""
        return bench_ppo_step.time_steps(self.shape, steps, batch=self.batch, new_tokens=self.new_tokens)

    def operations(self) -> float:
        """Return the operations of a step."""
        return sum(workload.operations(self.shape, self.new_tokens, self.batch).values())


def _shaped(**changes: Any) -> Point:
    return Point(shape=dataclasses.replace(SMALL, **changes))


AXES: dict[str, dict[int, Point]] = {
    "batch": {size: Point(batch=size) for size in (8, 16, 32, 48, 64)},
    "response length": {size: Point(new_tokens=size) for size in (16, 48, 96, 192, 384)},
    "vocabulary": {size: _shaped(vocabulary=size) for size in (512, 2048, 8192, 16384, 32768)},
    "layers": {size: _shaped(layers=size) for size in (1, 2, 4, 8, 16)},
}


@dataclass(frozen=True)
class Growth:
    """y = a + b · size^p."""

    constant: float
    factor: float
    exponent: float

    def at(self, sizes: np.ndarray) -> np.ndarray:
        """Return the fitted values."""
        return self.constant + self.factor * sizes**self.exponent


def fitted(sizes: list[float], values: list[float]) -> Growth:
    """Return the growth with the least squared relative errors; of any p, a and b follow by least squares."""
    x, y = np.asarray(sizes, float), np.asarray(values, float)
    scaled = x / x.max()

    def solve(exponent: float) -> tuple[np.ndarray, float]:
        columns = np.stack([np.ones_like(x), scaled**exponent], axis=1) / y[:, None]
        coefficients, error = nnls(columns, np.ones_like(y))
        return coefficients, error

    # The error has several valleys at times: look everywhere, then closely.
    coarse = min(np.linspace(0.05, 3.0, 60), key=lambda exponent: solve(exponent)[1])
    found = minimize_scalar(lambda p: solve(p)[1], bounds=(max(0.05, coarse - 0.05), coarse + 0.05), method="bounded")
    (constant, factor), _ = solve(found.x)
    return Growth(float(constant), float(factor / x.max() ** found.x), float(found.x))


def slope(sizes: list[float], values: list[float], first: int) -> float:
    """Return the slope in logarithms between the point ``first`` and the largest."""
    return float(np.log(values[-1] / values[first]) / np.log(sizes[-1] / sizes[first]))


def measure_all(steps: int, axes: list[str]) -> dict[str, dict[str, list[float]]]:
    """Return sizes, seconds, bytes and operations of each axis."""
    found: dict[str, dict[str, list[float]]] = {}
    for axis in axes:
        rows: dict[str, list[float]] = {"size": [], "seconds": [], "bytes": [], "operations": []}
        for size, point in AXES[axis].items():
            command = [sys.executable, __file__, "--point", axis, str(size), "--steps", str(steps)]
            outcome = subprocess.run(command, capture_output=True, text=True, check=False)
            if outcome.returncode:
                sys.exit(f"{' '.join(command)} failed:\n{outcome.stderr[-2000:]}")
            figures = json.loads(outcome.stdout.splitlines()[-1])
            rows["size"].append(size)
            rows["seconds"].append(figures["seconds"])
            rows["bytes"].append(figures["peak_memory_bytes"])
            rows["operations"].append(point.operations())
        found[axis] = rows
    return found


def table(found: dict[str, dict[str, list[float]]]) -> str:
    """Return the tables in Markdown."""
    lines = [
        "| grows | from, to | exponent of operations | of time | of memory | constant part of time | of memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for axis, rows in found.items():
        sizes = rows["size"]
        needed, time_s, memory = (fitted(sizes, rows[name]) for name in ("operations", "seconds", "bytes"))
        lines.append(
            f"| {axis} | {sizes[0]}, {sizes[-1]} | {needed.exponent:.2f} | {time_s.exponent:.2f} | "
            f"{memory.exponent:.2f} | {time_s.constant:.2f} s | {memory.constant / 2**20:.0f} MiB |"
        )
    for axis, rows in found.items():
        lines += ["", f"| {axis} | " + " | ".join(str(size) for size in rows["size"]) + " |", "|---" * 6 + "|"]
        lines.append("| GFLOP a step | " + " | ".join(f"{one / 1e9:.1f}" for one in rows["operations"]) + " |")
        lines.append("| seconds a step | " + " | ".join(f"{one:.2f}" for one in rows["seconds"]) + " |")
        lines.append("| peak memory, MiB | " + " | ".join(f"{one / 2**20:.0f}" for one in rows["bytes"]) + " |")
    return "\n".join(lines)


def draw(found: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Draw time and memory over each size, with the fits, and operations at the pace of the largest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    panels = figure.subplots(2, len(found), squeeze=False)
    for column, (axis, rows) in enumerate(found.items()):
        sizes = np.asarray(rows["size"], float)
        fine = np.geomspace(sizes[0], sizes[-1], 50)
        for panel, name, unit in ((panels[0][column], "seconds", 1.0), (panels[1][column], "bytes", 2.0**20)):
            values = np.asarray(rows[name]) / unit
            growth = fitted(rows["size"], rows[name])
            panel.plot(sizes, values, "o", color="#1f77b4")
            panel.plot(fine, growth.at(fine) / unit, "-", color="#1f77b4", label=f"a + b · size^{growth.exponent:.2f}")
            if name == "seconds":
                needed = fitted(rows["size"], rows["operations"])
                pace = values[-1] / rows["operations"][-1]
                label = f"operations, size^{needed.exponent:.2f}"
                panel.plot(fine, needed.at(fine) * pace, "--", color="#999999", label=label)
            panel.set(xscale="log", xlabel=axis, ylim=(0, 1.15 * values.max()))
            panel.set_xticks(sizes, [f"{size:g}" for size in sizes], minor=False, fontsize=7)
            panel.set_xticks([], minor=True)
            panel.legend(fontsize=7, loc="upper left")
    panels[0][0].set_ylabel("seconds a step")
    panels[1][0].set_ylabel("peak memory, MiB")
    figure.savefig(path, dpi=80, metadata={"Software": None})


def write_section(path: Path, text: str) -> None:
    """Replace what stands between the markers of the document."""
    begin, end = "<!-- measured -->", "<!-- end of measured -->"
    document = path.read_text(encoding="utf-8")
    before, _, rest = document.partition(begin)
    _, _, after = rest.partition(end)
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def main() -> None:
    """Measure a point in this process, or all points in processes of their own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--axis", choices=AXES, action="append", help="only these, and nothing is written")
    parser.add_argument("--point", nargs=2, metavar=("AXIS", "SIZE"), help="print one point's figures as JSON")
    arguments = parser.parse_args()
    if arguments.point:
        axis, size = arguments.point
        print(json.dumps(AXES[axis][int(size)].measured(arguments.steps)))
        return
    found = measure_all(arguments.steps, arguments.axis or list(AXES))
    print(table(found))
    if not arguments.axis:
        write_section(DOCS / "cost.md", table(found))
        draw(found, DOCS / "cost.png")


if __name__ == "__main__":
    main()
