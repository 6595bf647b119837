"""Finds and loads the compiled library, once, and refuses one that does not belong to this source."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
from pathlib import Path
from types import ModuleType

import torch

SCHEMA = 2  # the op schemas' number: a new one with every change to csrc/library.cpp

BUILD_HINT = "run `pip install .` (or `pip install -e .`) in fastclust's source folder"


def _folders() -> list[Path]:
    """Where the compiled library may lie: beside this file, else in the installed distribution.

    The second is for `python -m methods.…` in the source folder, whose `fastclust/` hides the installed package.
    """
    folders = [Path(__file__).resolve().parent]
    for distribution in importlib.metadata.distributions(name="fastclust"):
        folder = Path(str(distribution.locate_file("fastclust"))).resolve()
        if folder.is_dir() and folder not in folders:
            folders.append(folder)
    return folders


def _extension_in(folder: Path) -> Path | None:
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        if (path := folder / f"_C{suffix}").is_file():
            return path
    return None


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("fastclust._C", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load() -> ModuleType:
    """Loads `fastclust._C`, with it the ops, and the CUDA kernels where torch can use them.

    Raises:
        ImportError: there is no compiled library, or only one built from another source; the text says what to type.
    """
    found = [path for folder in _folders() if (path := _extension_in(folder))]
    if not found:
        raise ImportError(f"fastclust is not compiled for this Python: {BUILD_HINT}")
    # Loading registers the ops under a global name, so a stale library must be told from its file, not by trying.
    marker = f"fastclust-schema-{SCHEMA};".encode()
    current = [path for path in found if marker in path.read_bytes()]
    if not current:
        raise ImportError(f"{found[0]} was built from another version of fastclust's source: {BUILD_HINT}")
    try:
        module = _import(current[0])
    except ImportError as error:
        raise ImportError(
            f"{current[0]} does not load with torch {torch.__version__} ({error}): {BUILD_HINT}"
        ) from error
    cuda = current[0].parent / "libfastclust_cuda.so"
    if torch.version.cuda is not None and cuda.is_file():
        torch.ops.load_library(str(cuda))  # type: ignore[no-untyped-call]
    return module


C = load()
