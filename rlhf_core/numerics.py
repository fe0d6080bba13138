"""The environment that decides which instructions torch runs; it must be set before torch is loaded.

``portable`` gives the same bits on every x86-64 processor: torch's plain code path, MKL's code path that is the same
on all processors, one thread. ``native`` uses the processor's widest instructions and any number of threads; what
decides a float32 run of GPT-2 or Llama on a CPU (all stages but ``sft``) is the kit's own kernels there, so that its
bits too are the same on every x86-64 processor with AVX2 and fused multiply-add. Other models and dtypes, and GPUs, go
through libraries whose bits belong to one kind of processor, and there too two runs agree.
"""

import ctypes
import os
import platform
import sys
from pathlib import Path
from typing import Literal

Numerics = Literal["portable", "native"]


def environment(numerics: Numerics, threads: int) -> dict[str, str]:
    """Return the environment variables that ``numerics`` needs.

    ``OMP_NUM_THREADS`` and its like are always set, so that what the caller's shell says cannot change a result;
    ``*_DYNAMIC`` is off, so that a busy machine cannot either. Threads that wait spin for a moment and then sleep,
    because on a busy machine spinning ones take the processor from the thread that they wait for. cuBLAS needs a fixed
    workspace to be deterministic.
    """
    variables = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_DYNAMIC": "FALSE",
        "GOMP_SPINCOUNT": "2000",
        "MKL_DYNAMIC": "FALSE",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if numerics == "portable":
        return variables | {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}
    return variables | {"MKL_CBWR": "AVX512,STRICT" if "avx512f" in cpu_flags() else "AVX2,STRICT"}


def apply_environment(numerics: Numerics, threads: int) -> None:
    """Set the variables of :func:`environment` in this process.

    Raises:
        RuntimeError: torch is loaded already and read other values; start a new process instead.
    """
    wanted = environment(numerics, threads)
    if numerics == "native":
        # A narrower path asked for by the caller is the caller's business; it becomes part of the fingerprint.
        wanted = {name: os.environ.get(name, value) if name == "MKL_CBWR" else value for name, value in wanted.items()}
    if "torch" in sys.modules:
        read_once = ("ATEN_CPU_CAPABILITY", "MKL_CBWR")
        wrong = [name for name in read_once if numerics == "portable" and os.environ.get(name) != wanted[name]]
        if wrong:
            settings = " ".join(f"{name}={wanted[name]}" for name in wrong)
            raise RuntimeError(
                f"numerics 'portable' must be chosen before torch is imported; start the process with {settings}"
            )
    os.environ.update(wanted)
    _keep_freed_memory()


MALLOC_SETTINGS = {-3: 1 << 20, -1: 256 << 20}
"""M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of glibc's malloc.h, in bytes."""


def _keep_freed_memory() -> None:
    """Let malloc keep up to 256 MiB of what was freed, for the next tensor: the system would clear each page again.

    Not so blocks of 1 MiB and more, which would leave holes: what is large and comes again in each pass is the arena of
    a program (:mod:`rlhf_kernels.program`), which is kept as it is.
    """
    if platform.libc_ver()[0] == "glibc":
        for parameter, size in MALLOC_SETTINGS.items():
            ctypes.CDLL(None).mallopt(parameter, size)


def is_portable() -> bool:
    """Return whether this process was set up for ``portable``."""
    return os.environ.get("ATEN_CPU_CAPABILITY") == "default"


def cpu_flags() -> frozenset[str]:
    """Return the processor's feature flags as Linux lists them; empty where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())


def cpu_name() -> str:
    """Return the processor's name, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()
