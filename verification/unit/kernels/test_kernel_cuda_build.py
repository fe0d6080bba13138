"""What the CUDA compiler makes of the extension, checked where there is nvcc but no GPU. `make cuda` runs these."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from rlhf_kernels.cuda import build

pytestmark = pytest.mark.slow

# Kernels that stream through memory: each must use 16-byte accesses. Of gae.cu only the template for aligned rows can.
VECTOR_READS = ("forward_kernel", "backward_kernel", "rows_kernelILb1", "maps_kernelILb1", "chunks_kernelILb1")
VECTOR_WRITES = ("backward_kernel", "rows_kernelILb1", "chunks_kernelILb1")


@pytest.fixture(scope="module")
def nvcc():
    try:
        return build.find_nvcc()
    except build.BuildError as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def compiled(nvcc, tmp_path_factory):
    """The library, compiled so that a warning is an error, and the compiler's report."""
    library = tmp_path_factory.mktemp("cuda") / build.LIBRARY
    return library, build.build(library, nvcc, Path(torch.__file__).parent, strict=True)


def test_no_kernel_spills_registers_on_any_architecture(compiled):
    _, report = compiled
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    entries = re.findall(r"Compiling entry function '(\w+)' for '(sm_\d+)'", report)
    assert len(spills) >= len(entries) > 0
    spilling = [line for line in re.findall(r".*\n.*spill.*", report) if " 0 bytes spill stores" not in line]
    assert not spilling, "\n".join(spilling)
    kernels = defaultdict(set)
    for kernel, architecture in entries:
        kernels[architecture].add(re.sub(r"_GLOBAL__N__\w{8}_", "", kernel))
    assert set(kernels) == {f"sm_{number}" for number in build.ARCHITECTURES}
    assert len({frozenset(names) for names in kernels.values()}) == 1
    assert "warning" not in report


def test_a_warning_fails_the_strict_build(nvcc, tmp_path):
    source = tmp_path / "unused.cu"
    source.write_text("__global__ void kernel(int* x) { int unused; *x = 1; }\n")
    flags = build.command(nvcc, Path(torch.__file__).parent, strict=True)
    done = subprocess.run([*flags, "-c", str(source), "-o", str(tmp_path / "o")], capture_output=True, check=False)
    assert done.returncode != 0
    assert b"unused" in done.stderr + done.stdout


def ptx_of(nvcc, source, folder):
    """The virtual machine code of each kernel of a source, by its mangled name."""
    output = folder / f"{source}.ptx"
    command = [nvcc, "-std=c++17", "-O3", "-fmad=false", "-arch=compute_80", "--ptx", "-o", str(output)]
    subprocess.run([*command, str(Path(build.__file__).with_name(source))], check=True)
    entries = re.split(r"^\.visible \.entry |^\.entry |^\t?\.weak \.entry ", output.read_text(), flags=re.MULTILINE)[1:]
    return {re.match(r"\w+", entry)[0]: entry for entry in entries}


def test_memory_is_read_and_written_sixteen_bytes_at_a_time_and_without_atomics(nvcc, tmp_path):
    kernels = {}
    for source in build.SOURCES:
        if source.endswith(".cu"):
            kernels |= ptx_of(nvcc, source, tmp_path)
    read = [name for name in kernels if any(part in name for part in VECTOR_READS)]
    written = [name for name in kernels if any(part in name for part in VECTOR_WRITES)]
    assert len(read) == 12 + 6 + 3 * 2  # three dtypes, two row lengths, with and without entropy; two reals
    assert len(written) == 6 + 2 * 2
    for name in read:
        assert re.search(r"\bld\.global\.nc\.v4\.u32\b", kernels[name]), name
    for name in written:
        assert re.search(r"\bst\.global\.cs\.v4\.u32\b", kernels[name]), name
    for name, code in kernels.items():
        assert not re.search(r"\b(atom|red)\.", code), f"{name}: an atomic addition depends on the order of the threads"


def find_cuobjdump():
    homes = [Path(home, "bin") for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    triton = importlib.util.find_spec("triton")
    if triton is not None:
        homes.append(Path(triton.submodule_search_locations[0], "backends/nvidia/bin"))
    for folder in homes:
        if (folder / "cuobjdump").exists() and (folder / "nvdisasm").exists():
            return folder
    found = shutil.which("cuobjdump")
    return Path(found).parent if found and shutil.which("nvdisasm") else None


def test_the_machine_code_has_sixteen_byte_accesses_on_every_architecture(compiled):
    folder = find_cuobjdump()
    if folder is None:
        pytest.skip("no cuobjdump and nvdisasm: neither the CUDA toolkit's nor triton's")
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    command = [str(folder / "cuobjdump"), "-sass", str(compiled[0])]
    listing = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    functions = defaultdict(str)
    architecture = name = None
    for line in listing.splitlines():
        if found := re.search(r"arch = (sm_\d+)", line):
            architecture = found[1]
        elif found := re.search(r"Function : (\w+)", line):
            name = found[1]
        elif name is not None:
            functions[architecture, name] += line + "\n"
    assert {architecture for architecture, _ in functions} == {f"sm_{number}" for number in build.ARCHITECTURES}
    for (architecture, name), code in functions.items():
        if any(part in name for part in VECTOR_READS):
            assert re.search(r"\bLDG\.E\.128\b", code), f"{architecture} {name}"
        if any(part in name for part in VECTOR_WRITES):
            assert re.search(r"\bSTG\.E(\.EF)?\.128\b", code), f"{architecture} {name}"
        assert not re.search(r"\b(ATOMG?|RED)\b", code), f"{architecture} {name}"


def test_the_library_needs_only_torchs_stable_symbols(compiled):
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    command = ["nm", "-D", "--undefined-only", str(compiled[0])]
    symbols = [
        line.split() for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    ]
    # Those with @ are the C and C++ libraries'; of the C++ library's, torch may export some too, without a version.
    needed = [name for kind, name in symbols if kind == "U" and "@" not in name and not re.match(r"_ZNK?St", name)]
    assert "aoti_torch_get_current_cuda_stream" in needed
    assert [name for name in needed if not re.match(r"(aoti_torch|torch)_\w+$", name)] == []
    assert [name for _, name in symbols if re.match(r"_Z.*(3c10|2at|5torch)", name)] == []


ONLY_IN_CUDA_TORCH = """
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
int aoti_torch_get_current_cuda_stream(int32_t device, void** stream) { *stream = 0; return 0; }
int aoti_torch_create_device_guard(int32_t device, void** guard) { *guard = (void*)1; return 0; }
int aoti_torch_delete_device_guard(void* guard) { return 0; }
void torch_c10_cuda_check_msg(int error, const char* file, const char* name, unsigned line, int device, char** text) {
    *text = 0;
    if (error == 0) return;
    *text = malloc(99);
    snprintf(*text, 99, "stand-in: CUDA error %d", error);
}
void torch_c10_cuda_free_error_msg(char* text) { free(text); }
"""

LOAD = """
import sys, torch
import rlhf_kernels.ops
torch.ops.load_library(sys.argv[1])
for name in ("gae", "gae_per_token", "token_logprobs", "token_logprobs_backward", "whiten"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"rlhf_kernels::{name}", "CUDA"), name
try:
    whiten = torch.ops.rlhf_kernels.whiten.default
    whiten._op_dk(torch._C.DispatchKey.CUDA, torch.zeros(3), torch.ones(3, dtype=torch.bool), True)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA: test_kernel_cuda_device.py loads it")
def test_loads_registers_its_operators_and_reports_a_failed_launch(compiled, tmp_path):
    stand_in, source = tmp_path / "stand_in.so", tmp_path / "stand_in.c"
    source.write_text(ONLY_IN_CUDA_TORCH)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(stand_in), str(source)], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(stand_in), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", LOAD, str(compiled[0])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "stand-in: CUDA error" in done.stdout  # there is no GPU to launch on


def test_setup_says_what_becomes_of_the_extension(tmp_path):
    root = Path(build.__file__).parents[3]
    cases = {
        "0": "skipping the CUDA extension (RLHF_KERNELS_CUDA=0)",
        "1": "error: RLHF_KERNELS_CUDA=1, but no CUDA toolkit (nvcc) found",
        "": "skipping the CUDA extension (no CUDA toolkit (nvcc) found",
        "yes": "error: RLHF_KERNELS_CUDA is 'yes'; it must be 0 or 1",
    }
    for asked, message in cases.items():
        environment = {**os.environ, "RLHF_KERNELS_CUDA": asked, "CUDA_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
        command = [sys.executable, "setup.py", "--quiet", "--version"]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
        assert message in done.stderr, (asked, done.stderr)
        assert (done.returncode != 0) == message.startswith("error")
