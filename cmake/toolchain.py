"""Finds the torch and the nvcc to build with. Nothing here imports torch: its files tell all that is needed."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

CUDA_ARCHITECTURES = "80;86;89;90a;100;120"


class BuildError(SystemExit):
    """Ends the build with one line that says what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(f"fastclust: {message}")


@dataclass(frozen=True)
class Torch:
    folder: Path
    version: str
    cuda: str | None  # "13.2"; None for a CPU build


def _torch_in(folder: Path) -> Torch | None:
    version_file = folder / "version.py"
    if not version_file.is_file() or not (folder / "lib" / "libtorch_cpu.so").is_file():
        return None
    names: dict[str, str | None] = {}
    for node in ast.parse(version_file.read_text()).body:
        target = (
            node.target
            if isinstance(node, ast.AnnAssign)
            else node.targets[0]
            if isinstance(node, ast.Assign)
            else None
        )
        if isinstance(target, ast.Name) and isinstance(node.value, ast.Constant):
            names[target.id] = node.value.value
    return Torch(folder, str(names.get("__version__")), names.get("cuda"))


def find_torch() -> Torch | None:
    """FASTCLUST_TORCH_DIR, else the target environment's (pip's isolation hides it), else what imports here."""
    if chosen := os.environ.get("FASTCLUST_TORCH_DIR"):
        if torch := _torch_in(Path(chosen)):
            return torch
        raise BuildError(f"FASTCLUST_TORCH_DIR={chosen} is not the folder of an installed torch")
    paths = sysconfig.get_paths()
    for site in dict.fromkeys((paths["purelib"], paths["platlib"])):
        if torch := _torch_in(Path(site) / "torch"):
            return torch
    spec = importlib.util.find_spec("torch")
    return _torch_in(Path(spec.origin).parent) if spec and spec.origin else None


def find_nvcc() -> Path | None:
    """CUDACXX, CUDA_HOME, PATH, /usr/local/cuda, else NVIDIA's compiler wheel."""
    candidates = [os.environ.get("CUDACXX"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    if home := os.environ.get("CUDA_HOME"):
        candidates.insert(1, f"{home}/bin/nvcc")
    if (spec := importlib.util.find_spec("nvidia")) and spec.submodule_search_locations:
        for root in spec.submodule_search_locations:
            candidates += map(str, sorted(Path(root).glob("*/bin/nvcc")))
    return next((Path(c) for c in candidates if c and Path(c).is_file()), None)


def cuda_architectures(nvcc: Path) -> str:
    """FASTCLUST_CUDA_ARCHITECTURES, else those of the default list that this nvcc knows."""
    if chosen := os.environ.get("FASTCLUST_CUDA_ARCHITECTURES"):
        return chosen.replace(",", ";")
    listed = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout
    known = set(re.findall(r"compute_(\d+)", listed))
    return ";".join(a for a in CUDA_ARCHITECTURES.split(";") if a.rstrip("a") in known)


def wants_cuda() -> str:
    """FASTCLUST_CUDA: AUTO (default), ON or OFF."""
    chosen = os.environ.get("FASTCLUST_CUDA", "AUTO").upper()
    if chosen not in ("AUTO", "ON", "OFF"):
        raise BuildError(f"FASTCLUST_CUDA={chosen} is none of AUTO, ON, OFF")
    return chosen


def build_requirements() -> list[str]:
    """What must still be installed to build for the target environment's torch."""
    torch = find_torch()
    if torch is None:
        return ["torch>=2.11"]
    if wants_cuda() == "OFF" or torch.cuda is None or find_nvcc() is not None:
        return []
    major = torch.cuda.split(".")[0]
    suffix = "" if int(major) >= 13 else f"-cu{major}"
    parts = ["nvcc", "runtime", "crt", "cccl"] if int(major) >= 13 else ["nvcc", "runtime", "cccl"]
    wheels = [f"nvidia-cuda-{part}{suffix}=={torch.cuda}.*" for part in parts]
    return wheels + ([f"nvidia-nvvm=={torch.cuda}.*"] if int(major) >= 13 else [])
