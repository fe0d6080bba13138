"""The runs of M1: what each is, and how they are started as processes of their own, two at a time.

A test names its runs as parameters; the pool looks at the parameters of all selected tests and starts every run once,
in the order of the tests, so that the two cores are never idle while a test waits.
"""

import contextlib
import dataclasses
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlhf_core.testing.assertions import assert_runs_identical

HERE = Path(__file__).parent
PLANTED = HERE / "m1_planted.py"
STEPS = 5
"""PPO steps of m1.toml."""
AT_ONCE = 2
TIMEOUT_S = 240
EMULATED_TIMEOUT_S = 1500
POLL_S = 0.001
ATTEMPTS = 5
"""At catching a moment, on a machine that may be busy."""

Moment = Literal["in pre-training", "in a step", "while a checkpoint is written"]


@dataclass(frozen=True)
class Run:
    """One run: its name is its folder, and the rest says how it is started."""

    name: str
    config: str = "m1.toml"
    options: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    planted: tuple[str, ...] = ()
    """Arguments of m1_planted.py, when the run goes through it."""
    folder: str = "runs"
    """What ``--runs`` is, under a folder of the pool's own."""
    cwd: str = "."
    """Working directory, under the same."""
    processor: str | None = None
    """What qemu-user emulates."""
    burners: bool = False
    """Whether other processes keep every core busy meanwhile."""
    config_of: "Run | None" = None
    """The run whose config.json is the configuration."""
    killed: tuple[Moment, ...] = ()
    """When the run is killed with signal 9; it is resumed each time."""
    draw: int = 0
    """Seed of the steps, and the parts of a step, at which it is killed."""

    def __str__(self) -> str:
        return self.name


def on(**environment: str) -> tuple[tuple[str, str], ...]:
    return tuple(environment.items())


BASE = Run("base")
GPT2 = Run("gpt2", config="m1_gpt2.toml")

SAME = (
    Run(
        "elsewhere-1",
        folder="another folder/ünï",
        cwd="somewhere",
        environment=on(TZ="Asia/Kathmandu", LC_ALL="POSIX", PYTHONHASHSEED="1", HOME="/nonexistent", USER="somebody"),
        planted=("--host", "another-host"),
    ),
    Run(
        "elsewhere-2", environment=on(TZ="America/St_Johns", LC_ALL="C.UTF-8", LANG="de_DE.UTF-8", PYTHONHASHSEED="42")
    ),
    Run("omp-1", environment=on(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")),
    Run("omp-2", environment=on(OMP_NUM_THREADS="2", OMP_DYNAMIC="TRUE")),
    Run("omp-4", environment=on(OMP_NUM_THREADS="4", MKL_NUM_THREADS="4", OPENBLAS_NUM_THREADS="4")),
    Run("busy-machine", burners=True),
    Run("config-fed-back", config_of=BASE),
)
"""Each has to log the very bytes that BASE logs."""

GPT2_AGAIN = Run("gpt2-again", config="m1_gpt2.toml", environment=on(OMP_NUM_THREADS="4", PYTHONHASHSEED="3"))


def native(
    threads: int, name: str, *environment: tuple[str, str], config: str = "m1.toml", processor: str | None = None
) -> Run:
    """Return the run with the processor's own instructions."""
    options = ("--numerics", "native", "--threads", str(threads))
    return Run(f"native-{threads}-{name}", config, options, environment, processor=processor)


NATIVE = {threads: native(threads, "first") for threads in (1, 2, 4)}
NATIVE_AGAIN = native(2, "again", ("OMP_NUM_THREADS", "4"), ("TZ", "Asia/Tokyo"))

_DRAW = int(os.environ.get("M1_DRAW", "0"))
KILLED = (
    Run("killed-in-a-step", killed=("in a step",), draw=_DRAW + 1),
    Run("killed-in-pretraining-and-in-a-step", killed=("in pre-training", "in a step"), draw=_DRAW + 2),
    Run("killed-in-a-checkpoint-and-in-a-step", killed=("while a checkpoint is written", "in a step"), draw=_DRAW + 4),
)
"""Three moments in a step, and two others; M1_DRAW in the environment draws others."""

ANOTHER_SEED = Run("another-seed", options=("--seed", "8"))
ANOTHER_LAMBDA = Run("another-lambda", options=("--ppo.lam", "0.9"))

FAULTS = ("clock", "host-name", "unseeded-shuffle", "hash-order", "identity-order")
_FAULTED = ("--config", str(HERE / "m1.toml"), "--ppo.steps", "2", "--pretrain.steps", "0")
FAULTED_HERE = Run("faulted-here", options=_FAULTED, planted=("--plant", ",".join(FAULTS)))
FAULTED_ELSEWHERE = dataclasses.replace(
    FAULTED_HERE,
    name="faulted-elsewhere",
    environment=on(TZ="Asia/Kathmandu", PYTHONHASHSEED="1"),
    planted=("--host", "another-host", *FAULTED_HERE.planted),
)
"""What a fault has to be caught by: the same trainer in another process, on a machine of another name."""

JUNK = ("nan", "1e30", "tokens")
SPOILED = Run("spoiled", planted=("--plant", ",".join(JUNK)))

_NO_AVX512 = "AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR"
_SSE = on(
    RLHF_KERNELS_ISA="sse2",
    MKL_ENABLE_INSTRUCTIONS="SSE4_2",
    ONEDNN_MAX_CPU_ISA="SSE41",
    OPENBLAS_CORETYPE="Nehalem",
    NPY_DISABLE_CPU_FEATURES=f"{_NO_AVX512} AVX2 FMA3",
    GLIBC_TUNABLES="glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX512BW,-AVX2,-AVX,-FMA,-FMA4",
)
_AVX2 = on(
    RLHF_KERNELS_ISA="avx2",
    MKL_ENABLE_INSTRUCTIONS="AVX2",
    ONEDNN_MAX_CPU_ISA="AVX2",
    OPENBLAS_CORETYPE="Haswell",
    NPY_DISABLE_CPU_FEATURES=_NO_AVX512,
    GLIBC_TUNABLES="glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX512BW",
)
NARROWER = (Run("sse", environment=_SSE), Run("avx2", environment=_AVX2))
"""The same processor, told to use fewer of its instructions: torch, MKL, oneDNN, OpenBLAS, NumPy, libm, our kernels."""
NARROWER_GPT2 = Run("gpt2-sse", config="m1_gpt2.toml", environment=_SSE)
NATIVE_GPT2 = native(1, "gpt2", config="m1_gpt2.toml")
AVX2_TORCH = (*_AVX2, *on(ATEN_CPU_CAPABILITY="avx2", MKL_CBWR="AVX2"))
NATIVE_NARROWER = (
    (NATIVE[2], native(2, "avx2", *AVX2_TORCH)),
    (NATIVE[2], native(2, "other-mkl", *on(MKL_CBWR="COMPATIBLE"))),
    (NATIVE_GPT2, native(2, "gpt2-avx2", *AVX2_TORCH, config="m1_gpt2.toml")),
)
"""The same; and MKL's code for processors that it does not know, of which nothing may depend."""
# OpenBLAS, in NumPy, takes an emulated Nehalem for something wider and dies on its instructions unless told.
_NEHALEM = on(OPENBLAS_CORETYPE="Nehalem")
EMULATED = (
    (BASE, Run("emulated-haswell", processor="Haswell-v1")),
    (BASE, Run("emulated-nehalem", processor="Nehalem-v1", environment=_NEHALEM)),
    (GPT2, Run("gpt2-emulated-epyc", config="m1_gpt2.toml", processor="EPYC-v1")),
    (NATIVE[2], native(2, "emulated-haswell", processor="Haswell-v1")),
    (NATIVE[2], native(2, "emulated-epyc", processor="EPYC-v1")),
)
"""An Intel with AVX2, one with neither AVX nor fused multiply-add (portable numerics alone), and an AMD."""


class RunPool:
    """Starts runs and hands out their folders; ``pool[run]`` waits until the run is done."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._threads = ThreadPoolExecutor(AT_ONCE)
        self._futures: dict[Run, Future[Path]] = {}
        self._processes: set[subprocess.Popen[str]] = set()
        self._closed = False
        self.story: dict[Run, list[str]] = {}
        """How each killed run was killed."""

    def start(self, runs: Iterable[Run]) -> None:
        """Put runs in the queue, once each."""
        for run in runs:
            if run not in self._futures:
                if run.config_of is not None:
                    self.start([run.config_of])
                self._futures[run] = self._threads.submit(self._do, run)

    def __getitem__(self, run: Run) -> Path:
        """Return the folder of a run that has ended as it should.

        Raises:
            AssertionError: it has not; with what it printed.
        """
        self.start([run])
        return self._futures[run].result()

    def close(self) -> None:
        """Kill what is still running; nothing new starts."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in list(self._processes):
            process.kill()
        self._threads.shutdown(wait=True)

    def _do(self, run: Run) -> Path:
        runs = self._root / run.folder
        runs.mkdir(parents=True, exist_ok=True)
        (self._root / run.cwd).mkdir(parents=True, exist_ok=True)
        config = HERE / run.config if run.config_of is None else self[run.config_of] / "config.json"
        where = ("--runs", str(runs), "--name", run.name)
        arguments = ("train", "--config", str(config), *where, *run.options)
        chance = random.Random(run.draw)
        with burners((os.cpu_count() or 1) if run.burners else 0):
            for moment in run.killed:
                self._kill(run, arguments, moment, chance)
                arguments = ("train", "--resume", *where)
            self._finish(self._popen(run, run.planted, arguments), run)
        return runs / run.name

    def _popen(self, run: Run, planted: tuple[str, ...], arguments: tuple[str, ...]) -> subprocess.Popen[str]:
        if self._closed:
            raise AssertionError("the tests are over")
        # -P: the installed package runs, whatever lies in the working directory.
        program = (str(PLANTED), *planted, "--") if planted else ("-c", "from rlhf_core.cli import main; main()")
        emulator = () if run.processor is None else (str(shutil.which("qemu-x86_64")), "-cpu", run.processor)
        process = subprocess.Popen(
            (*emulator, sys.executable, "-P", *program, *arguments),
            cwd=self._root / run.cwd,
            env={**plain_environment(), **dict(run.environment)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        )
        self._processes.add(process)
        return process

    def _finish(self, process: subprocess.Popen[str], run: Run, expected_code: int = 0) -> None:
        try:
            output, _ = process.communicate(timeout=TIMEOUT_S if run.processor is None else EMULATED_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            output += "\n(killed: it took too long)"
        self._processes.discard(process)
        assert process.returncode == expected_code, f"run {run} ended with {process.returncode}:\n{output}"

    def _kill(self, run: Run, arguments: tuple[str, ...], moment: Moment, chance: random.Random) -> None:
        """Start the run and kill it at a moment; where the machine was too slow to catch it, try again."""
        folder = self._root / run.folder / run.name
        if moment == "in pre-training":
            step = chance.randrange(2, 6)
            self.story.setdefault(run, []).append(f"kill -9 in step {step} of pre-training")
            process = self._popen(run, ("--kill-in-pretraining", str(step)), arguments)
            self._finish(process, run, expected_code=-signal.SIGKILL)
            assert not (folder / "models" / "base").exists(), "the kill came after pre-training"
            return
        before = folder.with_name(f"{run.name}-before-{len(self.story.setdefault(run, []))}")
        if folder.exists():
            shutil.copytree(folder, before)
        for _ in range(ATTEMPTS):
            is_now = (
                self._in_a_step(run, folder, chance) if moment == "in a step" else self._in_a_checkpoint(run, folder)
            )
            process = self._popen(run, (), arguments)
            while process.poll() is None and not is_now():
                time.sleep(POLL_S)
            process.kill()
            process.communicate()
            self._processes.discard(process)
            if process.returncode == -signal.SIGKILL and was_caught(moment, folder):
                return
            self.story[run].append("came too late")
            shutil.rmtree(folder)
            if before.exists():
                shutil.copytree(before, folder)
        raise AssertionError(f"run {run}: {ATTEMPTS} attempts to kill it {moment} failed: {self.story[run]}")

    def _in_a_step(self, run: Run, folder: Path, chance: random.Random) -> Callable[[], bool]:
        """Choose a random part of a random step that is still to be done (but the last)."""
        saved = max((int(path.name.removeprefix("step_")) for path in folder.glob("checkpoints/step_*")), default=-1)
        after, part = chance.randrange(saved + 1, STEPS - 1), chance.random()
        self.story.setdefault(run, []).append(
            f"kill -9 in step {after + 1}, {part:.2f} of a step's time after step {after}"
        )
        return moment_in_a_step(folder, after, part)

    def _in_a_checkpoint(self, run: Run, folder: Path) -> Callable[[], bool]:
        self.story[run].append("kill -9 while a checkpoint is half written")
        return moment_in_a_checkpoint(folder)


def assert_identical(run_a: Path, run_b: Path) -> None:
    """Fail unless two runs have the same logs, and the same weights, optimizer and generators at their end."""
    assert_runs_identical(run_a, run_b)
    last_a, last_b = (max((run / "checkpoints").glob("step_*")) for run in (run_a, run_b))
    # A manifest has the SHA-256 of every file of its checkpoint.
    a, b = (json.loads((last / "manifest.json").read_bytes()) for last in (last_a, last_b))
    differing = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
    assert last_a.name == last_b.name
    assert not differing, f"{', '.join(differing)} differ in {last_a} and {last_b}"


def plain_environment() -> dict[str, str]:
    """Return the environment without what would decide how a run computes: each run says itself what it needs."""
    decides = ("OMP_", "MKL_", "OPENBLAS_", "ONEDNN_", "ATEN_", "RLHF_", "NPY_", "GLIBC_TUNABLES", "SEED", "TZ", "LC_")
    keep = {name: value for name, value in os.environ.items() if not name.startswith(decides)}
    return {**keep, "HF_HUB_OFFLINE": "1"}


@contextlib.contextmanager
def burners(number: int) -> Iterator[None]:
    """Keep ``number`` cores busy."""
    processes = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def moment_in_a_step(folder: Path, after: int, part: float) -> Callable[[], bool]:
    """Return a question that turns true a part of a step's time after step ``after`` was logged."""
    log = folder / "metrics.jsonl"
    # A resumed run first cuts the log back; before that, what is there are the rows of the killed process.
    written = log.stat().st_mtime_ns if log.exists() else None
    due: list[float] = []

    def is_now() -> bool:
        if not due:
            began = (folder / "checkpoints" / "step_000000").exists() if after == 0 else rows_of(log, written) >= after
            if began:
                due.append(time.monotonic() + part * step_time_s(folder))
        return bool(due) and time.monotonic() >= due[0]

    return is_now


def rows_of(log: Path, written: int | None = None) -> int:
    """Return the number of whole lines of a log; 0 when it is not there yet, or last written at that time."""
    try:
        return 0 if log.stat().st_mtime_ns == written else log.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def step_time_s(folder: Path) -> float:
    """Return the time that the last step took; before the first step a guess."""
    try:
        return float(json.loads((folder / "timings.jsonl").read_bytes().splitlines()[-1])["step_time_s"])
    except (FileNotFoundError, IndexError, ValueError):
        return 0.1


def moment_in_a_checkpoint(folder: Path) -> Callable[[], bool]:
    """Return a question that is true while a checkpoint, not the first and not the last, is half written."""
    return lambda: any((folder / "checkpoints").glob(".step_*[24].partial/policy"))


def was_caught(moment: Moment, folder: Path) -> bool:
    """Return whether the process died when it should have."""
    if moment == "while a checkpoint is written":
        return any((folder / "checkpoints").glob(".step_*.partial"))
    return (folder / "checkpoints" / "step_000000").exists() and rows_of(folder / "metrics.jsonl") < STEPS


def why_no_emulator() -> str | None:
    """Return why no other processor can be emulated here, or None."""
    if platform.machine() != "x86_64":
        return f"this machine is {platform.machine()}; qemu-x86_64 runs the same programs only on x86_64"
    if shutil.which("qemu-x86_64") is None:
        return "no qemu-x86_64 here; install it with `apt-get install qemu-user`"
    return None
