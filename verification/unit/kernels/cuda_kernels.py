"""The CUDA kernels' operators on a GPU, or compiled for the CPU from the very same sources: see cuda_emulation/."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

import rlhf_kernels.ops  # noqa: F401  (defines the operators)
from rlhf_kernels.cuda import build, extension

HERE = Path(__file__).parent
OPERATORS = torch.ops.rlhf_kernels
MANY_ROWS, CHUNK = 1024, 2048  # gae.cu: from how many rows on, and up to which length, a row is not split
SHORT_ROW_BYTES = 8192  # token_logprobs.cu: up to here a warp takes a row


def compile_emulation(folder: Path) -> Path:
    """Compile the sources of the extension and the emulation of CUDA into one library of operators."""
    library, torch_folder, sources = folder / "emulated.so", Path(torch.__file__).parent, Path(build.__file__).parent
    compiler = shutil.which("g++") or shutil.which("c++")
    assert compiler is not None, "the emulation of CUDA needs a C++ compiler"
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas"]
    flags += build.TORCH_DEFINITIONS
    flags += [f"-I{HERE / 'cuda_emulation'}", *(f"-isystem{path}" for path in build.torch_includes(torch_folder))]
    files = [*(sources / name for name in build.SOURCES), HERE / "cuda_emulation/emulation.cpp"]
    link = [f"-L{torch_folder / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
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

    def whiten(self, x, mask, shift_mean=True):
        return self._run("whiten", x, mask, shift_mean)


class EmulatedKernels(DeviceKernels):
    """The same sources on the CPU."""

    def __init__(self, library: Path) -> None:
        super().__init__("cpu")
        torch.ops.load_library(library)
        self._library = ctypes.CDLL(str(library))

    def call(self, name: str, *arguments):
        return getattr(OPERATORS, name).default._op_dk(torch._C.DispatchKey.CUDA, *arguments)

    def set_order(self, seed: int) -> None:
        """In which order threads run between barriers: 0 ascending, 1 descending, else shuffled."""
        self._library.emulation_set_order(seed)

    def launches(self) -> int:
        return self._library.emulation_launches()


def why_no_device_kernels() -> str | None:
    """None where the built extension and a GPU are at hand, else the reason to skip."""
    return extension.why_missing()
