"""Writes docs/results/cpu.md from what pytest-benchmark measured, and measures ceilings and memory beside it.

    OPENBLAS_CORETYPE=SkylakeX pytest benches --full -k "not noise and not clusternet" --benchmark-json=all.json
    FASTCLUST_CPU_CAPABILITY=avx2 pytest benches --full -k "fastclust or ours" --benchmark-json=avx2.json
    python benches/cpu_figures.py all.json avx2.json

The first file holds our best kernels and the peers, each further one our kernels at another capability. All on one
machine that is otherwise idle.
"""

from __future__ import annotations

import ctypes
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastclust._C
import torch

import fastclust

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
OURS = ("fastclust", "fastclust graph")

Group = dict[str, dict[str, Any]]


def load(path: str) -> dict[str, Group]:
    """Group -> name -> benchmark, in the order in which they ran."""
    groups: dict[str, Group] = {}
    for bench in json.loads(Path(path).read_text())["benchmarks"]:
        groups.setdefault(bench["group"], {})[bench["name"]] = bench
    return groups


def median(bench: dict[str, Any]) -> float:
    return bench["stats"]["median"]


def seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


# ------------------------------------------------------------------------------------------------- ceilings and memory


def best_time(run: Callable[[], object], repetitions: int = 5) -> float:
    times = []
    for _ in range(repetitions + 1):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def ceilings() -> tuple[float, float]:
    """Multiply-adds per second of torch's float32 product, bytes per second of its copy."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    x, y = torch.randn(2**26), torch.empty(2**26)
    return 2048**3 / best_time(lambda: a @ b), 2 * x.numel() * 4 / best_time(lambda: y.copy_(x))


def status(field: str) -> int:
    """Bytes of /proc/self/status."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", text)[1])  # type: ignore[index]


def extra_memory(run: Callable[[], Any]) -> int:
    """Bytes by which the peak of resident memory passes what is resident before and the result."""
    ctypes.CDLL(None).malloc_trim(0)  # what is free is not to be counted as there already
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = status("VmRSS")
    result = run()
    kept = [part for part in (result if isinstance(result, tuple) else (result,)) if isinstance(part, torch.Tensor)]
    outputs = 0
    for part in kept:
        parts = [part.crow_indices(), part.col_indices(), part.values()] if part.layout == torch.sparse_csr else [part]
        outputs += sum(p.numel() * p.element_size() for p in parts)
    return max(status("VmHWM") - before - outputs, 0)


def memory() -> list[str]:
    n, d, k = 50_000, 128, 50
    x = torch.nn.functional.normalize(torch.randn(n, d), dim=1)
    graph = fastclust.knn_graph(x, k)
    y = torch.rand(n, 100)
    log_p, labels = torch.randn(4096, 100).log_softmax(1).requires_grad_(), torch.arange(4096) % 10
    runs = [
        (f"kmeans, {n} × {d}, K = 300", lambda: fastclust.kmeans(x, 300, init=x[:300], max_iter=5)),
        (f"knn, {n} × {d}, k = {k}", lambda: fastclust.knn(x, k)),
        (f"knn_graph, {n} × {d}, k = {k}", lambda: fastclust.knn_graph(x, k)),
        (f"diffuse, {n} nodes, {graph.values().numel()} entries, 100 columns", lambda: fastclust.diffuse(graph, y)),
        ("pairwise_kl, B 4096, K 100, with its gradient", lambda: fastclust.pairwise_kl(log_p, labels).backward()),
    ]
    return [f"| {name} | {extra_memory(run) / 2**20:.0f} MiB |" for name, run in runs]


# --------------------------------------------------------------------------------------------------------- the tables


def peers_table(groups: dict[str, Group], products: float) -> list[str]:
    lines = ["| work | ours | peers, times ours | multiply-adds, of sgemm's rate | rounds |", "|---|---|---|---|---|"]
    for title, group in groups.items():
        if title.startswith(("growth", "threads")) or "fastclust" not in group:
            continue
        ours = median(group["fastclust"])
        peers = sorted((median(bench) / ours, name) for name, bench in group.items() if name not in OURS)
        shown = "; ".join(f"{name} {ratio:.1f}" for ratio, name in peers)
        if "fastclust graph" in group:
            shown += f"; as a weighted symmetrised graph {median(group['fastclust graph']) / ours:.2f} times its time"
        work = group["fastclust"]["extra_info"].get("multiply-adds")
        rate = f"{work / ours / products:.1f}" if work else ""
        lines.append(f"| {title} | {seconds(ours)} | {shown} | {rate} | {group['fastclust']['stats']['rounds']} |")
    return lines


def growth_table(groups: dict[str, Group]) -> list[str]:
    lines = ["| work | time |", "|---|---|"]
    for title, group in groups.items():
        if title.startswith(("growth", "threads")):
            lines.append(f"| {title} | {seconds(median(group['fastclust']))} |")
    return lines


def capability_table(groups: dict[str, Group], others: dict[str, dict[str, Group]]) -> list[str]:
    lines = ["| work | " + " | ".join(others) + " |", "|---|" + "---|" * len(others)]
    for title, group in groups.items():
        cells = [other.get(title, {}).get("fastclust") for other in others.values()]
        if not any(cells) or title.startswith(("growth", "threads")):
            continue
        peers = [median(bench) for name, bench in group.items() if name not in OURS]
        shown = []
        for cell in cells:
            ratio = f" ({min(peers) / median(cell):.1f})" if cell and peers else ""
            shown.append(seconds(median(cell)) + ratio if cell else "")
        lines.append(f"| {title} | " + " | ".join(shown) + " |")
    return lines


def cpu_model() -> str:
    return re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())[1]  # type: ignore[index]


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    groups = load(sys.argv[1])
    others = {Path(path).stem: load(path) for path in sys.argv[2:]}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    products, copied = ceilings()
    again, _ = ceilings()
    products = statistics.mean([products, again])
    lines = [
        "# CPU kernels beside their peers",
        "",
        f"Machine: {cpu_model()}, {torch.get_num_threads()} threads, kernels for "
        f"{fastclust._C.cpu_capability()}, no GPU used; torch {torch.__version__}; commit {commit}.",
        f"Ceilings measured beside it: float32 product of torch {products / 1e9:.0f} G multiply-adds/s, copy "
        f"{copied / 1e9:.0f} GB/s.",
        "",
        "The commands are in `benches/cpu_figures.py`, which wrote this file. Peers and ours in one run on the same",
        "data and, where the peer takes one, the same start; answers are compared before timing. Times are medians",
        "of at least five calls, short ones for two seconds (growth: fewer). A ratio is the peer's median over ours.",
        "Multiply-adds are those of the plain algorithm: above 1, the kernels do less than that, or in 8 bits.",
        "",
        *peers_table(groups, products),
        "",
        "## Growth and threads",
        "",
        *growth_table(groups),
        "",
        "## Extra memory",
        "",
        "Peak of resident memory above what was resident before, less the result; the bounds are in `docs/kernels.md`.",
        "",
        "| call | extra |",
        "|---|---|",
        *memory(),
    ]
    if others:
        lines += ["", "## Other capabilities", "", "In brackets: the fastest peer's time over ours.", ""]
        lines += capability_table(groups, others)
    (RESULTS / "cpu.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
