"""Compiles the CUDA extension. The standard library only: setup.py runs this file where neither torch nor a GPU may be.

The result is no Python module but a library of operators, for every Python and for torch 2.11 and later.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

LIBRARY = "librlhf_kernels_cuda.so"
SOURCES = ("gae.cu", "token_logprobs.cu", "whiten.cu", "binding.cpp")
HEADERS = ("device.cuh", "gae_scan.cuh", "kernels.h", "../shared/scalar.h")
ARCHITECTURES = (80, 90, 100)
"""Machine code for these; a GPU of the same generation runs it too, a newer one compiles what is kept of the last."""

TORCH_DEFINITIONS = ("-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000")

_FOLDER = Path(__file__).parent
_MIN_TORCH = (2, 11)


class BuildError(Exception):
    """Why the extension cannot be built, in one line, or what the compiler said."""


def find_nvcc() -> str:
    """The CUDA compiler: that of CUDA_HOME, or without it the one on PATH or of /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME")
    candidates = [f"{home}/bin/nvcc"] if home else [shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    for candidate in candidates:
        if os.access(candidate, os.X_OK):
            return candidate
    raise BuildError("no CUDA toolkit (nvcc) found; CUDA_HOME says where one is")


def find_torch() -> Path:
    """The folder of the torch that this Python imports outside of pip's isolated build environment."""
    code = "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    folder = Path(done.stdout.strip() or ".")
    header = folder / "include/torch/headeronly/version.h"
    if not header.is_file():
        raise BuildError(f"{sys.executable} has no torch whose headers could be used: install torch first")
    version = tuple(
        int(re.search(rf"TORCH_VERSION_{part} (\d+)", header.read_text())[1])  # type: ignore[index]
        for part in ("MAJOR", "MINOR")
    )
    if version < _MIN_TORCH:
        raise BuildError(f"torch {version[0]}.{version[1]} is too old, {_MIN_TORCH[0]}.{_MIN_TORCH[1]} is needed")
    return folder


def architectures_of(nvcc: str) -> tuple[int, ...]:
    """Those of ARCHITECTURES that this compiler knows."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout
    known = tuple(number for number in ARCHITECTURES if f"compute_{number}\n" in listed + "\n")
    if not known:
        raise BuildError(f"{nvcc} compiles for none of {', '.join(f'sm_{number}' for number in ARCHITECTURES)}")
    return known


def torch_includes(torch: Path) -> tuple[Path, ...]:
    """Where the headers of the torch in this folder lie."""
    return torch / "include", torch / "include/torch/csrc/api/include"


def command(nvcc: str, torch: Path, *, strict: bool = False) -> list[str]:
    """The compiler and its flags, without what to compile and where to write it.

    Args:
        nvcc: path of the compiler.
        torch: folder with torch's `include` and `lib`.
        strict: fail on any warning, and report registers and spills.
    """
    architectures = architectures_of(nvcc)
    flags = [nvcc, "-std=c++17", "-O3", "-fmad=false", f"--threads={os.cpu_count() or 1}", "-Xcompiler=-fPIC"]
    flags += [f"-gencode=arch=compute_{number},code=sm_{number}" for number in architectures]
    flags += [f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}"]
    flags += [*TORCH_DEFINITIONS, *(f"-isystem={folder}" for folder in torch_includes(torch))]
    if strict:
        flags += ["-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror", "-Xptxas=-v,-Werror"]
    return flags


def build(output: Path, nvcc: str, torch: Path, *, strict: bool = False) -> str:
    """Write the library to `output` and return what the compiler said.

    Raises:
        BuildError: the compiler failed; the message holds its output.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    link = ["-shared", "-Xlinker=--no-as-needed", f"-L{torch / 'lib'}", "-ltorch"]
    sources = [str(_FOLDER / name) for name in SOURCES]
    done = subprocess.run(
        [*command(nvcc, torch, strict=strict), *link, *sources, "-o", str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise BuildError(f"nvcc failed:\n{done.stdout}")
    return done.stdout
