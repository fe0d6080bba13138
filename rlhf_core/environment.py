"""What a run's numbers depend on besides its configuration: environment.json."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from rlhf_core.numerics import cpu_name


def environment(device: torch.device) -> dict[str, Any]:
    """Return what a reader needs to judge whether another machine should give the same bits."""
    names = ("ATEN_CPU_CAPABILITY", "MKL_CBWR", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUBLAS_WORKSPACE_CONFIG")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
        "libc": " ".join(platform.libc_ver()),
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "flags": {name: os.environ.get(name) for name in names},
        "commit": commit(),
        "working_directory": str(Path.cwd()),
    }


def commit() -> str | None:
    """Return the commit of the kit's checkout, with ``-dirty`` when it has changes; None outside a checkout."""
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return None
    return result.stdout.strip() or None
