"""Builds the native kernels; everything else about the package is in pyproject.toml.

The CPU extensions need a C compiler and no header of torch. Each row kernel is compiled once for every instruction set
and chosen at run time, so a wheel built on one x86-64 machine runs on an older one.
"""

import os
import platform
import shutil
import sys
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, CompileError, ExecError, PlatformError

CPU = "kernels/rlhf_kernels/cpu"
HEADERS = sorted(str(path) for path in Path(CPU).glob("*.h"))
# Contraction to fused multiply-add differs by machine and compiler: where one is meant, the source says so.
NUMERICS = ["-O3", "-std=gnu11", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-Wno-psabi"]
UNITS = {"portable_kernels": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    UNITS["avx2_kernels"] = ["-mavx2", "-mfma", "-mf16c"]
    UNITS["avx512_kernels"] = ["-mavx512f", "-mavx2", "-mfma", "-mf16c"]


class BuildKernels(build_ext):
    """build_ext with one object file per instruction set, and one line instead of a traceback without a compiler."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link one extension module."""
        try:
            if ext.name.endswith("._rows"):
                ext.extra_objects = self.compile_units()
            super().build_extension(ext)
        except (CCompilerError, CompileError, ExecError, PlatformError) as error:
            raise SystemExit(
                f"error: the kernels could not be compiled ({error}).\n"
                "They need a C compiler with OpenMP and the headers of Python: on Debian or Ubuntu\n"
                "    apt-get install gcc python3-dev"
            ) from error

    def compile_units(self) -> list[str]:
        """unit.c for each instruction set, and the choice between them."""
        objects = []
        for table, flags in UNITS.items():
            objects += self.compiler.compile(
                [f"{CPU}/unit.c"],
                output_dir=str(Path(self.build_temp, table)),
                extra_postargs=[*NUMERICS, f"-DUNIT_KERNELS={table}", *flags],
                depends=HEADERS,
            )
        return objects + self.compiler.compile(
            [f"{CPU}/isa.c"], output_dir=self.build_temp, extra_postargs=NUMERICS, depends=HEADERS
        )


def cpu_extensions() -> list[Extension]:
    """One extension module per .pyx file."""
    extensions = [
        Extension(
            f"rlhf_kernels.cpu.{path.stem}",
            [str(path)],
            include_dirs=[CPU],
            depends=[*HEADERS, f"{CPU}/unit.c", f"{CPU}/isa.c"],
            extra_compile_args=["-O2", "-fopenmp", "-ffp-contract=off", "-fno-math-errno"],
            extra_link_args=["-fopenmp"],
        )
        for path in sorted(Path(CPU).glob("_*.pyx"))
    ]
    return cythonize(
        extensions,
        include_path=["kernels"],
        compiler_directives={"language_level": 3, "cdivision": True, "boundscheck": False, "wraparound": False},
    )


def report_cuda() -> None:
    """Say what becomes of the CUDA extension."""
    asked = os.environ.get("RLHF_KERNELS_CUDA")
    if asked == "1":
        raise SystemExit("error: RLHF_KERNELS_CUDA=1, but this version has no CUDA extension yet: unset it")
    found = shutil.which("nvcc") or "no CUDA toolkit (nvcc) found"
    reason = "RLHF_KERNELS_CUDA=0" if asked == "0" else f"this version has none yet; {found}"
    print(f"rlhf_kernels: skipping the CUDA extension ({reason}); the CPU kernels are built", file=sys.stderr)


report_cuda()
setup(ext_modules=cpu_extensions(), cmdclass={"build_ext": BuildKernels})
