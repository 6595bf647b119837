"""Exact nearest neighbours and the affinity graph made of them."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops

METRICS = ("cosine", "inner_product", "euclidean")
SYMMETRIZATIONS = ("sum", "mean", "max", "none")
PRECISIONS = ("exact", "fast")


class KNNResult(NamedTuple):
    """Neighbours of each query, best first."""

    values: Tensor  # (M, k): similarities, descending, or distances, ascending
    indices: Tensor  # (M, k) int64: rows of x


def one_of(op: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(choices)}, got {value!r}")


def check(op: str, k: int, metric: str, precision: str) -> None:
    one_of(op, "metric", metric, METRICS)
    one_of(op, "precision", precision, PRECISIONS)
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"{op}: k must be an int, got {type(k).__name__}")


def knn(
    x: Tensor,
    k: int,
    *,
    queries: Tensor | None = None,
    metric: str = "cosine",
    precision: str = "exact",
) -> KNNResult:
    """The exact k nearest rows of `x` for each query, or for each row of `x` among the others.

    A cheap filter with a certified error bound rules out almost all pairs; the exact scores of the rest, products in
    the dtype of `x` (`euclidean`: sums of squared differences), decide. Nothing of size M × N is stored: beside the
    rows' prepared copies the search holds at most 32 k + 2900 bytes per query.

    Args:
        x: (N, D) float tensor, D at least 1; float16 and bfloat16 are computed and returned in float32
            (on CUDA without a copy, but for "cosine" the rows are held divided by their norms, in float32).
        k: how many neighbours: below N without `queries`, at most N with them.
        queries: (M, D), the dtype and device of `x`; None: the rows of `x`, each without itself (its duplicates count).
        metric: "cosine" (a zero row has similarity 0 to everything), "inner_product" or "euclidean" (the distance
            itself, not its square).
        precision: "exact": neighbours are those that the dtype's own scores give. "fast": the filter's error is taken
            to be a quarter of its bound, so that a neighbour may, rarely, be missed; values are exact all the same.

    Returns:
        values and indices, (M, k) each, best first; equal values in ascending order of index.

    Raises:
        ValueError: a row that is not finite, k out of range, a wrong shape or an unknown name.
        TypeError: x or queries is not a float tensor, or k not an int.
    """
    check("knn", k, metric, precision)
    x = ops.stored_tensor("knn", "x", x)
    if queries is not None:
        queries = ops.stored_tensor("knn", "queries", queries)
        if queries.dtype != x.dtype:
            x, queries = ops.float_tensor("knn", "x", x), ops.float_tensor("knn", "queries", queries)
    return KNNResult(*ops.knn(x, queries, k, metric, precision == "exact"))


def knn_graph(
    x: Tensor,
    k: int,
    *,
    metric: str = "cosine",
    power: float = 3.0,
    symmetrize: str = "sum",
    precision: str = "exact",
) -> Tensor:
    """The affinity graph of the k nearest neighbours, as label diffusion takes it.

    w_ij = max(s_ij, 0)^power where j is among the k neighbours of i, without j = i (Iscen et al., "Label Propagation
    for Deep Semi-supervised Learning", CVPR 2019, eq. 9). s_ij is the similarity of `metric`; for "euclidean" it is
    exp(-d_ij² / (σ_i σ_j)) with σ_i the distance from i to its k-th neighbour (Zelnik-Manor & Perona, "Self-Tuning
    Spectral Clustering", NIPS 2004), and `power` narrows the kernel.

    Args:
        x: (N, D) float tensor.
        k: neighbours per row, below N.
        metric: "cosine", "inner_product" or "euclidean".
        power: positive exponent of the similarity.
        symmetrize: "sum" (W + Wᵀ), "mean" (half of it), "max" (the greater of w_ij and w_ji) or "none" (W itself).
        precision: as in `knn`.

    Returns:
        Sparse CSR tensor (N, N) of the dtype of `x`: int64 indices, columns ascending in each row, an empty diagonal.
        Entries of weight zero (similarity zero or negative) are not stored, so a row may hold fewer than k.

    Raises:
        ValueError, TypeError: as `knn`; power not positive and finite; an unknown symmetrize.
    """
    check("knn_graph", k, metric, precision)
    one_of("knn_graph", "symmetrize", symmetrize, SYMMETRIZATIONS)
    x = ops.stored_tensor("knn_graph", "x", x)
    with ops.told_by("knn_graph"):
        values, indices = ops.knn(x, None, k, metric, precision == "exact")
        if metric == "euclidean":
            values = self_tuning_kernel(values, indices, values[:, -1])
        crow, col, weights = ops.knn_to_csr(values, indices, float(power), symmetrize)
    return csr_tensor(crow, col, weights, (x.shape[0], x.shape[0]))


def csr_tensor(crow: Tensor, col: Tensor, weights: Tensor, shape: tuple[int, int]) -> Tensor:
    """A sparse CSR tensor of parts that are known to be right."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")  # of no use to a user
        return torch.sparse_csr_tensor(crow, col, weights, shape, check_invariants=False)


def self_tuning_kernel(distances: Tensor, indices: Tensor, sigma: Tensor) -> Tensor:
    """exp(-d_ij² / (σ_i σ_j)), σ (N,) of all rows; 1 where d_ij = 0: a row with k duplicates has σ = 0."""
    ratio = (distances / distances[:, -1:]) * (distances / sigma[indices])
    return torch.where(distances > 0, torch.exp(-ratio), torch.ones_like(distances))
