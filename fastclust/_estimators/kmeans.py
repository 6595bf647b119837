"""KMeans and ConstrainedKMeans: `fastclust.kmeans` behind scikit-learn's API."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.base import (  # type: ignore[import-untyped]
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    ClusterMixin,
    TransformerMixin,
)
from sklearn.exceptions import ConvergenceWarning  # type: ignore[import-untyped]
from sklearn.utils import check_random_state  # type: ignore[import-untyped]
from sklearn.utils._param_validation import Interval, StrOptions  # type: ignore[import-untyped]
from sklearn.utils.multiclass import check_classification_targets  # type: ignore[import-untyped]
from sklearn.utils.validation import check_is_fitted  # type: ignore[import-untyped]
from torch import Tensor

from .. import _kmeans
from ._data import like, read_labels, read_rows, read_weight, tensor


class KMeans(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator):  # type: ignore[misc]
    """k-means clustering, a drop-in for `sklearn.cluster.KMeans` on `fastclust.kmeans`.

    X is (n_samples, n_features): a NumPy array, a data frame, a list, a SciPy sparse matrix (made dense, n · D values)
    or a torch tensor on any device. Results are of the kind of the X that they belong to, float32 and float64 as X has
    them. A fitted model takes any kind of X. The same random_state, X and device give the same bits, whatever the
    number of threads; the draws are not scikit-learn's.

    Empty clusters are put on the rows of the largest cluster that lie farthest from its centre (`fastclust.kmeans`),
    where scikit-learn takes the farthest rows of all.

    Args:
        n_clusters: how many clusters, at most n_samples.
        init: "k-means++" (greedy), "random", an array (n_clusters, n_features), or a callable
            `init(X, n_clusters, random_state=…)` that returns one.
        n_init: starts, of which the one with the least inertia is kept; "auto": 10 for "random" or a callable, else 1.
        max_iter: iterations per start at most.
        tol: stop where Σ|c_new − c|² ≤ tol · mean feature variance; 0: where no label changes.
        verbose: print how the fit ended.
        random_state: int, `numpy.random.RandomState` or None, scikit-learn's convention.
        copy_x: without effect, X is never written to.
        algorithm: "lloyd" or "elkan", for compatibility: the op chooses by itself which distances it can leave out.

    Attributes:
        cluster_centers_: (n_clusters, n_features).
        labels_: (n_samples,) int32 (torch: int64): the nearest centre of each row; `partial_fit`: of the last batch.
        inertia_: float, Σ w · squared distance to that centre.
        n_iter_: int, iterations of the start that was kept.
        n_features_in_, feature_names_in_: as in scikit-learn.

    Raises:
        ValueError: by `fit`: a parameter, shape or value is wrong; fewer rows than clusters.

    Warns:
        ConvergenceWarning: fewer distinct rows than clusters.
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "n_clusters": [Interval(Integral, 1, None, closed="left")],
        "init": [StrOptions({"k-means++", "random"}), callable, "array-like", Tensor],
        "n_init": [StrOptions({"auto"}), Interval(Integral, 1, None, closed="left")],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "tol": [Interval(Real, 0, None, closed="left")],
        "verbose": ["verbose"],
        "random_state": ["random_state"],
        "copy_x": ["boolean"],
        "algorithm": [StrOptions({"lloyd", "elkan"})],
    }

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        init: Any = "k-means++",
        n_init: int | str = "auto",
        max_iter: int = 300,
        tol: float = 1e-4,
        verbose: int = 0,
        random_state: Any = None,
        copy_x: bool = True,
        algorithm: str = "lloyd",
    ) -> None:
        self.n_clusters = n_clusters
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.verbose = verbose
        self.random_state = random_state
        self.copy_x = copy_x
        self.algorithm = algorithm

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> KMeans:
        """Clusters X, rows weighted by sample_weight (n_samples,), ≥ 0; y is ignored."""
        self._validate_params()
        x = read_rows(self, X, reset=True)
        return self._fit(X, x, self.n_clusters, read_weight(sample_weight, x), self.max_iter)

    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> KMeans:
        """Takes one more batch: each of its rows moves its centre by 1 / (the weight that the centre has seen).

        The first batch chooses the centres, by `init` and one iteration, and must have n_clusters rows at least. After
        a `fit`, batches go on from what it found.

        Source: Sculley 2010, "Web-scale k-means clustering".
        """
        self._validate_params()
        first = not hasattr(self, "cluster_centers_")
        x = read_rows(self, X, reset=first)
        weight = read_weight(sample_weight, x)
        if first:
            return self._fit(X, x, self.n_clusters, weight, max_iter=1)
        centers = tensor(self.cluster_centers_).to(x)
        labels, squared = _kmeans.kmeans_assign(x, centers)
        weights = torch.ones_like(squared, dtype=torch.float64) if weight is None else weight.double()
        pull = torch.zeros_like(centers, dtype=torch.float64)
        pull.index_put_((labels,), weights[:, None] * (x.double() - centers[labels].double()), accumulate=True)
        mass = tensor(self._mass).to(weights) + _mass(labels, weights, len(centers))
        moved = centers + torch.where(mass[:, None] > 0, pull / mass[:, None], 0.0)
        return self._keep(X, moved.to(x.dtype), labels, float((weights * squared).sum()), self.n_iter_ + 1, mass)

    def fit_predict(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """`fit(X, y, sample_weight).labels_`."""
        return self.fit(X, y, sample_weight=sample_weight).labels_

    def fit_transform(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """`fit(X, y, sample_weight).transform(X)`."""
        return self.fit(X, y, sample_weight=sample_weight).transform(X)

    def predict(self, X: Any) -> Any:
        """The nearest centre of each row, (n_samples,) int32 (torch: int64), the lowest of equals."""
        return _label_array(X, self._assign(X)[1].labels)

    def transform(self, X: Any) -> Any:
        """The Euclidean distance of each row to each centre, (n_samples, n_clusters)."""
        check_is_fitted(self)
        x = read_rows(self, X, reset=False)
        centers = tensor(self.cluster_centers_).to(x)
        # Differences, not products: the distance of a centre to itself is 0.
        return like(X, torch.cdist(x, centers, compute_mode="donot_use_mm_for_euclid_dist"))

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """−Σ w · squared distance to the nearest centre."""
        x, (_, squared) = self._assign(X)
        weight = read_weight(sample_weight, x)
        return -float((squared.double() if weight is None else weight.double() * squared).sum())

    def _assign(self, X: Any) -> tuple[Tensor, _kmeans.AssignResult]:
        check_is_fitted(self)
        x = read_rows(self, X, reset=False)
        return x, _kmeans.kmeans_assign(x, tensor(self.cluster_centers_).to(x))

    def _fit(
        self, X: Any, x: Tensor, n_clusters: int, weight: Tensor | None, max_iter: int, labels: Tensor | None = None
    ) -> KMeans:
        if len(x) < n_clusters:
            raise ValueError(f"{type(self).__name__}: n_samples={len(x)} should be >= n_clusters={n_clusters}")
        options: dict[str, Any] = {"max_iter": max_iter, "tol": self.tol, "sample_weight": weight, "labels": labels}
        runs = (_kmeans.kmeans(x, n_clusters, **start, **options) for start in self._starts(X, x, n_clusters))
        best = min(runs, key=lambda run: float(run.inertia))
        if (distinct := int((torch.bincount(best.labels) > 0).sum())) < n_clusters:
            warnings.warn(
                f"Number of distinct clusters ({distinct}) found smaller than n_clusters ({n_clusters}). "
                "Possibly due to duplicate points in X.",
                ConvergenceWarning,
                stacklevel=3,
            )
        if self.verbose:
            print(f"{type(self).__name__}: {int(best.n_iter)} iterations, inertia {float(best.inertia):.6g}")
        mass = _mass(best.labels, weight, n_clusters)
        return self._keep(X, best.centroids, best.labels, float(best.inertia), int(best.n_iter), mass)

    def _starts(self, X: Any, x: Tensor, n_clusters: int) -> Iterator[dict[str, Any]]:
        """Where `kmeans` is to start: its arguments, once for all starts that it draws itself, else for each."""
        named, drawn = isinstance(self.init, str), isinstance(self.init, str) or callable(self.init)
        many = 10 if drawn and not (named and self.init == "k-means++") else 1
        self._n_init = many if self.n_init == "auto" else int(self.n_init)
        if not drawn and self._n_init > 1:
            warnings.warn(
                "Explicit initial center position passed: performing only one init in "
                f"{type(self).__name__} instead of n_init={self._n_init}.",
                RuntimeWarning,
                stacklevel=4,
            )
            self._n_init = 1
        random = check_random_state(self.random_state)
        if named:
            yield {"init": str(self.init), "n_init": self._n_init, "seed": int(random.randint(2**31 - 1))}
            return
        for _ in range(self._n_init):
            init = self.init(like(X, x), n_clusters, random_state=random) if drawn else self.init
            centers = tensor(init).to(x)
            for name, size, wanted in zip(
                ("number of clusters", "number of features of the data"),
                centers.shape,
                (n_clusters, x.shape[1]),
                strict=True,
            ):
                if size != wanted:
                    raise ValueError(
                        f"The shape of the initial centers {tuple(centers.shape)} does not match the {name} {wanted}."
                    )
            yield {"init": centers}

    def _keep(self, X: Any, centers: Tensor, labels: Tensor, inertia: float, n_iter: int, mass: Tensor) -> KMeans:
        self.cluster_centers_ = like(X, centers)
        self.labels_ = _label_array(X, labels)
        self.inertia_ = inertia
        self.n_iter_ = n_iter
        self._mass = like(X, mass)
        return self

    @property
    def _n_features_out(self) -> int:
        return len(self.cluster_centers_)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


class ConstrainedKMeans(KMeans):
    """k-means in which the rows with a known class stay in the cluster of that class, which starts at their mean.

    `fit` takes y (n_samples,): integers, −1 for an unlabelled row. Cluster i, for i < len(classes_), belongs to the
    class classes_[i]; further clusters are free.

    Args:
        n_clusters: at least the number of classes in y; None: just those (8 where y is None or labels nothing).
        Others: as for `KMeans`. An `init` of centres is taken as it is.

    Attributes:
        classes_: (n_classes,) the classes in y, ascending.
        Others: as for `KMeans`; labels_ and `predict` give cluster indices.

    Source: Basu, Banerjee & Mooney 2002, "Semi-supervised clustering by seeding" (Constrained-KMeans).
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **KMeans._parameter_constraints,
        "n_clusters": [*KMeans._parameter_constraints["n_clusters"], None],
    }

    def __init__(
        self,
        n_clusters: int | None = None,
        *,
        init: Any = "k-means++",
        n_init: int | str = "auto",
        max_iter: int = 300,
        tol: float = 1e-4,
        verbose: int = 0,
        random_state: Any = None,
        copy_x: bool = True,
        algorithm: str = "lloyd",
    ) -> None:
        super().__init__(
            n_clusters,  # type: ignore[arg-type]
            init=init,
            n_init=n_init,
            max_iter=max_iter,
            tol=tol,
            verbose=verbose,
            random_state=random_state,
            copy_x=copy_x,
            algorithm=algorithm,
        )

    partial_fit = property(doc="Not offered: a batch would need the labels of the rows before it.")

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> ConstrainedKMeans:
        """Clusters X (n_samples, n_features) with the labels y (n_samples,), −1 where there is none."""
        self._validate_params()
        x = read_rows(self, X, reset=True)
        known = np.full(len(x), -1) if y is None else read_labels(self, y, x)
        check_classification_targets(known)
        self.classes_ = np.unique(known[known != -1])
        n_clusters = self.n_clusters or len(self.classes_) or 8
        if len(self.classes_) > n_clusters:
            raise ValueError(
                f"ConstrainedKMeans: y has {len(self.classes_)} classes, more than n_clusters={n_clusters}"
            )
        fixed = np.where(known == -1, -1, np.searchsorted(self.classes_, known))
        labels = torch.from_numpy(fixed).to(x.device)
        self._fit(X, x, n_clusters, read_weight(sample_weight, x), self.max_iter, labels)
        return self


def _mass(labels: Tensor, weight: Tensor | None, n_clusters: int) -> Tensor:
    """(K,) float64: the weight of each cluster's rows."""
    weights = torch.ones_like(labels, dtype=torch.float64) if weight is None else weight.double()
    return torch.zeros(n_clusters, dtype=torch.float64, device=labels.device).index_put_(
        (labels,), weights, accumulate=True
    )


def _label_array(X: Any, labels: Tensor) -> Any:
    """int32 in NumPy, as scikit-learn has it; a tensor stays int64, which torch wants for an index."""
    return labels if isinstance(X, Tensor) else labels.cpu().numpy().astype(np.int32)
