"""k-means: Lloyd's iteration over batches of problems and restarts, and prediction for new rows."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from . import ops
from ._sums import ROWS_AT_ONCE, ExactSums


class KMeansResult(NamedTuple):
    """What `kmeans` returns; with x (B, N, D) every field has a leading B."""

    centroids: Tensor  #: (K, D)
    labels: Tensor  #: (N,) int64: the centroid nearest to each row, or its fixed label
    inertia: Tensor  #: scalar: Σ w·|x − centroids[label]|²
    n_iter: Tensor  #: scalar int64: iterations of the start that was kept


class AssignResult(NamedTuple):
    """What `kmeans_assign` returns; with x (B, N, D) every field has a leading B."""

    labels: Tensor  #: (N,) int64
    distances: Tensor  #: (N,) squared Euclidean distances to the centroids of these labels


def _exact(op: str, precision: str) -> bool:
    if precision not in ("exact", "fast"):
        raise ValueError(f"{op}: precision must be 'exact' or 'fast', got {precision!r}")
    return precision == "exact"


def _batched(op: str, name: str, value: Tensor, dim: int) -> Tensor:
    """`value` with a leading batch dimension, which it may lack."""
    if value.dim() not in (dim - 1, dim):
        raise ValueError(f"{op}: {name} must have {dim - 1} or {dim} dimensions, got shape {tuple(value.shape)}")
    return value if value.dim() == dim else value.unsqueeze(0)


def _unit_rows(op: str, name: str, x: Tensor) -> Tensor:
    x = x.to(ops.computed_dtype(x))
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    if not torch.compiler.is_compiling() and (zero := (norm == 0).flatten()).any():
        first = int(zero.nonzero()[0])
        raise ValueError(
            f"{op}: {name} holds {int(zero.sum())} zero rows, first at {first}; spherical needs a direction"
        )
    unit: Tensor = x / norm
    return unit


def _generator(seed: int | Generator | None, device: torch.device) -> Generator | None:
    if seed is None or isinstance(seed, Generator):
        return seed
    return Generator(device).manual_seed(int(seed))


def _uniforms(shape: tuple[int, ...], x: Tensor, generator: Generator | None) -> Tensor:
    """Draws in [0, 1), float32 unless x is float64, which has those bits and more: both start at the same rows."""
    draws = torch.rand(shape, dtype=torch.float32, device=x.device, generator=generator)
    if x.dtype != torch.float64:
        return draws
    more = torch.rand(shape, dtype=torch.float32, device=x.device, generator=generator)
    return draws.double() + more.double() * 2.0**-24


def first_centroids(
    x: Tensor, weight: Tensor | None, n_clusters: int, init: str, n_init: int, generator: Generator | None
) -> Tensor:
    """(B, R, K, D) rows of x, in the dtype that x is computed in."""
    B, N, D = x.shape
    if init == "random":
        # The K largest of N keys u^(1/w) are a sample without replacement by weight (Efraimidis & Spirakis 2006).
        keys = torch.rand((B, n_init, N), dtype=torch.float64, device=x.device, generator=generator).log()
        if weight is not None:
            keys = keys / weight.double()[:, None]
        rows = keys.topk(n_clusters, dim=-1).indices
    else:
        candidates = 2 + int(math.log(n_clusters))
        rows = ops.kmeans_plus_plus(x, weight, _uniforms((B, n_init, n_clusters, candidates), x, generator))
    flat = rows.flatten(1)[..., None].expand(-1, -1, D)
    return x.gather(1, flat).view(B, n_init, n_clusters, D).to(ops.computed_dtype(x))


def _start_at_fixed_means(init: Tensor, x: Tensor, weight: Tensor | None, labels: Tensor) -> Tensor:
    """`init` with the clusters that have fixed rows moved to the weighted mean of those."""
    mass = (labels >= 0).double() if weight is None else weight.double() * (labels >= 0)
    starts = [_fixed_means(*problem, init.shape[2]) for problem in zip(x, mass, labels, strict=True)]
    means = torch.stack([mean for mean, _ in starts])[:, None]
    known = torch.stack([total > 0 for _, total in starts])[:, None, :, None]
    return torch.where(known, means.to(init.dtype), init)


def _fixed_means(x: Tensor, mass: Tensor, labels: Tensor, n_clusters: int) -> tuple[Tensor, Tensor]:
    """Means (K, D) of the rows by label and the masses (K,) of those, float64: the same bits on any device."""
    groups = labels.clamp(0, n_clusters - 1)  # kmeans_lloyd tells of labels out of range
    values = torch.cat([x.double() * mass[:, None], mass[:, None]], dim=1)
    exact = ExactSums(values.abs().amax(dim=0), len(x), x.dtype)
    sums = exact.zeros(n_clusters)
    for part, of_group in zip(torch.split(values, ROWS_AT_ONCE), torch.split(groups, ROWS_AT_ONCE), strict=True):
        exact.add(sums, part, of_group)
    total = exact.value(sums)
    return total[:, :-1] / total[:, -1:], total[:, -1]


def kmeans(
    x: Tensor,
    n_clusters: int,
    *,
    init: str | Tensor = "k-means++",
    n_init: int = 1,
    max_iter: int = 100,
    tol: float = 0.0,
    spherical: bool = False,
    sample_weight: Tensor | None = None,
    labels: Tensor | None = None,
    precision: str = "exact",
    seed: int | Generator | None = None,
) -> KMeansResult:
    """Lloyd's k-means: minimises Σ w·|x − c|² over K centroids and the rows' labels.

    Each iteration labels every row with its nearest centroid (the lowest of equals) and moves each centroid to the
    weighted mean of its rows. It stops where no label changes, where the centroids move less than `tol`, or after
    `max_iter` iterations; labels and inertia always belong to the returned centroids. The same seed, inputs and device
    give the same bits, whatever the number of threads.

    A cluster without a row of positive weight is put on the row of the largest cluster (by weight) that lies farthest
    from that cluster's centroid; several take the farthest, the second farthest, … Where no row lies off its centroid
    (fewer distinct rows than clusters) an empty cluster keeps its centroid, and the iteration ends as usual.

    Args:
        x: (N, D) rows, or (B, N, D) for B independent problems; floating point, finite. Half precision is computed and
            returned in float32 (on CUDA without a copy of x in float32, unless `spherical`).
        n_clusters: K, between 1 and N.
        init: "k-means++" (greedy D² sampling with 2 + ⌊ln K⌋ candidates per pick), "random" (distinct rows, by weight),
            or centroids (K, D) or (B, K, D).
        n_init: how many starts to run; the one with the least inertia is returned. 1 with given centroids.
        max_iter: iterations per start at most, ≥ 1.
        tol: stop where Σ|c_new − c|² ≤ tol · mean feature variance of x, as in scikit-learn; 0: where nothing changes.
        spherical: cosine k-means: rows are scaled to unit norm (a zero row is an error), and so are the centroids after
            each update; inertia is Σ w·|x/|x| − c|² = 2 Σ w·(1 − cos).
        sample_weight: (N,) or (B, N), ≥ 0 and not all zero; ones by default.
        labels: (N,) or (B, N) integers for constrained k-means: a row with a label ≥ 0 always counts for that cluster,
            −1 leaves it free. Unless centroids are given, a cluster with fixed rows starts at their mean.
        precision: "exact": each label is the one that x.dtype's arithmetic decides on; "fast" may skip the certificate
            of cheaper products where the device has them.
        seed: int or torch.Generator (on x's device) for the starts; None: torch's default generator.

    Returns:
        KMeansResult(centroids (K, D), labels (N,), inertia, n_iter), each with a leading B when x has one.

    Raises:
        TypeError: x, init, sample_weight or labels is not a tensor of a suitable dtype.
        ValueError: a shape, a value that is not finite, an option out of range, or a zero row with `spherical`.

    Sources: Lloyd 1982; Arthur & Vassilvitskii 2007 (k-means++); Basu et al. 2002 (labels); Dhillon & Modha 2001
    (spherical).
    """
    x_ = _batched("kmeans", "x", ops.stored_tensor("kmeans", "x", x), 3)
    exact = _exact("kmeans", precision)
    if n_clusters < 1:
        raise ValueError(f"kmeans: n_clusters must be at least 1, got {n_clusters}")
    if n_clusters > x_.shape[1]:
        raise ValueError(f"kmeans: n_clusters must be at most the number of rows {x_.shape[1]}, got {n_clusters}")
    if n_init < 1 or (n_init > 1 and not isinstance(init, str)):
        raise ValueError(f"kmeans: n_init must be at least 1, and 1 with given centroids, got {n_init}")
    if max_iter < 1:
        raise ValueError(f"kmeans: max_iter must be at least 1, got {max_iter}")
    if not tol >= 0:
        raise ValueError(f"kmeans: tol must not be negative, got {tol}")

    weight = fixed = None
    if sample_weight is not None:
        weight = _batched("kmeans", "sample_weight", ops.float_tensor("kmeans", "sample_weight", sample_weight), 2)
        weight = weight.to(ops.computed_dtype(x_))
    if labels is not None:
        fixed = _batched("kmeans", "labels", ops.label_tensor("kmeans", "labels", labels), 2)
    for name, value in (("sample_weight", weight), ("labels", fixed)):
        if value is not None and value.shape != x_.shape[:2]:
            raise ValueError(f"kmeans: {name} must have one entry per row of x, got shape {tuple(value.shape)}")

    if spherical:
        x_ = _unit_rows("kmeans", "x", x_)
    if isinstance(init, str):
        if init not in ("k-means++", "random"):
            raise ValueError(f"kmeans: init must be 'k-means++', 'random' or a tensor, got {init!r}")
        start = first_centroids(x_, weight, n_clusters, init, n_init, _generator(seed, x_.device))
        if fixed is not None:
            start = _start_at_fixed_means(start, x_, weight, fixed)
            start = _unit_rows("kmeans", "the mean of fixed rows", start) if spherical else start
    else:
        start = _batched("kmeans", "init", ops.float_tensor("kmeans", "init", init), 3).to(ops.computed_dtype(x_))
        if start.shape != (x_.shape[0], n_clusters, x_.shape[2]):
            raise ValueError(
                f"kmeans: init must hold ({n_clusters}, {x_.shape[2]}) centroids per problem, got {tuple(init.shape)}"
            )
        start = (_unit_rows("kmeans", "init", start) if spherical else start)[:, None]

    centroids, assigned, inertia, n_iter = ops.kmeans_lloyd(x_, start, weight, fixed, max_iter, tol, spherical, exact)
    if n_init > 1:
        best = inertia.argmin(dim=1, keepdim=True)
        centroids = centroids.take_along_dim(best[..., None, None], dim=1)
        assigned = assigned.take_along_dim(best[..., None], dim=1)
        inertia, n_iter = inertia.take_along_dim(best, dim=1), n_iter.take_along_dim(best, dim=1)
    result = (centroids.squeeze(1), assigned.squeeze(1), inertia.squeeze(1), n_iter.squeeze(1))
    return KMeansResult(*(result if x.dim() == 3 else (field.squeeze(0) for field in result)))


def kmeans_assign(x: Tensor, centroids: Tensor, *, precision: str = "exact") -> AssignResult:
    """The nearest centroid of each row: the labels that `kmeans` would give to new rows.

    Args:
        x: (N, D) rows, or (B, N, D); floating point, finite. Half precision is computed in float32, on
            CUDA without a copy.
        centroids: (K, D), or (B, K, D) with x (B, N, D). Centroids of spherical k-means give its labels to rows of
            any scale, its distances to rows of unit norm.
        precision: as for `kmeans`.

    Returns:
        AssignResult(labels (N,) int64, the lowest of equals; distances (N,) squared).

    Raises:
        TypeError: x or centroids is not a floating-point tensor.
        ValueError: the shapes do not fit, or a row is not finite.
    """
    x_ = _batched("kmeans_assign", "x", ops.stored_tensor("kmeans_assign", "x", x), 3)
    c = _batched("kmeans_assign", "centroids", ops.float_tensor("kmeans_assign", "centroids", centroids), 3)
    if x.dim() != centroids.dim():
        raise ValueError(
            f"kmeans_assign: centroids must have as many dimensions as x, {x.dim()}, got {centroids.dim()}"
        )
    labels, distances = ops.kmeans_assign(x_, c.to(ops.computed_dtype(x_)), _exact("kmeans_assign", precision))
    return AssignResult(labels, distances) if x.dim() == 3 else AssignResult(labels[0], distances[0])
