"""k-means over shards."""

from __future__ import annotations

from dataclasses import replace

import torch.distributed as dist
from torch import Tensor

from .. import ops
from .._blocks import ArrayRows
from .._checkpoint import fingerprint
from .._group import Group, checksum
from .._kmeans import KMeansResult
from .._lloyd import Lloyd, Options, checked_start, checked_weight
from .sharding import BLOCK_ROWS


def kmeans(
    x: Tensor,
    n_clusters: int,
    *,
    init: str | Tensor = "k-means++",
    max_iter: int = 100,
    tol: float = 0.0,
    spherical: bool = False,
    sample_weight: Tensor | None = None,
    precision: str = "exact",
    seed: int = 0,
    init_size: int | None = None,
    block_rows: int = BLOCK_ROWS,
    group: dist.ProcessGroup | None = None,
    timeout: float = 300.0,
) -> KMeansResult:
    """Lloyd's k-means of all processes' rows; the iteration is that of `fastclust.kmeans`.

    Cluster sums are added up in fixed point, exactly, so that centroids, labels, inertia and n_iter are the same to
    the bit on 1, 2 or 64 processes, given the same block_rows and shards that begin at its multiples (`shard`). From
    `fastclust.kmeans` with the same start they differ by rounding: a centroid's last bit, and rows as near to one
    centroid as to another.

    Per iteration a process receives about 2 (P − 1) / P · 8 · L · K · (D + 1) bytes (L = 1 in float32, 2 in float64)
    and holds, beside its rows, 4 + sizeof(dtype) bytes per row, 16 · L · K · (D + 1) bytes of sums, and a block.

    Args:
        x: (n, D) float, this process's rows, none or more, on the device of the group's backend.
        n_clusters: K, at most the number of all rows.
        init: "k-means++" or "random" among a sample of init_size rows, or centroids (K, D), the same everywhere.
        max_iter, tol, spherical, precision: see `fastclust.kmeans`.
        sample_weight: (n,) ≥ 0, of this process's rows.
        seed: of the start; the same everywhere.
        init_size: rows that the start is drawn from, by default 65,536 or 32 K; all rows where there are no more, and
            then the start is that of `fastclust.kmeans` on the CPU.
        block_rows: rows of an assignment, at most 65,536.
        group: the process group, by default the default one.
        timeout: seconds that a collective may take, the slowest process's pass over its rows included.

    Returns:
        KMeansResult: centroids (K, D), the same everywhere, labels (n,) int64 of this process's rows, inertia and
        n_iter of all rows.

    Raises:
        TypeError, ValueError: as `fastclust.kmeans`, on every process; and where the processes' arguments differ.
        PeerError: a process has ended, or has not answered in time.
    """
    everyone = Group("kmeans", group, timeout)
    with everyone.arguments():
        x = ops.stored_tensor("kmeans", "x", x)  # read in blocks, each widened by itself
        rows = ArrayRows("kmeans", x, block_rows)
        weight = checked_weight(sample_weight, rows)
        sample = max(1 << 16, 32 * n_clusters) if init_size is None else init_size
        options = Options(n_clusters, init, max_iter, tol, spherical, precision, seed, sample, block_rows)
        checked_start(init, rows, n_clusters)
    starts = everyone.starts(len(x))
    everyone.agree(
        features=rows.n_features,
        bits=rows.dtype.itemsize * 8,
        n_clusters=n_clusters,
        init=0 if isinstance(init, str) else fingerprint(init),
        options=checksum(options if isinstance(init, str) else replace(options, init="random")),
        weighted=weight is not None,
    )
    if n_clusters > starts[-1]:
        raise ValueError(f"kmeans: n_clusters must be at most the number of rows {starts[-1]}, got {n_clusters}")
    run = Lloyd(rows, weight, options, everyone, starts[everyone.rank], starts[-1])
    for _ in run.passes():
        pass
    return run.result()
