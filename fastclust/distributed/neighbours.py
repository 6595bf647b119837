"""Exact neighbours and the affinity graph of rows that are shared out."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _graph, ops
from .._graph import KNNResult
from .._group import Group, checksum, sizes_between
from .._nearest import Nearest


class ShardedGraph(NamedTuple):
    """This process's rows of a sparse (N, N) matrix."""

    crow: Tensor
    """(n + 1,) int64."""
    col: Tensor
    """(E,) int64, columns of the whole matrix, ascending in each row."""
    weights: Tensor
    """(E,)"""
    starts: tuple[int, ...]
    """Where each process's rows begin, and N."""


def knn(
    x: Tensor,
    k: int,
    *,
    metric: str = "cosine",
    precision: str = "exact",
    chunk_rows: int = 1 << 18,
    group: dist.ProcessGroup | None = None,
    timeout: float = 300.0,
) -> KNNResult:
    """The exact k nearest of all processes' rows to each row of this one, itself excluded: those of `fastclust.knn`.

    Shards go round in chunks by broadcast: a process receives N · D · sizeof(dtype) bytes less its own, and holds one
    chunk, and what `fastclust.knn` needs for its rows against that.

    Args:
        x: (n, D) float, this process's rows, none or more.
        k: below the number of all rows.
        metric, precision: see `fastclust.knn`.
        chunk_rows: rows that are sent at a time.
        group, timeout: see `kmeans`; the timeout includes the slowest process's search in a chunk.

    Returns:
        values (n, k), best first, and indices (n, k) int64, numbers in the list of all processes' rows; equal values in
        ascending order of index.

    Raises:
        TypeError, ValueError: as `fastclust.knn`, on every process. PeerError: a process has ended or does not answer.
    """
    everyone = Group("knn", group, timeout)
    return _search(everyone, x, k, metric, precision, chunk_rows)[0]


def _search(
    everyone: Group, x: Tensor, k: int, metric: str, precision: str, chunk_rows: int
) -> tuple[KNNResult, list[int]]:
    with everyone.arguments(), ops.told_by(everyone.op):
        x = ops.float_tensor(everyone.op, "x", x)
        if x.dim() != 2 or x.shape[1] == 0:
            raise ValueError(f"{everyone.op}: x must be (n, D), got {tuple(x.shape)}")
        _graph.check("knn", k, metric, precision)
        if k < 1 or chunk_rows < 1:
            raise ValueError(f"{everyone.op}: k and chunk_rows must be at least 1, got {k} and {chunk_rows}")
        if not torch.isfinite(x).all():
            first = int((~torch.isfinite(x).all(dim=1)).nonzero()[0])
            raise ValueError(f"{everyone.op}: x holds rows that are not finite, on this process the first at {first}")
    starts = everyone.starts(len(x))
    everyone.agree(features=x.shape[1], bits=x.dtype.itemsize * 8, k=k, options=checksum(metric, precision, chunk_rows))
    total, own = starts[-1], starts[everyone.rank]
    if k >= total:
        raise ValueError(f"{everyone.op}: k must be below the {total} rows of all processes, got {k}")
    nearest = Nearest(x, k, metric, precision == "exact", own)
    for source in range(everyone.size):
        for begin in range(starts[source], starts[source + 1], chunk_rows):
            size = min(chunk_rows, starts[source + 1] - begin)
            mine = source == everyone.rank
            chunk = x[begin - own : begin - own + size].contiguous() if mine else x.new_empty(size, x.shape[1])
            nearest.see(begin, everyone.broadcast(chunk, source))
    return nearest.result, starts


def knn_graph(
    x: Tensor,
    k: int,
    *,
    metric: str = "cosine",
    power: float = 3.0,
    symmetrize: str = "sum",
    precision: str = "exact",
    chunk_rows: int = 1 << 18,
    group: dist.ProcessGroup | None = None,
    timeout: float = 300.0,
) -> ShardedGraph:
    """The affinity graph of all processes' rows, `fastclust.knn_graph`; each process holds its own rows of it.

    Beside the traffic of `knn`, an edge whose mirror image belongs to another process is sent there, 16 + sizeof(dtype)
    bytes, and "euclidean" brings every row's scale to everyone, N · sizeof(dtype) bytes.

    Args:
        x, k, metric, precision, chunk_rows, group, timeout: see `knn`.
        power, symmetrize: see `fastclust.knn_graph`.

    Returns:
        ShardedGraph.

    Raises:
        As `knn` and `fastclust.knn_graph`.
    """
    everyone = Group("knn_graph", group, timeout)
    with everyone.arguments():
        _graph.one_of("knn_graph", "symmetrize", symmetrize, _graph.SYMMETRIZATIONS)
        if not 0 < power < float("inf"):
            raise ValueError(f"knn_graph: power must be positive and finite, got {power}")
    everyone.agree(graph=checksum(power, symmetrize))
    (values, indices), starts = _search(everyone, x, k, metric, precision, chunk_rows)
    if metric == "euclidean":
        sigma = everyone.gather(values[:, -1].contiguous(), sizes_between(starts))
        values = _graph.self_tuning_kernel(values, indices, sigma)
    weights = (values.clamp(min=0) ** power).flatten()
    kept = weights > 0
    own, n_rows = starts[everyone.rank], len(values)
    row = torch.arange(own, own + n_rows, device=values.device).repeat_interleave(k)
    edges, weights = torch.stack([row, indices.flatten()])[:, kept], weights[kept]
    mirror = (edges[:, :0], weights[:0]) if symmetrize == "none" else _mirror(everyone, edges, weights, starts)
    (row, col), weights = _merge(edges, weights, *mirror, starts[-1], symmetrize)
    crow = torch.zeros(n_rows + 1, dtype=torch.int64, device=values.device)
    torch.cumsum(torch.bincount(row - own, minlength=n_rows), 0, out=crow[1:])
    return ShardedGraph(crow, col, weights, tuple(starts))


def _mirror(everyone: Group, edges: Tensor, weights: Tensor, starts: list[int]) -> tuple[Tensor, Tensor]:
    """Edges (row, col) of all processes, turned round, whose col is a row of this one."""
    bounds = torch.tensor(starts[1:], device=edges.device)
    owner = torch.searchsorted(bounds, edges[1], right=True)
    order = owner.argsort(stable=True)
    sent = torch.bincount(owner, minlength=everyone.size).tolist()
    got = everyone.exchange(edges.flip(0).T[order], sent)
    return got.T, everyone.exchange(weights[order], sent)


def _merge(
    edges: Tensor, weights: Tensor, mirror: Tensor, mirrored: Tensor, n_columns: int, symmetrize: str
) -> tuple[Tensor, Tensor]:
    """The edges of W and of Wᵀ, ascending, with the weights that `symmetrize` makes of both."""
    keys = torch.cat([edges[0] * n_columns + edges[1], mirror[0] * n_columns + mirror[1]])
    unique, place = torch.unique(keys, return_inverse=True)
    w, w_t = (weights.new_zeros(len(unique)) for _ in range(2))
    w[place[: len(weights)]] = weights
    w_t[place[len(weights) :]] = mirrored
    merged = torch.maximum(w, w_t) if symmetrize == "max" else (w + w_t) / (2 if symmetrize == "mean" else 1)
    return torch.stack([unique // n_columns, unique % n_columns]), merged
