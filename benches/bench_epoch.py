"""The pseudo-labels of one epoch of CycleCluster: clusters, graph, diffusion, weights; beside faiss and SciPy.

`pytest benches/bench_epoch.py` is quick; `--full`: 50,000 features of 128 dimensions, 10 classes, K = 100.
"""

import numpy as np
import pytest
import scipy.sparse
import torch
from bench_knn import unit_rows
from scipy.sparse.linalg import cg

import fastclust

faiss = pytest.importorskip("faiss")

ALPHA, STEPS, CLASSES, CLUSTERS, NEIGHBOURS, LLOYD_STEPS = 0.99, 20, 10, 100, 50, 100


def ours(x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    clusters = fastclust.kmeans(x, CLUSTERS, init=x[:CLUSTERS], max_iter=LLOYD_STEPS).labels
    graph = fastclust.knn_graph(x, NEIGHBOURS)
    pseudo = fastclust.propagate_labels(graph, labels, n_classes=CLASSES, alpha=ALPHA, tol=0.0, max_iter=STEPS)
    return clusters, pseudo.labels


def theirs(x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """faiss and SciPy, as the released code of label propagation papers puts them together."""
    rows, n = x.numpy(), len(x)
    model = faiss.Kmeans(x.shape[1], CLUSTERS, niter=LLOYD_STEPS, max_points_per_centroid=n, min_points_per_centroid=1)
    model.train(rows, init_centroids=rows[:CLUSTERS])
    clusters = model.index.search(rows, 1)[1][:, 0]

    index = faiss.IndexFlatIP(x.shape[1])
    index.add(rows)
    similarity, neighbour = index.search(rows, NEIGHBOURS + 1)
    weights = np.maximum(similarity[:, 1:], 0) ** 3
    source = np.repeat(np.arange(n), NEIGHBOURS)
    w = scipy.sparse.csr_matrix((weights.ravel(), (source, neighbour[:, 1:].ravel())), shape=(n, n))
    w = w + w.T
    scale = scipy.sparse.diags((1 / np.sqrt(np.asarray(w.sum(1)).ravel())).astype(np.float32))
    system = (scipy.sparse.identity(n, dtype=np.float32) - ALPHA * (scale @ w @ scale)).tocsr()
    f = np.empty((n, CLASSES), dtype=np.float32)
    for c in range(CLASSES):
        y = (labels.numpy() == c).astype(np.float32)
        f[:, c], _ = cg(system, y / y.sum(), rtol=0, maxiter=STEPS)
    p = np.maximum(f, 0)
    p /= np.maximum(p.sum(1, keepdims=True), 1e-30)
    entropy = -(p * np.log(np.maximum(p, 1e-30))).sum(1)
    _weights = 1 - entropy / np.log(CLASSES)
    return torch.from_numpy(clusters), torch.from_numpy(p.argmax(1))


@pytest.mark.parametrize("who", ["fastclust", "faiss + SciPy"])
def test_epoch(benchmark, measure, full, who):
    n, d = (50_000, 128) if full else (3_000, 64)
    x = unit_rows("features", n, d)
    labels = torch.full((n,), -1)
    generator = torch.Generator().manual_seed(1)
    labels[torch.randperm(n, generator=generator)[: 40 * CLASSES]] = torch.arange(40 * CLASSES) % CLASSES
    benchmark.group = f"one epoch's pseudo-labels, {n} x {d}, {CLASSES} classes, K = {CLUSTERS}"
    benchmark.name = who
    free = labels < 0
    if who != "fastclust":
        agree = ours(x, labels)[1][free] == theirs(x, labels)[1][free]
        assert agree.double().mean() > 0.999
    run = ours if who == "fastclust" else theirs
    measure(run, x, labels)
