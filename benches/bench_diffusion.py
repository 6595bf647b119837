"""Diffusion against SciPy's conjugate gradients per class and a block CG on PyTorch's CSR product, 20 steps each.

`pytest benches/bench_diffusion.py` is quick; with `--full`: 50k nodes, 50 neighbours, 10 and 100 classes.
"""

import warnings

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix, diags, identity
from scipy.sparse.linalg import cg
from torch import Tensor

import fastclust

warnings.filterwarnings("ignore", message="Sparse")

ALPHA, STEPS = 0.99, 20


def clustered_points(n: int) -> Tensor:
    """Unit vectors (n, 128) in 100 overlapping clusters of 8 dimensions each."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(100, 128, generator=generator), dim=1)
    basis = torch.randn(100, 8, 128, generator=generator) / 128**0.5
    cluster = torch.randint(100, (n,), generator=generator)
    offset = torch.einsum("nl,nld->nd", 0.35 * torch.randn(n, 8, generator=generator), basis[cluster])
    return torch.nn.functional.normalize(centres[cluster] + offset, dim=1)


def neighbour_graph(x: Tensor, k: int) -> Tensor:
    """max(sim, 0)³ of the k nearest by inner product, summed with its transpose; by PyTorch alone."""
    n = len(x)
    values, indices = [], []
    for begin in range(0, n, 2000):
        similarity = x[begin : begin + 2000] @ x.T
        similarity.diagonal(begin).fill_(-torch.inf)
        best = similarity.topk(k)
        values.append(best.values)
        indices.append(best.indices)
    row, col = torch.arange(n).repeat_interleave(k), torch.cat(indices).flatten()
    weight = torch.cat(values).flatten().clamp(min=0) ** 3
    both = torch.sparse_coo_tensor(
        torch.stack([torch.cat([row, col]), torch.cat([col, row])]), weight.repeat(2), (n, n), check_invariants=True
    )
    return both.coalesce().to_sparse_csr()


@pytest.fixture(scope="module")
def graph(full: bool) -> Tensor:
    return neighbour_graph(clustered_points(50_000 if full else 4_000), 50)


@pytest.fixture(params=[10, 100], ids=lambda c: f"{c}classes")
def y(request: pytest.FixtureRequest, graph: Tensor) -> Tensor:
    classes = request.param
    y = torch.zeros(graph.shape[0], classes)
    labelled = torch.randperm(graph.shape[0], generator=torch.Generator().manual_seed(1))[: 5 * classes]
    y[labelled, torch.arange(5 * classes) % classes] = 0.2
    return y


def normalised(graph: Tensor) -> csr_matrix:
    n = graph.shape[0]
    w = csr_matrix(
        (
            graph.values().numpy(),
            graph.col_indices().numpy().astype(np.int32),
            graph.crow_indices().numpy().astype(np.int32),
        ),
        shape=(n, n),
    )
    scale = diags((1 / np.sqrt(np.asarray(w.sum(1)).ravel())).astype(np.float32))
    return (scale @ w @ scale).tocsr()


def torch_block_cg(s: Tensor, y: Tensor) -> Tensor:
    x, r, p = torch.zeros_like(y), y.clone(), y.clone()
    rr = (r * r).sum(0)
    for _ in range(STEPS):
        q = p - ALPHA * (s @ p)
        step = rr / (p * q).sum(0)
        x += step * p
        r -= step * q
        rr_next = (r * r).sum(0)
        p = r + (rr_next / rr) * p
        rr = rr_next
    return x


def scipy_per_class(s: csr_matrix, y: Tensor) -> Tensor:
    matrix = (identity(s.shape[0], dtype=np.float32, format="csr") - ALPHA * s).tocsr()
    columns = [cg(matrix, column, rtol=0, maxiter=STEPS)[0] for column in y.T.contiguous().numpy()]
    return torch.from_numpy(np.stack(columns, 1))


@pytest.mark.parametrize("solver", ["fastclust", "torch-block-cg", "scipy-per-class"])
def test_diffusion(benchmark, measure, graph, y, solver):
    benchmark.group = f"diffusion, {graph.shape[0]} nodes, {y.shape[1]} classes, {STEPS} steps"
    s = normalised(graph)  # the peers get it for nothing, and no check of their input
    s_torch = torch.sparse_csr_tensor(
        torch.from_numpy(s.indptr).long(), torch.from_numpy(s.indices).long(), torch.from_numpy(s.data), s.shape
    )
    solve = {
        "fastclust": lambda: fastclust.diffuse(graph, y, alpha=ALPHA, tol=0.0, max_iter=STEPS).f,
        "torch-block-cg": lambda: torch_block_cg(s_torch, y),
        "scipy-per-class": lambda: scipy_per_class(s, y),
    }[solver]
    expected = fastclust.diffuse(graph, y.double(), alpha=ALPHA, tol=0.0, max_iter=STEPS).f
    assert (solve() - expected).norm() <= 1e-4 * expected.norm()
    benchmark.name = solver
    benchmark.extra_info["multiply-adds"] = graph.values().numel() * y.shape[1] * STEPS
    measure(solve)


def test_full_convergence(benchmark, measure, graph, y):
    benchmark.group = f"diffusion, {graph.shape[0]} nodes, {y.shape[1]} classes, to 1e-6"
    benchmark.name = "fastclust"
    result = measure(lambda: fastclust.diffuse(graph, y, max_iter=300))
    assert result.residual.max() < 1e-5
    benchmark.extra_info["multiply-adds"] = graph.values().numel() * int(result.n_iter.sum())
