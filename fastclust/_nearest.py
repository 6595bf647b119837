"""The nearest rows of a long list that is seen chunk by chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from ._blocks import require_finite
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
        none = queries.new_empty(len(queries), 0 if len(queries) else k)
        self.result = KNNResult(none, none.long())

    def see(self, begin: int, chunk: Tensor) -> None:
        """One more chunk (n, D), whose first row has the number `begin`."""
        if len(self._queries) == 0 or len(chunk) == 0:
            return
        first = self._first
        among = first is not None and first < begin + len(chunk) and begin < first + len(self._queries)
        require_finite("knn", chunk, begin)
        wanted = min(self._k + among, len(chunk))
        values, indices = ops.knn(chunk, self._queries, wanted, self._metric, self._exact)
        indices += begin
        if among and first is not None:
            own = torch.arange(len(indices), device=indices.device) + first
            # Worse than all others, of which there are k at least: it falls out in the end.
            values.masked_fill_(indices == own[:, None], torch.inf if self._metric == "euclidean" else -torch.inf)
        values = torch.cat([self.result.values, values], dim=1)
        indices = torch.cat([self.result.indices, indices], dim=1)
        values, order = values.sort(dim=1, descending=self._metric != "euclidean", stable=True)
        order = order[:, : self._k]
        self.result = KNNResult(values[:, : self._k].contiguous(), indices.gather(1, order))
