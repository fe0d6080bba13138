"""``rlhf report``: a run as one HTML file that needs nothing else, and its pictures as PNG."""

import base64
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from rlhf_core.durable_files import write_atomically
from rlhf_core.reporting.content import MIB, Content, peak, read_content, shown_metrics
from rlhf_core.reporting.figures import bars, curves
from rlhf_core.terminal import printable

TEMPLATE = Path(__file__).with_name("report.html.j2")
PAGE_FILE = "report.html"
LONGEST_TEXT = 2000
"""Characters of a prompt or a completion that are shown."""


def write_report(run: Path, folder: Path) -> Path:
    """Write a run's report into a folder, and return the page.

    Raises:
        FileNotFoundError, ValueError: the run's logs are missing or malformed.
        OSError: the folder cannot be written.
    """
    content = read_content(run)
    pictures = draw(content)
    page = render(content, pictures)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in pictures.items():
        write_atomically(folder / name, data)
    write_atomically(folder / PAGE_FILE, page.encode("utf-8", errors="backslashreplace"))
    return folder / PAGE_FILE


def draw(content: Content) -> dict[str, bytes]:
    """Return the pictures by file name."""
    pictures = {}
    for question, metrics in shown_metrics(content.columns).items():
        if metrics:
            pictures[_file_name(question)] = curves(metrics, content.columns)
    stages = {name: row for name, row in content.summary.items() if name != "step"}
    shares = [100 * row["share"] for row in stages.values()]
    texts = [
        f"{share:.1f}%   {row['total_ms'] / row['calls']:.1f} ms a call"
        for share, row in zip(shares, stages.values(), strict=True)
    ]
    pictures["time.png"] = bars(list(stages), shares, texts, "share of the steps' time, %")
    if content.profiled:
        peaks = [peak(row) / MIB for row in stages.values()]
        where = "on the GPU" if any(row["cuda_peak_bytes"] for row in stages.values()) else "resident in the process"
        pictures["memory.png"] = bars(list(stages), peaks, [f"{one:.0f} MiB" for one in peaks], f"peak, MiB {where}")
    return pictures


def _file_name(question: str) -> str:
    return f"{question.lower().replace(' ', '_').rstrip('?')}.png"


def render(content: Content, pictures: dict[str, bytes]) -> str:
    """Return the page. Everything in it is escaped: prompts and completions may hold anything."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=False)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    encoded = {name: base64.b64encode(data).decode() for name, data in pictures.items()}
    shown = [question for question, metrics in shown_metrics(content.columns).items() if metrics]
    return template.render(
        c=content,
        curves=[(question, encoded[_file_name(question)]) for question in shown],
        time=encoded["time.png"],
        memory=encoded.get("memory.png"),
        facts=facts(content),
        evaluation=evaluation_rows(content.evaluation),
        number=lambda value: "not finite" if value is None else f"{value:.4g}",
        plain=lambda text: printable(text[:LONGEST_TEXT]) + (" …" if len(text) > LONGEST_TEXT else ""),
        pretty=lambda tree: json.dumps(tree, indent=2, sort_keys=True),
    )


def facts(content: Content) -> list[tuple[str, str]]:
    """Return the figures of the top: name, and first and last value."""
    found = []
    for name, title, form in (
        ("reward_mean", "reward, first and last step", "{:+.3f}"),
        ("kl", "KL to the reference, nats", "{:.2f}"),
        ("entropy", "entropy, nats a token", "{:.2f}"),
        ("tokens_per_second", "tokens a second", "{:,.0f}"),
    ):
        values = content.columns.get(name)
        if values is not None and len(values):
            found.append((title, f"{form.format(float(values[0]))} → {form.format(float(values[-1]))}"))
    standing = [alert for alert in content.alerts if alert.standing]
    found.append(("standing alerts", str(len(standing))))
    return found


def evaluation_rows(summary: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return the table of evaluation.json: name, before, after, change."""
    if not summary:
        return []

    def interval(part: dict[str, float]) -> str:
        return f"{part['mean']:+.3f} [{part['low']:+.3f}, {part['high']:+.3f}]"

    rows = [
        (name, interval(reward["before"]), interval(reward["after"]), interval(reward["change"]))
        for name, reward in summary["rewards"].items()
    ]
    rows.append(("KL to the reference, nats", "0", interval(summary["kl"]), ""))
    for key, title in (("entropy", "entropy, nats a token"), ("distinct_bigrams", "distinct bigrams"),
                       ("distinct_completions", "distinct completions"), ("eos_rate", "ended with EOS")):  # fmt: skip
        before, after = summary[key]["before"], summary[key]["after"]
        rows.append((title, f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}"))
    return rows
