"""Builds the native kernels; everything else about the package is in pyproject.toml.

The CPU extensions need a C compiler and no header of torch. Each row kernel is compiled once for every instruction set
and chosen at run time, so a wheel built on one x86-64 machine runs on an older one. The CUDA extension is built where
nvcc and a torch are found; RLHF_KERNELS_CUDA=0 leaves it out, RLHF_KERNELS_CUDA=1 makes a build without it an error.
"""

import os
import platform
import runpy
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, CompileError, ExecError, PlatformError

CPU = "kernels/rlhf_kernels/cpu"
CUDA_FOLDER = "kernels/rlhf_kernels/cuda"
CUDA = runpy.run_path(f"{CUDA_FOLDER}/build.py")
CUDA_EXTENSION = f"rlhf_kernels.cuda.{Path(CUDA['LIBRARY']).stem}"
HEADERS = sorted(str(path) for folder in (CPU, "kernels/rlhf_kernels/shared") for path in Path(folder).glob("*.h"))
# Contraction to fused multiply-add differs by machine and compiler: where one is meant, the source says so.
NUMERICS = ["-O3", "-std=gnu11", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-Wno-psabi"]
UNITS = {"portable_kernels": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    UNITS["avx2_kernels"] = ["-mavx2", "-mfma", "-mf16c"]
    UNITS["avx512_kernels"] = ["-mavx512f", "-mavx2", "-mfma", "-mf16c"]


class BuildKernels(build_ext):
    """build_ext with one object file per instruction set, and one line instead of a traceback without a compiler."""

    def finalize_options(self) -> None:
        """Compile on every core, if nothing else was asked for."""
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def get_ext_filename(self, fullname: str) -> str:
        """Where an extension goes; the CUDA extension is no Python module and has no Python version in its name."""
        *folders, name = fullname.split(".")
        if name == Path(CUDA["LIBRARY"]).stem:
            return str(Path(*folders, CUDA["LIBRARY"]))
        return super().get_ext_filename(fullname)

    def build_cuda(self, ext: Extension) -> None:
        """Compile the CUDA extension; where it is optional, setuptools prints the error and goes on without it."""
        try:
            CUDA["build"](Path(self.get_ext_fullpath(ext.name)), CUDA["find_nvcc"](), CUDA["find_torch"]())
        except CUDA["BuildError"] as error:
            raise CompileError(str(error)) from None

    def build_extension(self, ext: Extension) -> None:
        """Compile and link one extension module."""
        if ext.name == CUDA_EXTENSION:
            self.build_cuda(ext)
            return
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

        def compiled(source: str, folder: str, *flags: str) -> list[str]:
            return self.compiler.compile(
                [source], output_dir=folder, extra_postargs=[*NUMERICS, *flags], depends=HEADERS
            )

        with ThreadPoolExecutor(self.parallel) as pool:
            units = [
                pool.submit(
                    compiled, f"{CPU}/unit.c", str(Path(self.build_temp, table)), f"-DUNIT_KERNELS={table}", *flags
                )
                for table, flags in UNITS.items()
            ]
            objects = [path for unit in units for path in unit.result()]
        return objects + compiled(f"{CPU}/isa.c", self.build_temp)


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


def cuda_extensions() -> list[Extension]:
    """The CUDA extension, where it is wanted and can be built; one printed line says what becomes of it."""
    asked = os.environ.get("RLHF_KERNELS_CUDA") or None
    if asked not in (None, "0", "1"):
        raise SystemExit(f"error: RLHF_KERNELS_CUDA is {asked!r}; it must be 0 or 1")
    if asked == "0":
        print("rlhf_kernels: skipping the CUDA extension (RLHF_KERNELS_CUDA=0)", file=sys.stderr)
        return []
    try:
        nvcc, torch = CUDA["find_nvcc"](), CUDA["find_torch"]()
    except CUDA["BuildError"] as reason:
        if asked == "1":
            raise SystemExit(f"error: RLHF_KERNELS_CUDA=1, but {reason}") from None
        print(f"rlhf_kernels: skipping the CUDA extension ({reason}); the CPU kernels are built", file=sys.stderr)
        return []
    print(f"rlhf_kernels: building the CUDA extension with {nvcc} for the torch of {torch}", file=sys.stderr)
    files = [str(Path(CUDA_FOLDER, name)) for name in (*CUDA["SOURCES"], *CUDA["HEADERS"])]
    return [Extension(CUDA_EXTENSION, files[: len(CUDA["SOURCES"])], depends=files, optional=asked is None)]


setup(ext_modules=cpu_extensions() + cuda_extensions(), cmdclass={"build_ext": BuildKernels})
