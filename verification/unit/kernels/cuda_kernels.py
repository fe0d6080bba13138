"""The CUDA kernels' operators on a GPU, or compiled for the CPU from the very same sources: see cuda_emulation/."""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

import rlhf_kernels.ops  # noqa: F401  (defines the operators)
from rlhf_kernels.cuda import build, extension

HERE = Path(__file__).parent
EMULATED_DEVICE = "PrivateUse1"
OPERATORS = torch.ops.rlhf_kernels
MANY_ROWS, CHUNK = 1024, 2048  # gae.cu: from how many rows on, and up to which length, a row is not split
SHORT_ROW_BYTES = 8192  # token_logprobs.cu: up to here a warp takes a row
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def compile_emulation(folder: Path) -> Path:
    """Compile the sources of the extension and the emulation of CUDA into one library of operators.

    It registers them for a device that torch does not have, so that the real extension can be loaded beside it.
    """
    library, torch_folder, sources = folder / "emulated.so", Path(torch.__file__).parent, Path(build.__file__).parent
    compiler = shutil.which("g++") or shutil.which("c++")
    assert compiler is not None, "the emulation of CUDA needs a C++ compiler"
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas"]
    flags += build.TORCH_DEFINITIONS
    binding = folder / "binding.cpp"
    registration = "STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, {}, m)"
    text = (sources / "binding.cpp").read_text()
    assert registration.format("CUDA") in text
    binding.write_text(text.replace(registration.format("CUDA"), registration.format(EMULATED_DEVICE)))
    flags += [
        f"-I{HERE / 'cuda_emulation'}",
        f"-I{sources}",
        *(f"-isystem{path}" for path in build.torch_includes(torch_folder)),
    ]
    kernels = [sources / name for name in build.SOURCES if name != "binding.cpp"]
    files = [*kernels, binding, HERE / "cuda_emulation/emulation.cpp"]
    # its stand-ins for functions of a CUDA build of torch are its own affair: -Bsymbolic
    link = [f"-L{torch_folder / 'lib'}", "-Wl,--no-as-needed,-Bsymbolic", "-ltorch", "-ltorch_cpu"]
    command = [compiler, *flags, "-x", "c++", *map(str, files), "-o", str(library), *link]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return library


class DeviceKernels:
    """The operators on a device; results come back to main memory."""

    def __init__(self, device: str) -> None:
        self.device = device

    def put(self, tensor: Tensor | None) -> Tensor | None:
        """Move a tensor to where the kernels read it. A view must be taken afterwards: moving makes it dense."""
        return None if tensor is None else tensor.to(self.device)

    def call(self, name: str, *arguments):
        """Run an operator on tensors of any device."""
        return getattr(OPERATORS, name)(*arguments)

    def _run(self, name: str, *arguments):
        results = self.call(name, *(self.put(a) if isinstance(a, Tensor) else a for a in arguments))
        return results.cpu() if isinstance(results, Tensor) else tuple(result.cpu() for result in results)

    def token_logprobs(self, logits, labels, temperature=1.0, with_entropy=True, ignore_index=None):
        return self._run("token_logprobs", logits, labels, temperature, with_entropy, ignore_index)

    def backward(self, logits, labels, forward, grad_logp, grad_entropy, temperature=1.0, ignore_index=None):
        _, entropy, statistics = forward
        arguments = (logits, labels, statistics, entropy, grad_logp, grad_entropy, temperature, ignore_index)
        return self._run("token_logprobs_backward", *arguments)

    def gae(self, rewards, values, mask, bootstrap=None, gamma=0.99, lam=0.95):
        return self._run("gae", rewards, values, mask, bootstrap, gamma, lam)

    def gae_per_token(self, rewards, values, mask, bootstrap, gammas, lams, gamma=0.99, lam=0.95):
        return self._run("gae_per_token", rewards, values, mask, bootstrap, gammas, lams, gamma, lam)

    def whiten(self, x, mask, shift_mean=True):
        return self._run("whiten", x, mask, shift_mean)


class EmulatedKernels(DeviceKernels):
    """The same sources on the CPU."""

    def __init__(self, library: Path) -> None:
        super().__init__("cpu")
        torch.ops.load_library(library)
        self._library = ctypes.CDLL(str(library))

    def call(self, name: str, *arguments):
        return getattr(OPERATORS, name).default._op_dk(getattr(torch._C.DispatchKey, EMULATED_DEVICE), *arguments)

    def set_order(self, seed: int) -> None:
        """In which order threads run between barriers: 0 ascending, 1 descending, else shuffled."""
        self._library.emulation_set_order(seed)

    def allow(self, begin: int, end: int) -> None:
        """From now on vector reads must lie in a range that was allowed."""
        self._library.emulation_allow(ctypes.c_size_t(begin), ctypes.c_size_t(end))

    def launches(self) -> int:
        return self._library.emulation_launches()


def why_no_device_kernels() -> str | None:
    """None where the built extension and a GPU are at hand, else the reason to skip."""
    return extension.why_missing()


def random_case(shape, dtype=torch.float32, scale=4.0):
    return (torch.randn(shape) * scale).to(dtype), torch.randint(0, shape[-1], shape[:-1])


def run_script(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """In a process of its own, which may die of what it does."""
    preamble = f"import sys; sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}\n"
    command = [sys.executable, "-c", preamble + script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
