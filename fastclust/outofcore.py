"""k-means and neighbours of more rows than fit into memory, from a `numpy.memmap` or a function that yields chunks.

A run shows a progress bar on a terminal, and goes on from its checkpoint when it is called again after a kill. Rows are
read ahead, one block, while the last is worked on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from . import _graph, ops
from ._blocks import Chunks, Rows, require_finite, rows_of
from ._checkpoint import Checkpoint, fingerprint
from ._graph import KNNResult
from ._group import Group
from ._kmeans import KMeansResult
from ._lloyd import Lloyd, Options, checked_start, checked_weight
from ._nearest import Nearest

SECONDS_BETWEEN_SAVES = 60.0


def kmeans(
    x: Any | Chunks,
    n_clusters: int,
    *,
    init: str | Tensor = "k-means++",
    max_iter: int = 100,
    tol: float = 0.0,
    spherical: bool = False,
    sample_weight: Any = None,
    precision: str = "exact",
    seed: int = 0,
    init_size: int | None = None,
    block_rows: int = 16384,
    checkpoint: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> KMeansResult:
    """Lloyd's k-means of rows that are read block by block, once per iteration; the iteration is `fastclust.kmeans`'.

    The result is that of `fastclust.distributed.kmeans` with the same block_rows, to the bit, and with the same start
    that of `fastclust.kmeans` up to rounding (a centroid's last bit, and rows as near to one centroid as to another).
    In memory are 8 + sizeof(dtype) bytes per row, three blocks, 24 · K · (D + 1) bytes, and the sample for the start.

    Args:
        x: (N, D) `numpy.memmap`, array or tensor, floating point; or a function without arguments that returns an
            iterable of such chunks (n_i, D), the same rows in the same order each time it is called.
        n_clusters: K, at most N.
        init: "k-means++" or "random" among a sample of init_size rows, or centroids (K, D).
        max_iter, tol, spherical, precision: see `fastclust.kmeans`.
        sample_weight: (N,) ≥ 0, array or tensor, in memory.
        seed: of the start.
        init_size: rows that the start is drawn from, by default 65,536 or 32 K, all where there are no more.
        block_rows: rows that are read and assigned at a time, at most 65,536.
        checkpoint: a file that is written after each pass and gone on from where it is there already. A finished run
            answers from it.
        device: where blocks are worked on.
        progress: show a bar, where stderr is a terminal.

    Returns:
        KMeansResult: centroids (K, D), labels (N,) int64, inertia, n_iter, on `device`.

    Raises:
        TypeError, ValueError: as `fastclust.kmeans`; x yields other rows than before; the checkpoint is of another run.
    """
    rows = rows_of("kmeans", x, block_rows, torch.device(device))
    weight = checked_weight(sample_weight, rows)
    sample = max(1 << 16, 32 * n_clusters) if init_size is None else init_size
    options = Options(n_clusters, init, max_iter, tol, spherical, precision, seed, sample, block_rows)
    checked_start(init, rows, n_clusters)
    if n_clusters > rows.n_rows:
        raise ValueError(f"kmeans: n_clusters must be at most the number of rows {rows.n_rows}, got {n_clusters}")
    kept = Checkpoint(
        "kmeans",
        checkpoint,
        {
            **_identity(rows),
            **vars(options),
            "init": init if isinstance(init, str) else fingerprint(init),
            "sample_weight": fingerprint(weight),
        },
    )
    with _bar("kmeans", rows.n_rows, progress) as bar:
        run = Lloyd(rows, weight, options, Group.alone("kmeans"), 0, rows.n_rows, bar.update)
        run.state = kept.load(rows.device) or run.state
        for _ in run.passes():
            kept.save(run.state)
            bar.reset()
            bar.set_description(f"kmeans, iteration {run.state['n_iter'] + 1}")
    return run.result()


def knn(
    x: Any | Chunks,
    k: int,
    *,
    queries: Tensor | None = None,
    metric: str = "cosine",
    precision: str = "exact",
    chunk_rows: int = 1 << 17,
    query_rows: int = 1 << 16,
    folder: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> KNNResult:
    """The exact k nearest rows of `x` to each query, or to each row of `x` among the others: those of `fastclust.knn`.

    Queries are taken query_rows at a time, and each time all of x is read. In memory are two chunks, what
    `fastclust.knn` needs for one, the queries at hand with 24 k + 1100 bytes each, and, without a folder, the result.

    Args:
        x: (N, D) `numpy.memmap`, array or tensor, or a function that yields chunks; see `kmeans`.
        k: how many; below N without `queries`, at most N with them.
        queries: (M, D) tensor, the dtype of `x`; None: the rows of `x`, each without itself.
        metric, precision: see `fastclust.knn`.
        chunk_rows: rows of x that are read at a time.
        query_rows: queries that are looked up together.
        folder: where the result is written, as values.npy and indices.npy, with a state.pt that a run goes on from,
            saved every minute; made where it is not there.
        device: where chunks are searched.
        progress: show a bar, where stderr is a terminal.

    Returns:
        values and indices, (M, k) each on the CPU, best first, equal values in ascending order of index; with a folder
        they lie in its files.

    Raises:
        TypeError, ValueError: as `fastclust.knn`; x yields other rows than before; the folder is of another run.
    """
    _graph.check("knn", k, metric, precision)
    if k < 1 or chunk_rows < 1 or query_rows < 1:
        raise ValueError(f"knn: k, chunk_rows and query_rows must be at least 1, got {k}, {chunk_rows}, {query_rows}")
    rows = rows_of("knn", x, chunk_rows, torch.device(device))
    if queries is not None:
        queries = ops.float_tensor("knn", "queries", queries).to(device)
        if queries.shape[1:] != (rows.n_features,) or queries.dtype != rows.dtype:
            raise ValueError(f"knn: queries must be (M, {rows.n_features}) of {rows.dtype}, got {tuple(queries.shape)}")
    if k > rows.n_rows - (queries is None):
        raise ValueError(
            f"knn: k must be {'below' if queries is None else 'at most'} the {rows.n_rows} rows of x, got {k}"
        )
    n_queries = rows.n_rows if queries is None else len(queries)
    values, indices = _result_arrays(folder, n_queries, k, rows.dtype)
    settings = {"k": k, "metric": metric, "precision": precision, "chunk_rows": chunk_rows, "query_rows": query_rows}
    path = None if folder is None else Path(folder) / "state.pt"
    kept = Checkpoint("knn", path, {**_identity(rows), **settings, "queries": fingerprint(queries)})
    state = kept.load(rows.device) or {"done": 0, "begin": 0}

    panels = -(-n_queries // query_rows)
    with _bar("knn", panels * rows.n_rows, progress) as bar:
        bar.update(state["done"] // query_rows * rows.n_rows + state["begin"])
        for first in range(state["done"], n_queries, query_rows):
            here = slice(first, min(first + query_rows, n_queries))
            panel = rows.take(torch.arange(here.start, here.stop)) if queries is None else queries[here]
            if queries is None:
                require_finite("knn", panel, first)
            nearest = Nearest(panel, k, metric, precision == "exact", first if queries is None else None)
            if "values" in state:
                nearest.result = KNNResult(state.pop("values"), state.pop("indices"))
            saved = time.monotonic()
            for begin, chunk in rows.blocks(state["begin"]):
                nearest.see(begin, chunk)
                bar.update(len(chunk))
                if time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                    kept.save({"done": first, "begin": begin + len(chunk), **nearest.result._asdict()})
                    saved = time.monotonic()
            values[here], indices[here] = (part.cpu().numpy() for part in nearest.result)
            for array in (values, indices):
                if isinstance(array, np.memmap):
                    array.flush()
            state = {"done": here.stop, "begin": 0}
            kept.save(state)
    return KNNResult(torch.from_numpy(values), torch.from_numpy(indices))


def _identity(rows: Rows) -> dict[str, Any]:
    """What tells one list of rows from another."""
    first = next(iter(rows.blocks()), None)
    return {
        "rows": rows.n_rows,
        "features": rows.n_features,
        "dtype": str(rows.dtype),
        "first block": fingerprint(None if first is None else first.x),
    }


def _result_arrays(
    folder: str | os.PathLike[str] | None, n_queries: int, k: int, dtype: torch.dtype
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Where values and indices go: memory, or files, which are made where they are not there."""
    types = {"values": np.float64 if dtype == torch.float64 else np.float32, "indices": np.int64}
    if folder is None:
        return np.empty((n_queries, k), types["values"]), np.empty((n_queries, k), types["indices"])
    Path(folder).mkdir(parents=True, exist_ok=True)

    def opened(name: str) -> np.ndarray[Any, Any]:
        path = Path(folder) / f"{name}.npy"
        if path.exists() and (array := np.load(path, mmap_mode="r+")).shape == (n_queries, k):
            return array  # type: ignore[no-any-return]
        return np.lib.format.open_memmap(path, mode="w+", dtype=types[name], shape=(n_queries, k))

    return opened("values"), opened("indices")


@contextmanager
def _bar(op: str, total: int, shown: bool) -> Iterator[Any]:
    """A progress bar over rows, on a terminal only."""
    with tqdm(
        total=total, desc=op, unit=" rows", unit_scale=True, dynamic_ncols=True, disable=None if shown else True
    ) as bar:
        yield bar
