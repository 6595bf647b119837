"""Devices, one parametrisation for all tests: `device` is "cpu" and, where there is a GPU, "cuda".

FASTCLUST_REQUIRE_CUDA=1 turns the skips of a missing GPU into failures.
"""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import settings
from simt.harness import Worker, shared_worker

settings.register_profile("fastclust", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("fastclust")


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        message = "no GPU"
        if os.environ.get("FASTCLUST_REQUIRE_CUDA") == "1":
            pytest.fail(message)
        pytest.skip(message)
    return request.param


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    """The CUDA kernels on the CPU (tests/simt), in a process of their own."""
    worker = shared_worker()
    yield worker
    worker.close()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests of tiny networks, which a second thread only slows down where the cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For runs whose report nobody looks at: its figures take longer than a small network's training."""
    from methods.common import report

    monkeypatch.setattr(report, "drawn", lambda *_: "")
    monkeypatch.setattr(report, "embedding", lambda *_: "")


@pytest.fixture
def write_stripes(tmp_path: Path) -> Callable[..., Path]:
    """Writes an .npz of three classes of 8 x 8 images, stripes at three angles under noise: learnt in seconds."""

    def write(n_train: int, n_test: int, contrast: int = 120) -> Path:
        rng = np.random.default_rng(0)
        row, column = np.indices((8, 8))
        patterns = np.stack([row % 4 < 2, column % 4 < 2, (row + column) % 4 < 2])
        arrays = {}
        for split, n in (("train", n_train), ("test", n_test)):
            classes = np.arange(n) % 3
            noise = rng.integers(0, 256 - contrast, (n, 8, 8))
            arrays |= {f"x_{split}": (patterns[classes] * contrast + noise).astype(np.uint8), f"y_{split}": classes}
        path = tmp_path / "stripes.npz"
        np.savez(path, **arrays)
        return path

    return write


@pytest.fixture
def refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[ModuleType, list[str]], str]:
    """Runs a method with arguments that it has to refuse: exit code 2, nothing left behind. Gives its one line."""
    from methods.common.config import launch

    def run(method: ModuleType, arguments: list[str]) -> str:
        name = method.__name__.removeprefix("methods.")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        assert launch(name, method.PRESETS, method.train) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"{name}: ")
        assert said.count("\n") == 1
        assert not (tmp_path / "runs").exists()
        return said

    return run
