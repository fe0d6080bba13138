"""The cells of the learning curves: a task, a method, a seed; each run once and kept under its configuration's hash.

``rlhf train`` runs PPO, GRPO and RLOO. All start from the base model, the judges and the prompts of PPO's run of the
same seed, and may sample as many completions: DPO takes them as pairs to learn from, best-of-n as the candidates
of the held-out prompts. All are judged on the same prompts with the same random numbers.

What is kept lies in ``runs/learning-curves``; CURVES in the environment names another folder. An interrupted cell goes
on where it stopped, and the suite can be run in pieces: ``pytest verification/learning_curves -k "embedded and grpo"``.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from rlhf_core import run_folder, runlog
from rlhf_core.config import TrainConfig, for_data
from rlhf_core.config_files import read_config_file, to_json
from rlhf_core.durable_files import write_atomically

ROOT = Path(__file__).parents[2]
TASKS = ("embedded", "sentences")
METHODS = ("ppo", "grpo", "rloo", "dpo", "best-of-n")
FROM_BASE = ("dpo", "best-of-n")
SEEDS = range(5)
PARTS = 4
"""Into which the curve of training rewards is averaged."""
DPO_EPOCHS, DPO_BATCH, DPO_RATE, DPO_BETA = 3, 32, 3e-4, 0.5


@dataclass(frozen=True)
class Cell:
    """One run of the table."""

    task: str
    method: str
    seed: int

    def __str__(self) -> str:
        return f"{self.task}-{self.method}-{self.seed}"

    def config(self) -> TrainConfig:
        """Return the configuration: the defaults of the task, with one thread."""
        sentences = os.environ.get("SENTENCES")
        if self.task == "sentences" and not sentences:
            raise LookupError("SENTENCES in the environment has to name a folder with *.pos and *.neg")
        base = for_data(sentences) if self.task == "sentences" and sentences else TrainConfig()
        algorithm: Any = "ppo" if self.method in FROM_BASE else self.method
        return dataclasses.replace(
            base, seed=self.seed, threads=1, device="cpu", ppo=dataclasses.replace(base.ppo, algorithm=algorithm)
        )

    def folder(self) -> Path:
        """Return where the cell's run is kept."""
        settings = to_json(dataclasses.replace(self.config(), data=None))
        if self.method in FROM_BASE:
            settings += json.dumps([DPO_EPOCHS, DPO_BATCH, DPO_RATE, DPO_BETA])
        key = hashlib.sha256(settings.encode()).hexdigest()[:12]
        return kept() / f"{str(self).replace('+', 'p')}-{key}"


def kept() -> Path:
    return Path(os.environ.get("CURVES", ROOT / "runs" / "learning-curves"))


def result(cell: Cell) -> dict[str, Any]:
    """Return the cell's evaluation, and its curve of training rewards where it has one; run it if that is not done."""
    folder = cell.folder()
    if not (folder / run_folder.EVALUATION_FILE).is_file():
        run(cell, folder)
    found = json.loads((folder / run_folder.EVALUATION_FILE).read_text(encoding="utf-8"))
    if (folder / runlog.METRICS_FILE).is_file():
        rewards = [row["reward_mean"] for row in runlog.read(folder / runlog.METRICS_FILE)]
        found["curve"] = [float(part.mean()) for part in np.array_split(np.array(rewards), PARTS)]
    return found


def run(cell: Cell, folder: Path) -> None:
    """Run a cell in a process of its own, because the environment decides torch's instructions when it loads."""
    if cell.method in FROM_BASE:
        result(dataclasses.replace(cell, method="ppo"))
        command = [sys.executable, str(Path(__file__)), *map(str, dataclasses.astuple(cell))]
    else:
        arguments = ["train", "--runs", str(folder.parent), "--name", folder.name]
        if cell.method != "ppo" and not (folder / run_folder.CONFIG_FILE).is_file():
            begin_with_models_of_ppo(cell, folder)
        if (folder / run_folder.CONFIG_FILE).is_file():
            arguments.append("--resume")
        else:
            folder.parent.mkdir(parents=True, exist_ok=True)
            file = folder.parent / f"{folder.name}.json"
            file.write_text(to_json(cell.config()), encoding="utf-8")
            arguments += ["--config", str(file)]
        command = [sys.executable, "-c", "from rlhf_core.cli import main; main()", *arguments]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    outcome = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    if outcome.returncode:
        raise RuntimeError(f"{cell}: {outcome.stderr.strip() or outcome.stdout[-2000:]}")


def begin_with_models_of_ppo(cell: Cell, folder: Path) -> None:
    """Make the run's folder with the base model and the judges of PPO's run of that seed: they would be the same."""
    origin = dataclasses.replace(cell, method="ppo")
    result(origin)
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(origin.folder() / "models", partial / "models")
    shutil.copy(origin.folder() / run_folder.ENVIRONMENT_FILE, partial)
    (partial / run_folder.CONFIG_FILE).write_text(to_json(cell.config()), encoding="utf-8")
    partial.rename(folder)


# -- DPO and best-of-n, in the process that is started for them --------------------------------------------------------


def run_from_base(cell: Cell) -> None:
    """Run a cell that starts from the models of PPO's run, and write its evaluation."""
    from rlhf_core.numerics import apply_environment

    origin = dataclasses.replace(cell, method="ppo").folder()
    config = read_config_file(origin / run_folder.CONFIG_FILE, TrainConfig())
    apply_environment(config.numerics, config.resolved_threads)
    import copy

    from rlhf_core.evaluation import evaluate
    from rlhf_core.experiment import load_inputs, prepare
    from rlhf_core.policy import Reference
    from rlhf_core.reporting.evaluation_table import evaluation_summary
    from rlhf_core.run_setup import begin_run, data_place
    from rlhf_core.stopping import StopRequest

    with data_place(kept(), origin) as place:
        inputs = load_inputs(config, place)
    device = begin_run(config, origin, resumed=True)
    experiment = prepare(config, inputs, origin, device, StopRequest())
    policy = copy.deepcopy(experiment.base)
    reference = Reference(experiment.base)
    settings = {"seed": config.seed, "dtype": config.dtype, "eos_id": experiment.eos_id, "pad_id": experiment.pad_id}

    def judged(lm: Any) -> Any:
        return evaluate(lm, reference, experiment.held_out_ids, experiment.judges, config.sampling, **settings)

    before = judged(experiment.base)
    if cell.method == "dpo":
        train_on_pairs(policy, experiment, config)
        after = judged(policy)
    else:
        after = best_of_n(before, experiment, config, reference)
    summary = evaluation_summary(before, after, config.seed)
    folder = cell.folder()
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(
        folder / run_folder.EVALUATION_FILE, (json.dumps(summary, sort_keys=True, indent=2) + "\n").encode()
    )


def train_on_pairs(policy: Any, experiment: Any, config: TrainConfig) -> None:
    """DPO on pairs of completions of the base model, ordered by the reward; as many completions as PPO samples."""
    from rlhf_core.advantages import penalize_missing_eos
    from rlhf_core.data.batches import batches, prompt_rows
    from rlhf_core.dpo import DPOObjective
    from rlhf_core.optim import adamw
    from rlhf_core.rollout import sample
    from rlhf_core.seeding import CounterUniforms
    from rlhf_core.sft import warmup_then_linear
    from rlhf_core.stage_config import DPOLossConfig, TrainingConfig
    from rlhf_core.supervised import SupervisedState, supervised_step

    prompts, chosen, rejected = [], [], []
    batch = config.ppo.batch_size
    for step in range(1, config.ppo.steps + 1):
        rows = prompt_rows(len(experiment.prompt_ids), batch // 2, step, config.seed)
        drawn_for = [experiment.prompt_ids[row] for row in rows for _ in range(2)]
        uniforms = CounterUniforms(config.seed, "pairs", step, np.arange(batch), config.sampling.max_new_tokens)
        rollout = sample(
            policy, drawn_for, uniforms, config.sampling, eos_id=experiment.eos_id, pad_id=experiment.pad_id
        )
        scores = penalize_missing_eos(experiment.reward(rollout), rollout.ended_B, config.ppo.missing_eos_penalty)
        responses = rollout.response_token_ids()
        for at in range(0, batch, 2):
            if scores[at] != scores[at + 1]:
                better = at if scores[at] > scores[at + 1] else at + 1
                prompts.append(drawn_for[at])
                chosen.append(responses[better])
                rejected.append(responses[2 * at + 1 - better])
    objective = DPOObjective(policy, prompts, chosen, rejected, DPOLossConfig(beta=DPO_BETA), pad_id=experiment.pad_id)
    state = SupervisedState(policy, adamw(policy.parameters(), lr=0.0, beta2=0.99, eps=1e-8, weight_decay=0.0))
    steps = DPO_EPOCHS * len(prompts) // DPO_BATCH
    order = batches(objective.lengths(), DPO_BATCH, config.seed, "dpo")
    training = TrainingConfig(batch_size=DPO_BATCH, micro_batch_size=DPO_BATCH)
    for step in range(steps):
        supervised_step(state, next(order), objective, training, DPO_RATE * warmup_then_linear(step, steps))
    policy.requires_grad_(False)


def best_of_n(before: Any, experiment: Any, config: TrainConfig, reference: Any) -> Any:
    """Return the evaluation of the best of n completions of the base model by the reward, n from the same budget."""
    from rlhf_core.evaluation import distinct_bigrams
    from rlhf_core.rollout import sample
    from rlhf_core.seeding import CounterUniforms

    prompts = experiment.held_out_ids
    n = config.ppo.steps * config.ppo.batch_size // len(prompts)
    kept_rewards = {name: np.empty(len(prompts)) for name in before.rewards}
    responses, ended = [], []
    for row, prompt in enumerate(prompts):
        uniforms = CounterUniforms(config.seed, "best-of-n", row, np.arange(n), config.sampling.max_new_tokens)
        rollout = sample(
            experiment.base, [prompt] * n, uniforms, config.sampling, eos_id=experiment.eos_id, pad_id=experiment.pad_id
        )
        best = int(experiment.reward(rollout).argmax())
        for name, judge in experiment.judges.items():
            kept_rewards[name][row] = float(judge(rollout)[best])
        responses.append(rollout.response_token_ids()[best])
        ended.append(bool(rollout.ended_B[best]))
    # KL(best of n ‖ base) ≤ log n − (n − 1)/n, whatever the reward (Beirami et al., 2024, theorem 1).
    bound = np.full(len(prompts), np.log(n) - (n - 1) / n)
    return dataclasses.replace(
        before,
        rewards=kept_rewards,
        kl=bound,
        distinct_bigrams=distinct_bigrams(responses),
        distinct_completions=len({tuple(ids) for ids in responses}) / len(responses),
        eos_rate=float(np.mean(ended)),
        response_ids=responses,
    )


# -- the table ---------------------------------------------------------------------------------------------------------


def interval(values: list[float]) -> tuple[float, float, float]:
    """Return the mean over seeds and Student's 95% interval."""
    mean, n = float(np.mean(values)), len(values)
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
    return mean, mean - half, mean + half


def shown(values: list[float], sign: str = "+") -> str:
    mean, low, high = interval(values)
    return f"{mean:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]".replace("-", "−")


def table(task: str, results: dict[Cell, dict[str, Any]]) -> str:
    """Return a task's tables in Markdown."""

    def column(method: str, read: Any) -> list[float]:
        return [read(results[Cell(task, method, seed)]) for seed in SEEDS]

    judges = list(results[Cell(task, "ppo", SEEDS[0])]["rewards"])
    config = Cell(task, "ppo", 0).config()
    completions = config.ppo.steps * config.ppo.batch_size
    lines = [
        f"{completions:,} completions sampled by each method; mean over {len(SEEDS)} seeds and Student's 95% interval, "
        f"{results[Cell(task, 'ppo', 0)]['prompts']} held-out prompts each.",
        "",
        f"| method | {' | '.join(f'{name}: before' for name in judges[:1])} | "
        f"{' | '.join(f'{name}: change' for name in judges)} | change less PPO's | KL, nats | distinct bigrams |",
        "|---" * (len(judges) + 5) + "|",
    ]
    for method in METHODS:
        before = column(method, lambda one: one["rewards"][judges[0]]["before"]["mean"])
        changes = [column(method, lambda one, n=name: one["rewards"][n]["change"]["mean"]) for name in judges]
        against = column("ppo", lambda one: one["rewards"][judges[0]]["change"]["mean"])
        paired = [a - b for a, b in zip(changes[0], against, strict=True)]
        kl = column(method, lambda one: one["kl"]["mean"])
        bigrams = column(method, lambda one: one["distinct_bigrams"]["after"])
        cells = [
            f"{np.mean(before):+.3f}".replace("-", "−"),
            *map(shown, changes),
            "" if method == "ppo" else shown(paired),
            ("≤ " if method == "best-of-n" else "") + (f"{kl[0]:.2f}" if method == "best-of-n" else shown(kl, "")),
            f"{np.mean(bigrams):.3f}",
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    lines += ["", "Reward of the training completions, by quarters of the run:", ""]
    lines += ["| method | first | second | third | last |", "|---|---|---|---|---|"]
    for method in METHODS[:3]:
        parts = [shown(column(method, lambda one, at=at: one["curve"][at])) for at in range(PARTS)]
        lines.append(f"| {method} | {' | '.join(parts)} |")
    return "\n".join(lines)


def write_section(path: Path, task: str, text: str) -> None:
    """Replace a task's section of the document."""
    begin, end = f"<!-- {task} -->", f"<!-- end of {task} -->"
    document = path.read_text(encoding="utf-8")
    before, _, rest = document.partition(begin)
    _, _, after = rest.partition(end)
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        run_from_base(Cell(sys.argv[1], sys.argv[2], int(sys.argv[3])))
