"""Metrics against small cases worked by hand, and against what they must not depend on."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastclust import metrics


def test_cluster_accuracy_matches_one_to_one():
    labels, clusters = [0, 0, 0, 1, 1, 1, 2, 2], [7, 7, 5, 5, 5, 7, 5, 5]
    assert metrics.cluster_accuracy(labels, clusters) == pytest.approx(4 / 8)  # 7 -> 0 and 5 -> 1 or 2, never both
    assert metrics.cluster_accuracy([0, 0, 1, 1], [0, 1, 2, 3]) == 0.5  # more clusters than classes
    assert metrics.cluster_accuracy([0, 1, 2, 3], [0, 0, 0, 0]) == 0.25
    assert metrics.cluster_accuracy(torch.tensor([3]), np.array([9])) == 1.0


@given(st.lists(st.tuples(st.integers(-2, 4), st.integers(0, 5)), min_size=1, max_size=30))
def test_metrics_ignore_the_names_of_clusters(pairs):
    labels, clusters = np.array([p[0] for p in pairs]), torch.tensor([p[1] for p in pairs])
    renamed = torch.tensor([30, 10, 50, -20, 0, 40])[clusters]
    for metric in (metrics.cluster_accuracy, metrics.normalized_mutual_info, metrics.adjusted_rand):
        assert metric(labels, clusters) == pytest.approx(metric(labels, renamed))
        assert metric(labels, labels) == pytest.approx(1)


def test_normalized_mutual_info_by_hand():
    labels, clusters = [0, 0, 1, 1], [0, 1, 2, 2]
    mutual, small, large = math.log(2), math.log(2), 1.5 * math.log(2)
    for method, mean in {"arithmetic": (small + large) / 2, "max": large, "min": small}.items():
        value = metrics.normalized_mutual_info(labels, clusters, average_method=method)
        assert value == pytest.approx(mutual / mean)
    assert metrics.normalized_mutual_info(labels, clusters) == pytest.approx(0.8)


def test_adjusted_rand_by_hand():
    assert metrics.adjusted_rand([0, 0, 1, 1], [0, 0, 1, 2]) == pytest.approx(4 / 7)
    assert metrics.adjusted_rand([0, 0, 1, 1], [0, 1, 0, 1]) == pytest.approx(-0.5)


def test_calibration_error_by_hand():
    p = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.45, 0.55], [0.35, 0.65]])
    # with ten bins: (0.8, 0.9] two points, accuracy 0.5, confidence 0.9; (0.5, 0.6] right; (0.6, 0.7] wrong
    error = metrics.expected_calibration_error(p, [0, 1, 1, 0], n_bins=10)
    assert error == pytest.approx((2 * 0.4 + 0.45 + 0.65) / 4, rel=1e-6)
    assert metrics.expected_calibration_error(np.eye(3), [0, 1, 2]) == 0
    assert metrics.expected_calibration_error(np.eye(3), [1, 2, 0]) == 1
    assert metrics.expected_calibration_error(torch.full((8, 4), 0.25), torch.arange(8) % 4) == pytest.approx(0)


def test_bins_are_closed_above():
    """0.5 belongs to (0, 0.5] with two bins; opposite gaps in one bin cancel, in two they add."""
    p = np.array([[0.5, 0.3, 0.2], [0.4, 0.3, 0.3], [0.6, 0.2, 0.2]])
    assert metrics.expected_calibration_error(p, [0, 1, 1], n_bins=2) == pytest.approx((0.1 + 0.6) / 3)


@pytest.mark.parametrize("metric", [metrics.cluster_accuracy, metrics.normalized_mutual_info, metrics.adjusted_rand])
def test_labelings_are_checked(metric):
    name = metric.__name__
    with pytest.raises(ValueError, match=f"{name}: predicted must have 3 labels, got 2"):
        metric([0, 1, 2], [0, 1])
    with pytest.raises(ValueError, match=f"{name}: labels is empty"):
        metric(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(TypeError, match=f"{name}: labels must hold integers, got float64"):
        metric([0.0, 1.0], [0, 1])
    with pytest.raises(ValueError, match=rf"{name}: predicted must be \(N,\), got \(2, 1\)"):
        metric([0, 1], [[0], [1]])


def test_calibration_is_checked():
    ece = metrics.expected_calibration_error
    for p, labels, options, error, message in [
        (np.ones(3), [0, 0, 0], {}, ValueError, r"probabilities must be \(N, C\)"),
        (np.eye(3), [0, 1], {}, ValueError, "predicted must have 2 labels, got 3"),
        (np.eye(3) * 2, [0, 1, 2], {}, ValueError, r"values outside \[0, 1\]"),
        (np.full((1, 2), np.nan), [0], {}, ValueError, r"values outside \[0, 1\]"),
        (np.eye(3), [0, 1, 3], {}, ValueError, r"labels holds values outside \[0, 3\)"),
        (np.eye(3), [0, 1, -1], {}, ValueError, r"labels holds values outside \[0, 3\)"),
        (np.eye(3), [0, 1, 2], {"n_bins": 0}, ValueError, "n_bins must be at least 1"),
        (np.eye(3), [0.0, 1.0, 2.0], {}, TypeError, "labels must hold integers"),
    ]:
        with pytest.raises(error, match=message):
            ece(p, labels, **options)


def test_average_method_is_checked():
    with pytest.raises(ValueError, match=r"normalized_mutual_info: average_method must be .* got 'mean'"):
        metrics.normalized_mutual_info([0], [0], average_method="mean")


def test_importing_fastclust_imports_neither_scipy_nor_sklearn():
    script = "import sys, torch; before = set(sys.modules); import fastclust; print(*sorted(set(sys.modules) - before))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not [name for name in run.stdout.split() if name.split(".")[0] in ("scipy", "sklearn")]
