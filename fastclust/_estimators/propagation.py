"""LabelPropagation: the kNN graph and label diffusion as a semi-supervised classifier."""

from __future__ import annotations

import warnings
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin  # type: ignore[import-untyped]
from sklearn.exceptions import ConvergenceWarning  # type: ignore[import-untyped]
from sklearn.utils._param_validation import Interval, StrOptions  # type: ignore[import-untyped]
from sklearn.utils.multiclass import check_classification_targets  # type: ignore[import-untyped]
from sklearn.utils.validation import check_is_fitted  # type: ignore[import-untyped]
from torch import Tensor

from .. import _diffusion, _graph
from ._data import like, read_labels, read_rows, tensor


class LabelPropagation(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Semi-supervised classification: labels diffuse over a kNN graph, −1 marks the unlabelled.

    The API of `sklearn.semi_supervised`; what is solved is (I − αS) F = Y with S the normalised affinities
    (`fastclust.propagate_labels`), the fixed point of its LabelSpreading, with known labels kept as they are.

    X is (n_samples, n_features): NumPy, data frame, list, SciPy sparse matrix (made dense) or torch tensor on any
    device; results are of its kind. y is (n_samples,): classes, −1 for an unlabelled row.

    Args:
        kernel: "knn", the only one: a dense kernel would need n² values.
        n_neighbors: of each row in the graph; all others where there are fewer.
        metric: "euclidean" (self-tuning kernel), "cosine" or "inner_product", see `fastclust.knn_graph`.
        power: exponent of the affinities.
        alpha: how far labels spread, in (0, 1).
        max_iter: steps of conjugate gradients at most.
        tol: relative residual at which a class counts as solved.

    Attributes:
        X_: the rows fitted.
        classes_: (n_classes,) NumPy array.
        label_distributions_: (n_samples, n_classes): rows sum to 1; one-hot where y is known, 0 where no label reaches.
        transduction_: (n_samples,) the class of each row fitted.
        certainty_: (n_samples,) in [0, 1]: 1 where y is known, 0 where no label reaches (entropy weights).
        n_iter_: steps of the class that took the most.
        n_features_in_, feature_names_in_: as in scikit-learn.

    Warns:
        ConvergenceWarning: by `fit`: the residual is above tol after max_iter steps.

    Source: Zhou et al. 2004, "Learning with local and global consistency"; Iscen et al. 2019 (graph and certainty).
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "kernel": [StrOptions({"knn"})],
        "n_neighbors": [Interval(Integral, 1, None, closed="left")],
        "metric": [StrOptions(set(_graph.METRICS))],
        "power": [Interval(Real, 0, None, closed="neither")],
        "alpha": [Interval(Real, 0, 1, closed="neither")],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "tol": [Interval(Real, 0, None, closed="left")],
    }

    def __init__(
        self,
        kernel: str = "knn",
        *,
        n_neighbors: int = 7,
        metric: str = "euclidean",
        power: float = 3.0,
        alpha: float = 0.99,
        max_iter: int = 1000,
        tol: float = 1e-3,
    ) -> None:
        self.kernel = kernel
        self.n_neighbors = n_neighbors
        self.metric = metric
        self.power = power
        self.alpha = alpha
        self.max_iter = max_iter
        self.tol = tol

    def fit(self, X: Any, y: Any) -> LabelPropagation:
        """Labels the rows of X (n_samples, n_features) from y (n_samples,).

        Raises:
            ValueError: a parameter, shape or value is wrong, y holds no label, or X only one row.
        """
        self._validate_params()
        if y is None:
            raise ValueError("LabelPropagation: requires y to be passed, but the target y is None")
        x = read_rows(self, X, reset=True)
        known = read_labels(self, y, x)
        check_classification_targets(known)
        if len(x) < 2:
            raise ValueError("LabelPropagation: a graph needs two rows, got n_samples=1")
        labelled = known != -1
        self.classes_ = np.unique(known[labelled])
        if len(self.classes_) == 0:
            raise ValueError("LabelPropagation: y holds no label, all are -1")
        codes = np.full(len(x), -1)
        codes[labelled] = np.searchsorted(self.classes_, known[labelled])

        graph = _graph.knn_graph(x, min(int(self.n_neighbors), len(x) - 1), metric=self.metric, power=self.power)
        labels = torch.from_numpy(codes).to(x.device)
        solver: dict[str, Any] = {"alpha": self.alpha, "tol": self.tol, "max_iter": self.max_iter}
        pseudo = _diffusion.propagate_labels(graph, labels, n_classes=len(self.classes_), **solver)
        if (
            residual := float(pseudo.residual.max())
        ) > 2 * self.tol:  # the recurrence's may lie a little below the true
            warnings.warn(
                f"LabelPropagation: max_iter={self.max_iter} was reached without convergence, residual {residual:.1e}",
                ConvergenceWarning,
                stacklevel=2,
            )
        scores = pseudo.scores
        scores[labels >= 0] = torch.nn.functional.one_hot(labels[labels >= 0], scores.shape[1]).to(scores)
        self.X_ = like(X, x)
        self.label_distributions_ = like(X, scores)
        self.certainty_ = like(X, pseudo.weights)
        self.n_iter_ = int(pseudo.n_iter.max())
        self.transduction_ = self._class_of(X, pseudo.labels)
        return self

    def predict(self, X: Any) -> Any:
        """The class of each row of X, (n_samples,), by `predict_proba`."""
        check_is_fitted(self)
        return self._class_of(X, tensor(self.predict_proba(X)).argmax(1))

    def predict_proba(self, X: Any) -> Any:
        """(n_samples, n_classes): the mean of the label distributions of the nearest rows fitted, by their affinity.

        Where no neighbour has one, every class is as likely as another.
        """
        check_is_fitted(self)
        queries = read_rows(self, X, reset=False)
        rows, distributions = (tensor(a).to(queries) for a in (self.X_, self.label_distributions_))
        k = min(int(self.n_neighbors), len(rows))
        values, indices = _graph.knn(rows, k, queries=queries, metric=self.metric)
        if self.metric == "euclidean":
            width = values[:, -1:].square()
            values = torch.where(values > 0, torch.exp(-values.square() / width), 1.0)
        affinity = values.clamp(min=0) ** self.power
        total = torch.einsum("nk,nkc->nc", affinity, distributions[indices])
        reached = total.sum(1, keepdim=True)
        return like(X, torch.where(reached > 0, total / reached, 1 / total.shape[1]))

    def _class_of(self, X: Any, codes: Tensor) -> Any:
        """The classes of these codes, of the kind of X where torch has their dtype."""
        classes = self.classes_[codes.cpu().numpy()]
        return (
            torch.from_numpy(classes).to(X.device) if isinstance(X, Tensor) and classes.dtype.kind in "iub" else classes
        )

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags
