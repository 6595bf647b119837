"""Rows in half precision, on the kernels of the CPU shim (test_simt.py): to the bit what those rows give as float32.

Rows lie one element into their memory, as those of a view may (tests/simt/worker.cpp).
"""

from __future__ import annotations

import numpy as np
import pytest
from simt.harness import needs_compiler

STORAGES = ["float16", "bfloat16"]
METRICS = ["cosine", "inner_product", "euclidean"]

pytestmark = [needs_compiler, pytest.mark.parametrize("storage", STORAGES)]


def stored(x: np.ndarray, storage: str) -> tuple[np.ndarray, np.ndarray]:
    """x rounded to a half (bfloat16: cut), as bits and as the float32 that it stands for."""
    if storage == "float16":
        half = x.astype(np.float16)
        return half.view(np.uint16), half.astype(np.float32)
    bits = (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return bits, (bits.astype(np.uint32) << 16).view(np.float32)


def call_both(worker, op, storage, rows, ints, reals=(), others=()) -> list[bytes]:
    """The answer for arrays `rows` as halves, which is that for the same values as float32."""
    halves, floats = zip(*(stored(x, storage) if x is not None else (None, None) for x in rows), strict=True)
    got = worker.call(f"{op}.{storage}", ints, reals, [*halves, *others])
    assert got == worker.call(f"{op}.float32", ints, reals, [*floats, *others])
    return got


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_finite_scan(worker, rng, storage, value):
    x = rng.normal(size=(9, 33)) * 6e4  # fp16: some beyond its range
    x = np.clip(x, -65504, 65504)
    x[2:4, 7] = 1e-7, -1e-40  # below the normal halves, and in bfloat16 below the normal floats
    assert np.frombuffer(call_both(worker, "finite_scan", storage, [x], x.shape)[0], np.int64).tolist() == [0, -1]
    x[[4, 8], 32] = value
    assert np.frombuffer(call_both(worker, "finite_scan", storage, [x], x.shape)[0], np.int64).tolist() == [2, 4]


@pytest.mark.parametrize(
    ("b", "n", "k", "d", "exact"),
    [(1, 1, 1, 1, True), (2, 65, 3, 1, True), (1, 129, 5, 17, True), (1, 5, 2, 16, False), (1, 64, 2, 15, True)],
)
def test_kmeans_assign(worker, rng, storage, b, n, k, d, exact):
    x, centroids = rng.normal(size=(b, n, d)) + 3, (rng.normal(size=(b, k, d)) + 3).astype(np.float32)
    labels, _ = call_both(worker, "kmeans_assign", storage, [x], [b, n, k, d, exact], others=[centroids])
    if exact:
        gaps = ((stored(x, storage)[1][:, :, None].astype(np.float64) - centroids[:, None]) ** 2).sum(-1)
        np.testing.assert_array_equal(np.frombuffer(labels, np.int64).reshape(b, n), gaps.argmin(-1))


@pytest.mark.parametrize(
    ("b", "r", "n", "k", "d", "max_iter"),
    [(1, 1, 1, 1, 1, 2), (2, 2, 66, 4, 3, 3), (1, 1, 129, 7, 17, 2)],
)
def test_kmeans_lloyd(worker, rng, storage, b, r, n, k, d, max_iter):
    """With weights, fixed rows, a tolerance and a cluster that is empty at first."""
    x = rng.normal(size=(b, n, d))
    init = rng.normal(size=(b, r, k, d)).astype(np.float32)
    init[:, :, -1] += 1e3 * (k > 1)
    weight = rng.integers(1, 4, size=(b, n)).astype(np.float32)
    fixed = np.where(rng.random((b, n)) < 0.1, rng.integers(0, k, size=(b, n)), -1)
    ints = [b, r, n, k, d, max_iter, False, True]
    call_both(worker, "kmeans_lloyd", storage, [x], ints, [1e-3], [init, weight, fixed])


@pytest.mark.parametrize(("n", "k", "d", "tries"), [(1, 1, 1, 1), (1030, 3, 3, 2)])
def test_kmeans_plus_plus(worker, rng, storage, n, k, d, tries):
    x, uniforms = rng.normal(size=(1, n, d)), rng.random((1, 1, k, tries)).astype(np.float32)
    call_both(worker, "kmeans_plus_plus", storage, [x], [1, 1, n, k, d, tries], others=[None, uniforms])


@pytest.mark.parametrize(
    ("metric", "n", "m", "k", "d"),
    [
        *((metric, 65, None, 5, 3) for metric in METRICS),
        ("inner_product", 2, None, 1, 1),
        ("inner_product", 129, 3, 9, 16),
        ("euclidean", 130, None, 20, 17),
    ],
)
def test_knn(worker, rng, storage, metric, n, m, k, d):
    x = rng.normal(size=(n, d))
    x[n // 2 :] = x[: n - n // 2]  # duplicates: ties go to the lowest index
    x[0] = 0
    queries = None if m is None else rng.normal(size=(m, d))
    ints = [n, n if m is None else m, k, d, METRICS.index(metric), True]
    values, indices = call_both(worker, "knn", storage, [x, queries], ints)
    floats = stored(x, storage)[1].astype(np.float64)
    if metric == "euclidean":
        asked = floats if m is None else stored(queries, storage)[1]
        distances = np.sqrt(((asked[:, None] - floats) ** 2).sum(-1))
        chosen = np.take_along_axis(distances, np.frombuffer(indices, np.int64).reshape(-1, k), 1)
        np.testing.assert_allclose(np.frombuffer(values, np.float32).reshape(-1, k), chosen, rtol=1e-5, atol=1e-6)
