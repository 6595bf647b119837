"""Label diffusion on a graph whose rows are shared out."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _graph, ops
from .._diffusion import DiffusionResult
from .._group import Group, checksum, sizes_between
from .neighbours import ShardedGraph
from .sharding import BLOCK_ROWS


def diffuse(
    graph: ShardedGraph,
    y: Tensor,
    *,
    alpha: float = 0.99,
    tol: float = 1e-6,
    max_iter: int = 20,
    block_rows: int = BLOCK_ROWS,
    group: dist.ProcessGroup | None = None,
    timeout: float = 300.0,
) -> DiffusionResult:
    """Solves (I − αS) F = Y over all processes' rows: `fastclust.diffuse`, whose docstring has the equations.

    Per step a process receives H · C · sizeof(dtype) bytes, H being the rows of others that its edges lead to, and
    16 · C · (blocks of others) bytes of partial dot products; it holds five (n, C) arrays, one (n + H, C), and a copy
    of its edges. Dot products are added up in float64, block by block in the order of rows, so that shards that begin
    at multiples of block_rows give the same bits on the CPU whatever their number; on GPUs, and against
    `fastclust.diffuse`, the same up to rounding.

    Args:
        graph: this process's rows, from `knn_graph`: symmetric, weights finite and not negative.
        y: (n, C) float, this process's rows.
        alpha, tol, max_iter: see `fastclust.diffuse`.
        block_rows: rows whose products are added up at a time.
        group, timeout: see `kmeans`.

    Returns:
        f (n, C) of this process's rows; residual (C,) and n_iter (C,) int64, the same everywhere.

    Raises:
        TypeError, ValueError: as `fastclust.diffuse`, on every process. PeerError: a process has ended or is silent.
    """
    everyone = Group("diffuse", group, timeout)
    with everyone.arguments():
        y = ops.float_tensor("diffuse", "y", y)
        n_rows = len(graph.crow) - 1
        if y.dim() != 2 or len(y) != n_rows:
            raise ValueError(f"diffuse: y must be ({n_rows}, C), one row for each of the graph, got {tuple(y.shape)}")
        if not 0 <= alpha < 1 or tol < 0 or max_iter < 0:
            raise ValueError(f"diffuse: alpha must lie in [0, 1), tol and max_iter not be negative, got {alpha}, {tol}")
        if not torch.isfinite(y).all():
            raise ValueError("diffuse: y holds values that are not finite")
    everyone.agree(columns=y.shape[1], bits=y.dtype.itemsize * 8, options=checksum(alpha, tol, max_iter, block_rows))
    return _solve(_System(graph, alpha, y, everyone), _Dots(everyone, block_rows), y, tol, max_iter)


def _solve(system: _System, dot: _Dots, y: Tensor, tol: float, max_iter: int) -> DiffusionResult:
    """Conjugate gradients, each column with its own steps and stop."""
    f, r, p = torch.zeros_like(y), y.clone(), y.clone()
    rr = norm2 = dot(r, r)
    n_iter = torch.zeros(y.shape[1], dtype=torch.int64, device=y.device)
    for _ in range(max_iter):
        going = rr > tol**2 * norm2
        if not going.any():
            break
        q = system(p)
        step = torch.where(going, rr / dot(p, q), 0.0)
        f += step.to(y.dtype) * p
        r -= step.to(y.dtype) * q
        rr_next = dot(r, r)
        p = r + torch.where(rr > 0, rr_next / rr, 0.0).to(y.dtype) * p
        rr, n_iter = rr_next, n_iter + going
    left = y - system(f)
    residual = torch.where(norm2 > 0, (dot(left, left) / norm2).sqrt(), 0.0)
    return DiffusionResult(f, residual.to(y.dtype), n_iter)


class _System:
    """p -> (I − αS) p, the rows of others that an edge leads to being fetched for each product."""

    def __init__(self, graph: ShardedGraph, alpha: float, y: Tensor, everyone: Group):
        starts = torch.tensor(graph.starts, device=y.device)
        own, after = graph.starts[everyone.rank : everyone.rank + 2]
        self._everyone = everyone
        # Columns in use, in their own order: a row adds up its terms in the same order on any number of processes.
        columns, col = torch.unique(graph.col, return_inverse=True)
        below, mine = (int((columns < edge).sum()) for edge in (own, after))
        self._before, self._mine = below, columns[below:mine] - own
        others = torch.cat([columns[:below], columns[mine:]])
        owner = torch.searchsorted(starts[1:], others, right=True)
        self._taken = torch.bincount(owner, minlength=everyone.size).tolist()
        sent = everyone.exchange(torch.tensor(self._taken, device=y.device), [1] * everyone.size, [1] * everyone.size)
        self._sent = sent.tolist()
        self._asked = everyone.exchange(others, self._taken, self._sent) - own
        weights = graph.weights.to(y.dtype)
        row = torch.arange(len(y), device=y.device).repeat_interleave(graph.crow.diff())
        degree = torch.zeros(len(y), dtype=torch.float64, device=y.device)
        degree.index_put_((row,), weights.double(), accumulate=True)
        scale = torch.where(degree > 0, degree, 1.0).rsqrt()
        scaled = alpha * scale[row] * weights * self._gathered(scale[:, None])[col, 0]
        shape = (len(y), len(columns))
        self._matrix = _graph.csr_tensor(graph.crow, col, scaled.to(y.dtype), shape)

    def __call__(self, p: Tensor) -> Tensor:
        return p - self._matrix @ self._gathered(p)

    def _gathered(self, p: Tensor) -> Tensor:
        """The rows of p, everyone's, that this process's edges lead to."""
        others = self._everyone.exchange(p[self._asked], self._sent, self._taken)
        return torch.cat([others[: self._before], p[self._mine], others[self._before :]])


class _Dots:
    """Columns' dot products over all processes' rows, in float64, partial sums of blocks added up in order."""

    def __init__(self, everyone: Group, block_rows: int):
        self._everyone, self._block_rows = everyone, block_rows
        self._sizes: list[int] | None = None

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        products = a.double() * b.double()
        blocks = [products[i : i + self._block_rows].sum(dim=0) for i in range(0, len(a), self._block_rows)]
        sums = torch.stack(blocks) if blocks else products
        if self._sizes is None:
            self._sizes = sizes_between(self._everyone.starts(len(sums)))
        return self._everyone.gather(sums, self._sizes).sum(dim=0)
