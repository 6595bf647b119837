"""KNeighborsGraph: `fastclust.knn` as a transformer."""

from __future__ import annotations

from numbers import Integral
from typing import Any, ClassVar

import torch
from scipy import sparse  # type: ignore[import-untyped]
from sklearn.base import (  # type: ignore[import-untyped]
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
)
from sklearn.utils._param_validation import Interval, StrOptions  # type: ignore[import-untyped]
from sklearn.utils.validation import check_is_fitted  # type: ignore[import-untyped]
from torch import Tensor

from .. import _graph
from ._data import like, read_rows, tensor


class KNeighborsGraph(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Each row's nearest neighbours among the rows fitted, sparse; as `sklearn.neighbors.KNeighborsTransformer`.

    Exact, by `fastclust.knn`. It stands before estimators that take metric="precomputed":
    `make_pipeline(KNeighborsGraph(10), DBSCAN(eps=0.5, metric="precomputed"))`. For the weighted, symmetrised graph of
    label diffusion see `fastclust.knn_graph`.

    Args:
        mode: "distance": values are distances; each row holds n_neighbors + 1 entries, the nearest of a fitted row
            being itself, at an explicit 0. "connectivity": values are 1, n_neighbors entries, itself among them.
        n_neighbors: at most the rows fitted (one less with "distance").
        metric: "euclidean", or "cosine" (1 − similarity).

    Attributes:
        n_samples_fit_: rows fitted.
        n_features_in_, feature_names_in_: as in scikit-learn.

    `transform` takes (n, D) and returns (n, n_samples_fit_): SciPy CSR for NumPy, lists, frames and sparse matrices
    (made dense), a torch CSR tensor for a tensor, columns by ascending distance in both.
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "mode": [StrOptions({"distance", "connectivity"})],
        "n_neighbors": [Interval(Integral, 1, None, closed="left")],
        "metric": [StrOptions({"euclidean", "cosine"})],
    }

    def __init__(self, *, mode: str = "distance", n_neighbors: int = 5, metric: str = "euclidean") -> None:
        self.mode = mode
        self.n_neighbors = n_neighbors
        self.metric = metric

    def fit(self, X: Any, y: Any = None) -> KNeighborsGraph:
        """Keeps the rows of X (n_samples, n_features); y is ignored."""
        self._validate_params()
        self._rows = like(X, read_rows(self, X, reset=True))
        self.n_samples_fit_ = len(self._rows)
        return self

    def transform(self, X: Any) -> Any:
        """The graph from the rows of X to those fitted.

        Raises:
            ValueError: n_neighbors is too large for the rows fitted; a row is not finite.
        """
        check_is_fitted(self, "n_samples_fit_")
        queries = read_rows(self, X, reset=False)
        k = int(self.n_neighbors) + (self.mode == "distance")
        if k > self.n_samples_fit_:
            raise ValueError(
                f"KNeighborsGraph: n_neighbors={self.n_neighbors} is too large for n_samples_fit_="
                f"{self.n_samples_fit_} in mode {self.mode!r}"
            )
        values, indices = _graph.knn(tensor(self._rows).to(queries), k, queries=queries, metric=self.metric)
        if self.mode == "connectivity":
            values = torch.ones_like(values)
        elif self.metric == "cosine":
            values = (1 - values).clamp(min=0)
        shape = (len(queries), self.n_samples_fit_)
        crow = torch.arange(0, indices.numel() + 1, k, device=indices.device)
        if isinstance(X, Tensor):
            # A CSR tensor has ascending columns; SciPy's may lie by distance, which spares its readers a sort.
            indices, order = indices.sort(dim=1)
            values = values.gather(1, order)
            return _graph.csr_tensor(crow, indices.flatten(), values.flatten(), shape)
        return sparse.csr_matrix((values.flatten().numpy(), indices.flatten().numpy(), crow.numpy()), shape=shape)

    @property
    def _n_features_out(self) -> int:
        return self.n_samples_fit_

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags
