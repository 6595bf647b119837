"""k-means beside scikit-learn, faiss and superkmeans: the same data and start, the same inertia, then the time.

    pytest benches/bench_kmeans.py            a few seconds
    pytest benches/bench_kmeans.py --full     the sizes of docs/results

The starts are such that no cluster runs empty: there the libraries' rules differ. superkmeans takes no start and stops
elsewhere; it is held to a tenth. FASTCLUST_CPU_CAPABILITY chooses our kernels.
"""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

import fastclust

faiss = pytest.importorskip("faiss")

#: n, d, k, most iterations
QUICK = [(5000, 64, 10, 20), (5000, 64, 40, 20)]
FULL = [(50_000, 128, 10, 100), (50_000, 128, 100, 300), (50_000, 128, 300, 300), (200_000, 128, 1000, 25)]


def unit_blobs(n: int, d: int, n_blobs: int, spread: float = 1.0, seed: int = 0) -> torch.Tensor:
    """Unit rows in clusters that overlap, as image embeddings do."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(n_blobs, d, generator=generator)
    which = torch.randint(n_blobs, (n,), generator=generator)
    return torch.nn.functional.normalize(centres[which] + spread * torch.randn(n, d, generator=generator), dim=1)


def run_fastclust(x: torch.Tensor, k: int, max_iter: int) -> tuple[float, int]:
    result = fastclust.kmeans(x, k, init=x[:k], max_iter=max_iter)
    return float(result.inertia), int(result.n_iter)


def run_scikit_learn(x: torch.Tensor, k: int, max_iter: int) -> tuple[float, int]:
    model = KMeans(k, init=x[:k].numpy(), n_init=1, max_iter=max_iter, tol=0, algorithm="lloyd").fit(x.numpy())
    return float(model.inertia_), int(model.n_iter_)


def run_faiss(x: torch.Tensor, k: int, max_iter: int) -> tuple[float, int]:
    """faiss does not stop where nothing changes: it is given the iterations that scikit-learn needs."""
    model = faiss.Kmeans(
        x.shape[1], k, niter=max_iter, max_points_per_centroid=len(x), min_points_per_centroid=1, verbose=False
    )
    model.train(x.numpy(), init_centroids=x[:k].numpy())
    distances, _ = model.index.search(x.numpy(), 1)
    return float(distances.sum(dtype=np.float64)), max_iter


def run_superkmeans(x: torch.Tensor, k: int, max_iter: int) -> tuple[float, int]:
    superkmeans = pytest.importorskip("superkmeans")
    model = superkmeans.SuperKMeans(
        k, x.shape[1], hierarchical=False, iters=max_iter, sampling_fraction=1.0, early_termination=False
    )
    centroids = model.train(x.numpy())
    labels = model.assign_training_points(x.numpy(), centroids)
    chosen = torch.from_numpy(centroids)[torch.from_numpy(labels.astype(np.int64))]
    return float((x - chosen).square().sum()), max_iter


RUNNERS = {
    "fastclust": run_fastclust,
    "scikit-learn": run_scikit_learn,
    "faiss": run_faiss,
    "superkmeans": run_superkmeans,
}
TOLERANCES = {"faiss": 3e-3, "superkmeans": 0.1}  # with K = 1000 faiss meets empty clusters, which it fills its own way
_needed: dict[tuple[int, int, int], tuple[torch.Tensor, float, int]] = {}


def problem(n: int, d: int, k: int, max_iter: int) -> tuple[torch.Tensor, float, int]:
    """The data, with the inertia and the iterations that scikit-learn reaches."""
    if (n, d, k) not in _needed:
        x = unit_blobs(n, d, 500 if k >= 1000 else 50)
        _needed[n, d, k] = (x, *run_scikit_learn(x, k, max_iter))
    return _needed[n, d, k]


@pytest.mark.parametrize("size", range(len(FULL)))
@pytest.mark.parametrize("who", RUNNERS)
def test_lloyd(benchmark, measure, full, who, size):
    sizes = FULL if full else QUICK
    if size >= len(sizes):
        pytest.skip("--full only")
    n, d, k, max_iter = sizes[size]
    x, inertia, n_iter = problem(n, d, k, max_iter)
    benchmark.group = f"k-means {n} x {d}, K = {k}, {n_iter} iterations"
    benchmark.name = who
    benchmark.extra_info["multiply-adds"] = n * k * d * n_iter
    got, _ = measure(RUNNERS[who], x, k, n_iter)
    assert got == pytest.approx(inertia, rel=TOLERANCES.get(who, 1e-5))


@pytest.mark.parametrize("who", ["fastclust", "scikit-learn"])
def test_many_small_problems(benchmark, measure, full, who):
    B, N, D, K = (64, 2000, 64, 20) if full else (8, 500, 16, 5)
    benchmark.group = f"k-means, {B} problems of {N} x {D}, K = {K}"
    x = torch.stack([unit_blobs(N, D, K, seed=problem) for problem in range(B)])

    def ours() -> float:
        return float(fastclust.kmeans(x, K, init=x[:, :K], max_iter=100).inertia.sum())

    def loop() -> float:
        return sum(run_scikit_learn(problem, K, 100)[0] for problem in x)

    benchmark.name = who
    total = measure(ours if who == "fastclust" else loop)
    assert total == pytest.approx(loop(), rel=1e-5)


@pytest.mark.parametrize("who", ["fastclust", "scikit-learn"])
def test_seeding(benchmark, measure, full, who):
    """k-means++ alone: one iteration after it, in both."""
    n, d, k = (50_000, 128, 100) if full else (5000, 32, 20)
    x = unit_blobs(n, d, 50)
    benchmark.group = f"k-means++ {n} x {d}, K = {k}"

    def ours() -> float:
        return float(fastclust.kmeans(x, k, seed=0, max_iter=1).inertia)

    def theirs() -> float:
        return float(KMeans(k, n_init=1, max_iter=1, random_state=0).fit(x.numpy()).inertia_)

    benchmark.name = who
    inertia = measure(ours if who == "fastclust" else theirs)
    assert inertia == pytest.approx(theirs(), rel=0.1)
