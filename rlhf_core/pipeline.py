"""``rlhf pipeline``: preferences → sft on the chosen ones → reward model → PPO → evaluation, stage by stage like make.

Each stage is a run in a folder of the pipeline's. Its key is the SHA-256 of its configuration, the data's content and
the models that it starts from. A finished stage whose key and files are as they were is kept; one that was interrupted
goes on; one whose key has changed, or whose files were damaged, is done again, and so are those that depend on it.
"""

import dataclasses
import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_core import checkpoint, run_folder, runlog
from rlhf_core.alerting.thresholds import default_thresholds
from rlhf_core.alerting.watch import WatchOptions
from rlhf_core.config import RunConfig, TrainConfig
from rlhf_core.config_files import to_json
from rlhf_core.data.dataset import DataReport, fingerprint, read_examples
from rlhf_core.data.dialogues import Chat
from rlhf_core.data.tokenization import load_tokenizer, untrained_tokenizer
from rlhf_core.durable_files import write_atomically
from rlhf_core.experiment import load_inputs
from rlhf_core.judging import load_judging, run_judging
from rlhf_core.policy import model_folder, model_source
from rlhf_core.reward_functions import load_function
from rlhf_core.reward_sources import RewardSource, parse_reward
from rlhf_core.run_setup import DataPlace, begin_run, choose_device, data_place
from rlhf_core.stage_config import EvalConfig, PipelineConfig, RewardConfig, SFTConfig
from rlhf_core.stages import load_stage_inputs, run_reward, run_sft
from rlhf_core.terminal import console
from rlhf_core.training import run_training

STAGE_FILE = "stage.json"
NOT_OUTPUTS = (STAGE_FILE, runlog.TIMINGS_FILE, run_folder.ENVIRONMENT_FILE)


@dataclass(frozen=True)
class Stage:
    """One stage: its folder's name, configuration, and the stages whose models it starts from."""

    name: str
    config: RunConfig
    """With paths within the pipeline's folder, so that it is the same wherever that lies."""
    needs: tuple[str, ...]
    load: Callable[[Any, DataPlace], Any]
    execute: Callable[..., None]


def stages_of(config: PipelineConfig) -> list[Stage]:
    """Return the stages in their order."""
    names = [field.name for field in dataclasses.fields(RunConfig) if field.name != "reward"]
    common: dict[str, Any] = {name: getattr(config, name) for name in names}
    from_sft = dataclasses.replace(config.model, path="sft")
    sft = SFTConfig(**common, model=config.model, training=config.sft)
    reward = RewardConfig(**common, model=from_sft, training=config.reward_model, preference=config.preference)
    scored = {**common, "reward": ("model:reward", *config.reward)}
    judged_by_eval = dataclasses.replace(config.log, evaluation_prompts=0)
    ppo = TrainConfig(**scored, model=from_sft, sampling=config.sampling, ppo=config.ppo, log=judged_by_eval)

    def judged(name: str) -> EvalConfig:
        policy = dataclasses.replace(config.model, path=name)
        return EvalConfig(**scored, model=policy, reference="sft", sampling=config.sampling, judging=config.judging)

    return [
        Stage("sft", sft, (), lambda one, place: load_stage_inputs(one, "demonstration", place), run_sft),
        Stage("reward", reward, ("sft",), lambda one, place: load_stage_inputs(one, "pair", place), run_reward),
        Stage("ppo", ppo, ("sft", "reward"), load_inputs, _train),
        Stage("eval-sft", judged("sft"), ("sft", "reward"), load_judging, run_judging),
        Stage("eval-ppo", judged("ppo"), ("sft", "reward", "ppo"), load_judging, run_judging),
    ]


def _train(config: TrainConfig, inputs: Any, run: Path, *, resumed: bool) -> None:
    run_training(config, inputs, run, resumed=resumed, watch=WatchOptions(default_thresholds(), None))


def located_in(config: Any, run: Path) -> Any:
    """Return a stage's configuration with its paths within the pipeline's folder resolved."""
    inside = ("sft", "reward", "ppo")
    changes: dict[str, Any] = {
        "reward": tuple(f"model:{run / 'reward'}" if one == "model:reward" else one for one in config.reward)
    }
    if config.model.path in inside:
        changes["model"] = dataclasses.replace(config.model, path=str(run / config.model.path))
    if getattr(config, "reference", None) in inside:
        changes["reference"] = str(run / config.reference)
    return dataclasses.replace(config, **changes)


def load_pipeline(config: PipelineConfig, place: DataPlace) -> dict[str, Any]:
    """Check the data from end to end and return its fingerprint: nothing is trained before all rows were seen.

    Raises:
        FileNotFoundError, ValueError: the data, or the tokenizer that renders its messages, cannot be used.
    """
    choose_device(config)
    if config.data is None:
        raise ValueError("--data is missing; give preferences: a data file, a folder of them, or hub:NAME")
    chat = Chat(load_tokenizer(config.model.path) if config.model.path else untrained_tokenizer())
    pairs = sum(1 for _ in read_examples(config.data, "pair", chat, config.data_errors, DataReport(config.data)))
    if not pairs:
        raise ValueError(f"--data {config.data!r} has no usable preference; give rows of prompt, chosen and rejected")
    found: dict[str, Any] = {"data": fingerprint(config.data)}
    if config.model.path and Path(config.model.path).is_dir():
        found["model"] = files_of(model_folder(config.model.path))
    elif config.model.path:
        found["model"] = config.model.path
    found["reward"] = {text: _content_of(parse_reward(text)) for text in config.reward}
    return found


def _content_of(source: RewardSource) -> Any:
    """Return what a reward's content is known by: a model's files, or the source of a function's module."""
    if source.folder is not None:
        folder = Path(model_source(source.folder))
        return files_of(folder) if folder.is_dir() else source.folder
    load_function(source.name)
    code = sys.modules[source.name.partition(":")[0]].__file__
    return checkpoint.sha256(Path(code)) if code else None


def run_pipeline(config: PipelineConfig, sources: dict[str, Any], run: Path, *, resumed: bool) -> None:
    """Do what is left of the stages, each in its folder of the pipeline's.

    Raises:
        Stopped: a signal arrived; what was done is kept.
        ValueError, FloatingPointError, OSError: what went wrong in a stage, in one line.
    """
    begin_run(config, run, resumed=resumed)
    for stage in stages_of(config):
        folder = run / stage.name
        models = {name: files_of(model_folder(run / name)) for name in stage.needs}
        key = key_of(stage.config, sources, models)
        state, why = state_of(folder, key)
        if state == "kept":
            console.print(f"{stage.name}: kept ({why})", markup=False, soft_wrap=True)
            continue
        console.print(f"{stage.name}: {why}", markup=False, soft_wrap=True)
        do_stage(stage, folder, run, key, resumed=state == "resumed")


def do_stage(stage: Stage, folder: Path, run: Path, key: str, *, resumed: bool) -> None:
    """Do a stage and note the SHA-256 of what it made."""
    config = located_in(stage.config, run)
    with data_place(run, folder if resumed else None) as place:
        inputs = stage.load(config, place)
        if not resumed:
            # What is done again stays until what it needs has been loaded: an option that cannot be used costs nothing.
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            write_atomically(folder / run_folder.CONFIG_FILE, to_json(stage.config).encode())
            _note(folder, {"key": key})
        place.hand_over(folder)
    stage.execute(config, inputs, folder, resumed=resumed)
    _note(folder, {"key": key, "outputs": files_of(folder)})


def _note(folder: Path, content: dict[str, Any]) -> None:
    data = json.dumps(content, sort_keys=True, indent=2) + "\n"
    write_atomically(folder / STAGE_FILE, data.encode())


def key_of(config: RunConfig, sources: dict[str, Any], models: dict[str, Any]) -> str:
    """Return the key of a stage: a SHA-256 of everything that decides what it makes, but for where it lies."""
    plain: Any = dataclasses.replace(config, data=None)
    plain = dataclasses.replace(plain, model=dataclasses.replace(plain.model, path=None))
    content = json.dumps([to_json(plain), sources, models], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def files_of(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of a folder's files by name: those that are the same in each run of one configuration."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in NOT_OUTPUTS)
    return {path.relative_to(folder).as_posix(): checkpoint.sha256(path) for path in paths}


def state_of(folder: Path, key: str) -> tuple[str, str]:
    """Return ``new``, ``kept``, ``resumed`` or ``again``, and why."""
    if not folder.exists():
        return "new", "begins"
    try:
        noted = runlog.parse_json((folder / STAGE_FILE).read_text(encoding="utf-8"))
        noted_key, outputs = noted["key"], noted.get("outputs")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "again", f"has no readable {STAGE_FILE}, so it is done again"
    if noted_key != key:
        return "again", "its configuration, data or starting models changed, so it is done again"
    if outputs is None:
        return "resumed", "was interrupted and goes on"
    found, model = files_of(folder), model_folder(folder)
    # Beside its outputs a run may hold what was made of it later, such as a report; in a model every file counts.
    added = {name for name in found if model != folder and model in (folder / name).parents}
    for name in sorted({*outputs, *added}):
        if outputs.get(name) != found.get(name):
            what = "is missing" if name not in found else "is new" if name not in outputs else "was damaged or changed"
            return "again", f"{name} {what}, so it is done again"
    return "kept", f"key {key[:12]}, {len(outputs)} files as they were"
