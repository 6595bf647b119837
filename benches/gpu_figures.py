"""Times the ops on this machine's GPU beside eager torch and the peers installed; writes docs/results/cuda-<gpu>.md.

    python benches/gpu_figures.py            # the sizes of the results file
    python benches/gpu_figures.py --small    # every kernel once, small, checked against the CPU: for compute-sanitizer
    python benches/gpu_figures.py --page     # where the results file lies

Device time between CUDA events, median of the repetitions, the L2 cache flushed before each. Answers are compared
before anything is timed. The floor of each row is the larger of its bytes over the measured copy bandwidth and its
operations over the measured half-precision product; the share of it is what the op reaches.
"""

from __future__ import annotations

import argparse
import importlib
import re
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

import fastclust

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
DEVICE = "cuda"


def milliseconds(call: Callable[[], object], repetitions: int = 9) -> float:
    flush = torch.empty(2**26, device=DEVICE)
    for _ in range(min(2, repetitions)):
        call()
    times = []
    for _ in range(repetitions):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


class Machine:
    """The two ceilings, measured."""

    def __init__(self) -> None:
        a, b = torch.randn(2**28, device=DEVICE), torch.empty(2**28, device=DEVICE)
        self.bytes_per_ms = 2 * 4 * 2**28 / milliseconds(lambda: b.copy_(a))
        a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.float16) for _ in range(2))
        self.operations_per_ms = 2 * 8192**3 / milliseconds(lambda: a @ b)

    def floor(self, moved: float, operations: float) -> float:
        return max(moved / self.bytes_per_ms, operations / self.operations_per_ms)


def clusters(n: int, d: int, centres: int, seed: int = 0) -> torch.Tensor:
    """Unit rows in overlapping clusters, as embeddings are."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    means = torch.randn(centres, d, device=DEVICE, generator=generator)
    labels = torch.randint(centres, (n,), device=DEVICE, generator=generator)
    x = means[labels] + torch.randn(n, d, device=DEVICE, generator=generator)
    return x / x.norm(dim=1, keepdim=True)


def per_iteration(run: Callable[[int], object], last: int) -> float:
    """Time of one iteration of run(max_iter), without what comes before and after; `last` of them are really done."""
    if last <= 5:
        raise ValueError(f"the run ends after {last} iterations, too early to be timed")
    return (milliseconds(lambda: run(last), 5) - milliseconds(lambda: run(5), 5)) / (last - 5)


def eager_lloyd(x: torch.Tensor, centroids: torch.Tensor, max_iter: int) -> torch.Tensor:
    for _ in range(max_iter):
        parts = [((centroids * centroids).sum(1) - 2 * part @ centroids.T).argmin(1) for part in x.split(2**16)]
        labels = torch.cat(parts)
        sums = torch.zeros_like(centroids).index_add_(0, labels, x)
        counts = torch.bincount(labels, minlength=len(centroids)).clamp_(min=1)
        centroids = sums / counts[:, None]
    return centroids


def peers_of_kmeans(x: torch.Tensor, init: torch.Tensor) -> dict[str, Callable[[int], object]]:
    """Those that are installed; each called as its README says, in float32 where it takes that."""
    k, d = init.shape
    runs: dict[str, Callable[[int], object]] = {"eager torch": lambda it: eager_lloyd(x, init, it)}
    if flash := optional("flash_kmeans"):
        half = x.half()[None]
        runs["flash-kmeans (fp16)"] = lambda it: flash.batch_kmeans_Euclid(half, n_clusters=k, max_iters=it, tol=-1.0)
    if flashlib := optional("flashlib"):
        runs["flashlib"] = lambda it: flashlib.flash_kmeans(x, n_clusters=k, max_iters=it)
    if (faiss := optional("faiss")) and hasattr(faiss, "StandardGpuResources"):
        rows, starts = x.cpu().numpy(), init.cpu().numpy()
        runs["faiss-gpu (from host memory)"] = lambda it: faiss.Kmeans(
            d, k, niter=it, gpu=True, max_points_per_centroid=len(rows)
        ).train(rows, init_centroids=starts)
    if cuvs := optional("cuvs.cluster.kmeans"):
        runs["cuVS"] = lambda it: cuvs.fit(
            cuvs.KMeansParams(n_clusters=k, init_method="Array", max_iter=it, tol=0.0), x, init.clone()
        )
    return runs


def optional(name: str):
    try:
        return importlib.import_module(name)
    except Exception:  # a peer that does not load here is a peer that is not here
        return None


def bench_kmeans(machine: Machine, n: int, d: int, k: int) -> list[tuple]:
    x = clusters(n, d, 10 * k)  # more groups than centroids, so that the iteration goes on
    init = x[torch.randperm(n, device=DEVICE)[:k]].clone()
    labels = fastclust.kmeans_assign(x, init).labels
    sample = slice(0, 4096)
    distances = torch.cdist(x[sample].double(), init.double())
    chosen = distances.gather(1, labels[sample, None])[:, 0]
    assert (chosen <= distances.amin(1) * (1 + 1e-6)).all(), "kmeans_assign is not exact"
    floor = machine.floor(
        2 * n * d + 20 * n, 2 * n * k * d
    )  # scaled halves, labels and errors; all rows but a few stay
    rows = []
    last = int(fastclust.kmeans(x, k, init=init, max_iter=25, tol=0.0).n_iter)
    for name, stored in as_stored(x):
        got = fastclust.kmeans_assign(stored, init)
        assert torch.equal(got.labels, fastclust.kmeans_assign(stored.float(), init).labels), (
            f"{name} differs from float32"
        )

        def iterate(it: int, stored: torch.Tensor = stored) -> object:
            return fastclust.kmeans(stored, k, init=init, max_iter=it, tol=0.0)

        rows.append((name, per_iteration(iterate, last), floor))
    for name, run in peers_of_kmeans(x, init).items():
        rows.append((name, attempt(lambda run=run: per_iteration(run, last)), None))
    return [(f"k-means, one iteration, {n:,} × {d}, K = {k}", *row) for row in rows]


def as_stored(x: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """The same rows in the dtypes that the kernels read."""
    return [("fastclust", x), ("fastclust, fp16 rows", x.half()), ("fastclust, bf16 rows", x.bfloat16())]


def attempt(measure: Callable[[], float]) -> float | str:
    """A peer's time, or why there is none."""
    try:
        return measure()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"


def eager_knn(x: torch.Tensor, queries: torch.Tensor, k: int) -> torch.Tensor:
    return torch.cat([(part @ x.T).topk(k + 1).indices for part in queries.split(4096)])


def bench_knn(machine: Machine, n: int, d: int, k: int) -> list[tuple]:
    x = clusters(n, d, 100)
    values = fastclust.knn(x[:20000], k).values
    scores = (x[:256].double() @ x[:20000].double().T).fill_diagonal_(-2)
    assert torch.allclose(values[:256].double(), scores.topk(k).values, atol=1e-6), "knn is not exact"
    floor = machine.floor(4 * n * d, 2 * n * n * d)
    repetitions = 5 if n <= 10**5 else 1
    rows = []
    for name, stored in as_stored(x):
        some = stored[:5000]
        assert torch.equal(fastclust.knn(some, k).indices, fastclust.knn(some.float(), k).indices), name

        def build(stored: torch.Tensor = stored) -> object:
            return fastclust.knn_graph(stored, k)

        rows.append((name.replace("fastclust", "fastclust.knn_graph"), milliseconds(build, repetitions), floor))
    part = min(n, 10**5)  # all rows of the largest size would take eager torch longer than everything else together
    name = "eager torch, neighbours alone" + (f", {part:,} rows times {n / part:g}" if part < n else "")
    searched = attempt(lambda: n / part * milliseconds(lambda: eager_knn(x, x[:part], k), repetitions))
    rows.append((name, searched, None))
    if (
        (faiss := optional("faiss"))
        and hasattr(faiss, "StandardGpuResources")
        and optional("faiss.contrib.torch_utils")
    ):
        resources = faiss.StandardGpuResources()

        def search() -> object:
            return faiss.knn_gpu(resources, x, x, k + 1, metric=faiss.METRIC_INNER_PRODUCT)

        rows.append(("faiss-gpu, neighbours alone", attempt(lambda: milliseconds(search, repetitions)), None))
    return [(f"kNN graph, {n:,} × {d}, k = {k}", *row) for row in rows]


def bench_diffusion(machine: Machine, n: int, c: int) -> list[tuple]:
    graph = fastclust.knn_graph(clusters(n, 128, c), 50)
    y = torch.zeros(n, c, device=DEVICE)
    rows = torch.randperm(n, device=DEVICE)[: n // 10]
    y[rows, torch.randint(c, rows.shape, device=DEVICE)] = 1
    result = fastclust.diffuse(graph, y, tol=1e-6, max_iter=1000)
    assert result.residual.max() < 1e-4, "diffuse did not converge"  # float's own rounding is 1e-7 / (1 - alpha)
    iterations = int(result.n_iter.max())
    # Per iteration: the graph's columns and values, and p, q, r, x read or written once each where they must be.
    moved = iterations * (8 * graph.values().numel() + 8 * 4 * n * c)
    ours = milliseconds(lambda: fastclust.diffuse(graph, y, tol=1e-6, max_iter=1000), 5)
    product = attempt(lambda: milliseconds(lambda: torch.sparse.mm(graph, y), 5) * iterations)
    what = f"diffusion, {n:,} nodes, {c} classes, to 1e-6 in {iterations} iterations"
    return [(what, "fastclust", ours, machine.floor(moved, 0)), (what, "torch.sparse products alone", product, None)]


def bench_pairwise_kl(machine: Machine, b: int, k: int) -> list[tuple]:
    log_p = torch.randn(b, k, device=DEVICE).log_softmax(1).requires_grad_()
    labels = torch.randint(10, (b,), device=DEVICE)

    def eager(log_p: torch.Tensor) -> torch.Tensor:
        p = log_p.exp()
        kl = (p * log_p).sum(1, keepdim=True) - p @ log_p.T
        similar = labels[:, None] == labels[None]
        pairs = ~torch.eye(b, dtype=torch.bool, device=DEVICE)
        hinge = (2.0 - kl).clamp(min=0)
        return (kl + kl.T)[similar & pairs].mean() + (hinge + hinge.T)[~similar].mean()

    def ours() -> None:
        fastclust.pairwise_kl(log_p, labels, margin=2.0).backward()

    value = fastclust.pairwise_kl(log_p, labels, margin=2.0)
    assert torch.allclose(value, eager(log_p), rtol=1e-3), "pairwise_kl differs from eager torch"
    floor = machine.floor(4 * 4 * b * k, 3 * 2 * b * b * k)
    what = f"pairwise KL, B = {b}, K = {k}, forward + backward"
    return [
        (what, "fastclust", milliseconds(ours), floor),
        (what, "eager torch", attempt(lambda: milliseconds(lambda: eager(log_p).backward())), None),
    ]


def bench_epoch(machine: Machine, n: int, d: int) -> list[tuple]:
    """The pseudo-labels of one epoch of CycleCluster, as benches/bench_epoch.py has them on the CPU."""
    x, labels = clusters(n, d, 10), torch.full((n,), -1, device=DEVICE)
    labels[torch.randperm(n, device=DEVICE)[:400]] = torch.arange(400, device=DEVICE) % 10

    def epoch() -> None:
        fastclust.kmeans(x, 100, init=x[:100], max_iter=100)
        graph = fastclust.knn_graph(x, 50)
        fastclust.propagate_labels(graph, labels, n_classes=10, tol=0.0, max_iter=20)

    floor = machine.floor(0, 2 * n * n * d)
    return [(f"one epoch's pseudo-labels, {n:,} × {d}", "fastclust", milliseconds(epoch, 5), floor)]


def page_of(name: str) -> Path:
    """The results file of the GPU of this name."""
    return RESULTS / f"cuda-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.md"


def commit() -> str:
    """Where git knows it: the source may lie here without its history."""
    try:
        run = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent
        )
    except OSError:
        return "unknown"
    return run.stdout.strip() or "unknown"


def write(rows: list[tuple], machine: Machine, name: str) -> Path:
    lines = [
        f"# CUDA on one {name}",
        "",
        f"`benches/gpu.sh` at commit {commit()}; torch {torch.__version__}.",
        f"Ceilings measured in the same run: copy {machine.bytes_per_ms / 1e9:.2f} TB/s, half-precision product "
        f"{machine.operations_per_ms / 1e9:.0f} TFLOP/s. Median device time, cold L2.",
        "",
        "| work | who | ms | floor, ms | share of the floor |",
        "|---|---|---|---|---|",
    ]
    for what, who, time, floor in rows:
        ours = isinstance(time, float) and floor is not None
        shown = f"{time:.3g}" if isinstance(time, float) else time
        lines.append(f"| {what} | {who} | {shown} | {f'{floor:.3g} | {floor / time:.0%}' if ours else ' | '} |")
    path = page_of(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def small() -> None:
    """Every kernel once, against the CPU."""
    torch.manual_seed(0)
    x = torch.randn(700, 33)
    init, labels = x[:20].clone(), torch.randint(4, (700,))

    def run(device: str) -> list[torch.Tensor]:
        rows, starts, stored = x.to(device), init.to(device), list[torch.Tensor]()
        graph = fastclust.knn_graph(rows, 9)
        f = fastclust.diffuse(graph, torch.eye(700, 7, device=device), max_iter=30)
        log_p = fastclust.soft_assign(rows / 4, starts / 4).detach().requires_grad_()
        fastclust.pairwise_kl(log_p, labels.to(device)).backward()
        few = log_p.detach()[:90].double().requires_grad_()
        fastclust.pairwise_kl(few, labels[:90].to(device)).backward()
        near = fastclust.knn(rows, 128, queries=rows[:150] + 1, metric="euclidean")
        plain = fastclust.knn(rows[:, :3].double(), 5)
        lloyd = fastclust.kmeans(rows, 20, init=starts, max_iter=5)
        double = fastclust.kmeans(rows.double(), 3, init=starts[:3].double(), max_iter=3)
        fastclust.kmeans(rows, 5, n_init=2, seed=0, max_iter=2)
        for half in (rows.half(), rows.bfloat16()):
            fastclust.kmeans(half, 5, seed=0, max_iter=2, tol=1e-4)
            stored += [fastclust.knn(half, 5, metric=metric).values for metric in ("cosine", "euclidean")]
            stored.append(fastclust.kmeans_assign(half, starts).distances)
        found = [graph.values(), f.f, log_p.detach(), log_p.grad, few.grad, near.values, plain.values]
        return [*found, *stored, lloyd.centroids, double.centroids]

    for ours, expected in zip(run(DEVICE), run("cpu"), strict=True):
        torch.testing.assert_close(ours.cpu(), expected, rtol=1e-3, atol=1e-4)


def attempt_rows(what: str, bench: Callable[[], list[tuple]]) -> list[tuple]:
    """A bench's rows, or one that tells why there are none, so that an error of one op does not hide the others."""
    try:
        rows = bench()
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error)[:120]}".splitlines()[0]
        rows = [(what, "fastclust", reason, None)]
    print(*rows, sep="\n", flush=True)
    torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--page", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benches/gpu_figures.py: torch sees no GPU here; nothing was measured")
    name = torch.cuda.get_device_name()
    if arguments.page:
        return print(page_of(name))
    if arguments.small:
        return small()
    machine = Machine()
    benches = {
        "pairwise KL": lambda: bench_pairwise_kl(machine, 4096, 100),
        "k-means, K = 100": lambda: bench_kmeans(machine, 10**6, 128, 100),
        "k-means, K = 4096": lambda: bench_kmeans(machine, 10**6, 128, 4096),
        "kNN graph, 50,000": lambda: bench_knn(machine, 50_000, 128, 50),
        "diffusion": lambda: bench_diffusion(machine, 50_000, 100),
        "one epoch": lambda: bench_epoch(machine, 50_000, 128),
        "kNN graph, 1,000,000": lambda: bench_knn(machine, 10**6, 128, 50),
    }
    rows: list[tuple] = []
    for what, bench in benches.items():
        rows += attempt_rows(what, bench)
        path = write(rows, machine, name)  # after each, so that a run cut short leaves what it has
    print(path.read_text())
    if any(who.startswith("fastclust") and isinstance(time, str) for _, who, time, _ in rows):
        raise SystemExit("benches/gpu_figures.py: a bench of ours failed, see its row")


if __name__ == "__main__":
    main()
