"""The command for a machine with a GPU, gone through without one: the script's stages, and each bench on the CPU."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

PYTHON = """#!/bin/sh
case "$*" in
    *get_device_capability*) echo 90 ;;
    "benches/gpu_figures.py --page") echo "$HERE/page.md" ;;
    benches/gpu_figures.py) echo "# CUDA" > "$HERE/page.md" ;;
    *pytest*) test "$FASTCLUST_REQUIRE_CUDA" = 1 && echo "7 passed" ;;
    *setup.py*) test "$FASTCLUST_CUDA_ARCHITECTURES" = 90a ;;
esac
test -z "$FAILS" || case "$*" in *$FAILS*) echo "went wrong"; exit 3 ;; esac
"""
SANITIZER = """#!/bin/sh
case "$2" in memcheck) exit 0 ;; *) echo "Error: Device not supported"; exit 1 ;; esac
"""


@pytest.fixture
def script(tmp_path):
    """Runs benches/gpu.sh beside a Python, a cmake and a sanitizer that only pretend; gives its status and the page."""
    programs = {"python": PYTHON, "cmake": "#!/bin/sh\n", "ninja": "#!/bin/sh\n", "compute-sanitizer": SANITIZER}
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(fails: str = "") -> tuple[int, str]:
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HERE": str(tmp_path), "FAILS": fails}
        done = subprocess.run(["bash", ROOT / "benches" / "gpu.sh"], env=environment, capture_output=True, text=True)
        page = tmp_path / "page.md"
        return done.returncode, page.read_text() if page.exists() else ""

    return run


def test_every_stage_runs_and_is_told(script):
    status, page = script()
    assert status == 0
    assert page.startswith("# CUDA\n\n## Checks\n\n- each kernel once against the CPU")
    assert "- CUDA tests: 7 passed\n- compute-sanitizer memcheck over" in page
    assert page.endswith("- compute-sanitizer racecheck not run: it says that it does not support this device\n")


@pytest.mark.parametrize("stage", ["--small", "pytest"])
def test_a_stage_that_fails_keeps_none_from_running(script, stage):
    status, page = script(stage)
    assert status == 1
    assert page.startswith("# CUDA\n")
    assert page.count("\n- ") == 4
    assert "went wrong" in page
    assert ("CUDA tests: 7 passed" in page) == (stage == "--small")


def test_a_build_that_fails_ends_it(script):
    assert script("setup.py") == (1, "")


def test_without_a_gpu_nothing_is_measured():
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(["bash", ROOT / "benches" / "gpu.sh"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("benches/gpu.sh: no torch that sees a GPU")


@pytest.fixture
def figures(monkeypatch, tmp_path):
    """benches/gpu_figures.py on the CPU, with a timer that runs each call once and makes its figures up."""
    monkeypatch.syspath_prepend(str(ROOT / "benches"))
    import gpu_figures

    ticks = itertools.count(200, -1)

    def pretended_milliseconds(call, repetitions=9):
        call()
        return float(next(ticks))

    monkeypatch.setattr(gpu_figures, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_figures, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(gpu_figures, "milliseconds", pretended_milliseconds)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return gpu_figures


def test_every_bench_runs(figures, monkeypatch):
    """Small, and each writes its rows: ours and eager torch's with a figure, a peer that fails with its reason."""
    machine = SimpleNamespace(floor=lambda moved, operations: 0.25, bytes_per_ms=4e9, operations_per_ms=8e11)
    flash = SimpleNamespace(batch_kmeans_Euclid=lambda *_, **__: 1 / 0)
    monkeypatch.setattr(figures, "optional", lambda name: flash if name == "flash_kmeans" else None)
    rows = []
    for bench in (
        lambda: figures.bench_kmeans(machine, 4200, 16, 5),
        lambda: figures.bench_knn(machine, 5100, 16, 4),
        lambda: figures.bench_diffusion(machine, 600, 7),
        lambda: figures.bench_pairwise_kl(machine, 60, 5),
        lambda: figures.bench_epoch(machine, 600, 16),
        lambda: figures.bench_knn(machine, 10, 16, 40),
    ):
        rows += figures.attempt_rows("work", bench)
    monkeypatch.setenv("PATH", "")  # no git
    page = figures.write(rows, machine, "NVIDIA H200 (141 GB)")
    text = page.read_text()
    assert page.name == "cuda-nvidia-h200-141-gb.md"
    assert "at commit unknown" in text
    for who in ("fastclust", "fastclust, fp16 rows", "fastclust, bf16 rows"):
        assert re.search(
            rf"\| k-means, one iteration, 4,200 × 16, K = 5 \| {who} \| [0-9.]+ \| 0.25 \| [0-9]+% \|", text
        )
        who = who.replace("fastclust", "fastclust.knn_graph")
        assert re.search(rf"\| kNN graph, 5,100 × 16, k = 4 \| {who} \| [0-9.]+ \| 0.25 \| 0% \|", text)
    for what in ("diffusion, 600", "pairwise KL, B = 60", "one epoch's pseudo-labels, 600"):
        assert re.search(rf"\| {what}.* \| fastclust \| [0-9.]+ \| 0.25 \| 0% \|", text)
    assert "| flash-kmeans (fp16) | ZeroDivisionError: division by zero |  |  |" in text
    assert "| work | fastclust | ValueError: knn: k must be below" in text
