"""``rlhf export``: a run's model as a folder for anybody: weights, tokenizer and a card."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhf_core import checkpoint, run_folder, runlog
from rlhf_core.data.dataset import REPORT_FILE
from rlhf_core.data.tokenization import load_tokenizer
from rlhf_core.policy import load_model
from rlhf_core.reward_model import load_reward_model
from rlhf_core.run_setup import DATA_FOLDER

KINDS = {
    "train": "policy trained with {algorithm}",
    "sft": "language model, fine-tuned",
    "reward": "reward model",
    "dpo": "policy trained with DPO",
}


def export(run: Path, out: Path) -> Path:
    """Write a run's model, tokenizer and card into a new folder and return where the model came from.

    A pipeline gives the policy of its PPO stage.

    Raises:
        FileExistsError: ``out`` exists and holds something.
        FileNotFoundError, ValueError: the run has no model, or it is damaged.
        OSError: the folder cannot be written; nothing is left of it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{str(out)!r} exists; give a new folder to export to")
    config = _read_json(run / run_folder.CONFIG_FILE)
    kind = run_folder.kind_of(config)
    if kind == "pipeline":
        if not (run / "ppo" / run_folder.CONFIG_FILE).is_file():
            raise FileNotFoundError(f"{run} has no stage ppo yet; continue it with rlhf pipeline --resume")
        return export(run / "ppo", out)
    if kind == "eval":
        raise ValueError(f"{run} is an evaluation, which makes no model; export the run that it judged")
    source = _model_of(run, kind)
    load_reward_model(source, "eager") if kind == "reward" else load_model(source, "eager")
    load_tokenizer(source)
    card = model_card(run, kind, config, source)

    def write(folder: Path) -> None:
        for path in sorted(source.rglob("*")):
            if path.is_file() and path.name != checkpoint.MANIFEST:
                target = folder / path.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                # Not copyfile, whose error on a full disk would name the file that is read.
                with path.open("rb") as read, target.open("wb") as written:
                    shutil.copyfileobj(read, written)
        (folder / "README.md").write_text(card, encoding="utf-8")

    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_folder(out, write)
    return source


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = runlog.parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}; it must hold an object")
    return found


def _model_of(run: Path, kind: str) -> Path:
    """Return the folder of the model: the newest sound checkpoint's policy, or a stage's result."""
    if kind == "train":
        damaged: list[str] = []
        newest = checkpoint.newest_sound(run / "checkpoints", damaged.append)
        if newest is None:
            why = "; ".join(damaged) or "it has not begun its steps"
            raise FileNotFoundError(f"{run} has no sound checkpoint; {why}")
        return newest / "policy"
    folder = run / "model"
    if not folder.is_dir():
        raise FileNotFoundError(f"{run} has no model yet; continue it with rlhf {kind} --resume --name {run.name}")
    checkpoint.check_folder(folder)
    return folder


def model_card(run: Path, kind: str, config: dict[str, Any], source: Path) -> str:
    """Return the card as Markdown, with the front matter of the hub."""
    algorithm = config["ppo"].get("algorithm", "ppo") if kind == "train" else ""
    tags = {"train": ["rlhf", algorithm], "sft": ["sft"], "reward": ["rlhf", "reward-model"]}.get(kind, ["rlhf", kind])
    task = "text-classification" if kind == "reward" else "text-generation"
    metrics = run / runlog.METRICS_FILE
    rows = first_and_last(runlog.read(metrics)) if metrics.is_file() else []
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {task}",
        "tags:",
        *(f"- {tag}" for tag in tags),
        "---",
    ]
    lines += ["", f"# A {KINDS[kind].format(algorithm=algorithm.upper())}", ""]
    step = int(source.parent.name.removeprefix("step_")) if kind == "train" else rows[-1]["step"] if rows else 0
    lines += [f"Made by `rlhf {kind}` of the RLHF Systems Kit, after {step:,} steps, with seed {config['seed']}.", ""]
    lines += ["## How to load", "", "```python", *_loading(kind), "```", "", "## Data", "", *_data_lines(run, config)]
    if rows:
        lines += ["", "## Metrics", "", f"| | step {rows[0]['step']} | step {rows[-1]['step']} |", "|---|---|---|"]
        names = sorted(rows[0].keys() - {"step", "nonfinite"})
        lines += [f"| {name} | {_cell(rows[0].get(name))} | {_cell(rows[-1].get(name))} |" for name in names]
    if (run / run_folder.EVALUATION_FILE).is_file():
        found = _flat(_read_json(run / run_folder.EVALUATION_FILE))
        lines += ["", "## Evaluation", "", "| | |", "|---|---|"]
        lines += [f"| {name} | {_cell(value)} |" for name, value in found if "reliability" not in name]
    shown = json.dumps(_without_paths(config), indent=2, sort_keys=True)
    return "\n".join([*lines, "", "## Configuration", "", "```json", shown, "```", ""])


def first_and_last(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the first row and the last, or the only one; no others are held."""
    found: list[dict[str, Any]] = []
    for row in rows:
        found[1:] = [row]
    return found


def _loading(kind: str) -> list[str]:
    name = "AutoModelForSequenceClassification" if kind == "reward" else "AutoModelForCausalLM"
    lines = [f"from transformers import {name}, AutoTokenizer", "", 'folder = "path/to/this/folder"']
    lines += [f"model = {name}.from_pretrained(folder)", "tokenizer = AutoTokenizer.from_pretrained(folder)"]
    if kind == "reward":
        return [
            *lines,
            "# The reward is read at the end-of-sequence token.",
            "text = prompt + completion + tokenizer.eos_token",
            'ids = tokenizer(text, split_special_tokens=False, return_tensors="pt")',
            'reward = model(ids["input_ids"]).logits',
        ]
    return [
        *lines,
        'ids = tokenizer("A prompt", return_tensors="pt", return_token_type_ids=False)',
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=32, do_sample=True)[0]))",
    ]


def _data_lines(run: Path, config: dict[str, Any]) -> list[str]:
    data = config.get("data")
    if data is None:
        return ["The kit's embedded film reviews."]
    lines = [f"`{_name(data)}`"]
    report = run / DATA_FOLDER / REPORT_FILE
    if report.is_file():
        lines += ["", "| | |", "|---|---|"]
        lines += [f"| {name} | {_cell(value)} |" for name, value in _flat(_read_json(report))]
    return lines


def _name(path: str) -> str:
    """Return a source's name without the folders of one machine."""
    return path if path.startswith("hub:") else Path(path).name.replace("`", "'")


def _without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration with the last parts of its paths alone."""
    named = {key: _name(config[key]) for key in ("data", "reference") if isinstance(config.get(key), str)}
    model = dict(config.get("model", {}))
    if isinstance(model.get("path"), str) and Path(model["path"]).is_absolute():
        model["path"] = Path(model["path"]).name
    rewards = [
        one if not Path(one.removeprefix("model:")).is_absolute() else Path(one).name for one in config["reward"]
    ]
    return {**config, **named, "model": model, "reward": rewards}


def _flat(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(tree, dict):
        return [pair for key in sorted(tree) for pair in _flat(tree[key], f"{prefix}{key} ")]
    return [(prefix.strip(), tree)]


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
