"""How good a clustering or a classifier is. Arguments are torch tensors (any device), NumPy arrays or sequences."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

# SciPy and scikit-learn are imported where they are used: they would double the time that `import fastclust` takes.


def _array(value: object) -> npt.NDArray[Any]:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def _label_pair(op: str, labels: object, predicted: object) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Both as (N,) integer arrays of the same length, not empty."""
    pair = _array(labels), _array(predicted)
    for name, array in zip(("labels", "predicted"), pair, strict=True):
        if array.dtype.kind not in "iub":
            raise TypeError(f"{op}: {name} must hold integers, got {array.dtype}")
        if array.ndim != 1:
            raise ValueError(f"{op}: {name} must be (N,), got {array.shape}")
    if len(pair[0]) != len(pair[1]):
        raise ValueError(f"{op}: predicted must have {len(pair[0])} labels, got {len(pair[1])}")
    if len(pair[0]) == 0:
        raise ValueError(f"{op}: labels is empty")
    return pair


def cluster_accuracy(labels: object, predicted: object) -> float:
    """The share of points whose cluster is their class, clusters matched to classes one to one as well as can be.

    The matching is by the Hungarian method; where there are more clusters than classes, the rest match none.

    Args:
        labels: (N,) true classes, any integers.
        predicted: (N,) clusters, any integers.

    Raises:
        TypeError: labels are not integers. ValueError: lengths differ or are 0.
    """
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    true, clusters = (
        np.unique(array, return_inverse=True)[1] for array in _label_pair("cluster_accuracy", labels, predicted)
    )
    table = np.zeros((clusters.max() + 1, true.max() + 1), dtype=np.int64)
    np.add.at(table, (clusters, true), 1)
    matched = linear_sum_assignment(table, maximize=True)
    return float(table[matched].sum() / len(true))


def normalized_mutual_info(
    labels: object,
    predicted: object,
    *,
    average_method: Literal["arithmetic", "max", "min", "geometric"] = "arithmetic",
) -> float:
    """Mutual information of two labellings over a mean of their entropies, in [0, 1].

    Args:
        labels: (N,) true classes, any integers.
        predicted: (N,) clusters, any integers.
        average_method: the mean; "max" is eq. 18 of ClusterNet, "arithmetic" scikit-learn's default.

    Raises:
        TypeError: labels are not integers. ValueError: lengths differ or are 0, or average_method is none of the four.
    """
    from sklearn.metrics import normalized_mutual_info_score  # type: ignore[import-untyped]

    if average_method not in ("arithmetic", "max", "min", "geometric"):
        raise ValueError(
            "normalized_mutual_info: average_method must be 'arithmetic', 'max', 'min' or 'geometric', "
            f"got {average_method!r}"
        )
    pair = _label_pair("normalized_mutual_info", labels, predicted)
    return float(normalized_mutual_info_score(*pair, average_method=average_method))


def adjusted_rand(labels: object, predicted: object) -> float:
    """The adjusted Rand index of two labellings: 1 for the same partition, 0 on average for independent ones.

    Args:
        labels: (N,) true classes, any integers.
        predicted: (N,) clusters, any integers.

    Raises:
        TypeError: labels are not integers. ValueError: lengths differ or are 0.

    Source: Hubert & Arabie 1985.
    """
    from sklearn.metrics import adjusted_rand_score

    return float(adjusted_rand_score(*_label_pair("adjusted_rand", labels, predicted)))


def expected_calibration_error(probabilities: object, labels: object, *, n_bins: int = 15) -> float:
    """Mean gap between confidence and accuracy: Σ_b |B_b| / N · |accuracy(B_b) − confidence(B_b)|.

    Args:
        probabilities: (N, C) of each class; the largest is the confidence; bin b is ((b − 1) / n_bins, b / n_bins].
        labels: (N,) integers: the true classes in [0, C).
        n_bins: how many equal bins [0, 1] is cut into.

    Raises:
        TypeError: labels are not integers. ValueError: shapes do not match or N is 0, a probability is outside [0, 1],
            a label outside [0, C), or n_bins below 1.

    Source: Naeini et al. 2015; 15 bins as in Guo et al. 2017.
    """
    op = "expected_calibration_error"
    p = _array(probabilities).astype(np.float64)
    if p.ndim != 2 or p.shape[1] == 0:
        raise ValueError(f"{op}: probabilities must be (N, C), got {p.shape}")
    predicted = p.argmax(1)
    true, _ = _label_pair(op, labels, predicted)
    if not ((p >= 0) & (p <= 1 + 1e-6)).all():
        raise ValueError(f"{op}: probabilities holds values outside [0, 1]")
    if true.min() < 0 or true.max() >= p.shape[1]:
        raise ValueError(f"{op}: labels holds values outside [0, {p.shape[1]})")
    if n_bins < 1:
        raise ValueError(f"{op}: n_bins must be at least 1, got {n_bins}")
    confidence = p.max(1)
    bins = np.clip(np.ceil(confidence * n_bins).astype(np.int64) - 1, 0, n_bins - 1)
    gap = np.bincount(bins, weights=(predicted == true) - confidence, minlength=n_bins)
    return float(np.abs(gap).sum() / len(true))
