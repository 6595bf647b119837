"""The nearest rows of a long list that is seen chunk by chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from ._graph import KNNResult


class Nearest:
    """Keeps the k best of all chunks seen, which must come in the order of the list.

    A score is a matter of two rows alone, so that the result is that of one search in the whole list.

    Args:
        queries: (M, D) rows whose neighbours are wanted.
        k: how many.
        metric, exact: see `fastclust.knn`.
        first: where the queries are themselves rows of the list: the number of the first; none is its own neighbour.
    """

    def __init__(self, queries: Tensor, k: int, metric: str, exact: bool, first: int | None = None):
        self._queries, self._k, self._metric, self._exact = queries, k, metric, exact
        self._first = first
        none = queries.new_empty(len(queries), 0)
        self.result = KNNResult(none, none.long())

    def see(self, begin: int, chunk: Tensor) -> None:
        """One more chunk (n, D), whose first row has the number `begin`."""
        if len(self._queries) == 0 or len(chunk) == 0:
            return
        among = self._first is not None and self._first < begin + len(chunk)
        among = among and begin < self._first + len(self._queries)  # type: ignore[operator]
        wanted = min(self._k + among, len(chunk))
        values, indices = ops.knn(chunk, self._queries, wanted, self._metric, self._exact)
        indices += begin
        if among:
            values, indices = self._without_self(values, indices)
        values = torch.cat([self.result.values, values], dim=1)
        indices = torch.cat([self.result.indices, indices], dim=1)
        values, order = values.sort(dim=1, descending=self._metric != "euclidean", stable=True)
        order = order[:, : self._k]
        self.result = KNNResult(values[:, : self._k].contiguous(), indices.gather(1, order))

    def _without_self(self, values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """One column less: the query itself, else the worst."""
        assert self._first is not None
        own = torch.arange(self._first, self._first + len(indices), device=indices.device)
        is_self = indices == own[:, None]
        last = is_self.new_zeros(indices.shape)
        last[:, -1] = ~is_self.any(dim=1)
        kept = ~(is_self | last)
        shape = (len(indices), indices.shape[1] - 1)
        return values[kept].view(shape), indices[kept].view(shape)
