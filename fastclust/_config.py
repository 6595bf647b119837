"""What `python -m fastclust` prints."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from ._library import C


def cuda_state() -> str:
    """Whether the CUDA kernels can be used here and, where they cannot, why."""
    if not C.CUDA_ARCHITECTURES:
        return "not built (no nvcc, or a CPU build of torch, when fastclust was compiled)"
    built = f"built for {C.CUDA_ARCHITECTURES} with nvcc {C.CUDA_VERSION}"
    if torch.version.cuda is None:
        return f"{built}; not loaded, since this torch is a CPU build"
    return f"{built}; loaded" + ("" if torch.cuda.is_available() else ", but torch sees no GPU")


def show_config() -> None:
    """Prints versions, devices, the CPU capability in use and the CUDA architectures built."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    rows = {
        "fastclust": f"{C.VERSION} in {Path(str(C.__file__)).parent}",
        "built with": f"{C.COMPILER}, torch {C.TORCH_VERSION}",
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "CPU kernels": f"{C.cpu_capability()}, {torch.get_num_threads()} threads",
        "CUDA kernels": cuda_state(),
        "GPUs": ", ".join(gpus) or "none",
    }
    for name, value in rows.items():
        print(f"{name:<13} {value}")
