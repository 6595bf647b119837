"""Rows beyond 2³¹ elements and more than 65,535 problems, on the kernels of the CPU shim (test_simt.py).

x is zeros but for its last rows, which lie beyond its first 2³¹ elements, and takes no memory elsewhere; grids are as
large as on a GPU, but of a large one only the first and last blocks run (`set_sparse` in tests/simt/simt.h), which are
those of the last rows.
"""

from __future__ import annotations

import numpy as np
from simt.harness import needs_compiler
from test_simt_half import stored

D = 256  # eight rows to a block: the last rows are what the first block walks on to
FIRST = 2**31 // D  # the first row beyond the border
ROWS = 6
N = FIRST + ROWS

pytestmark = needs_compiler


def last(data: bytes, dtype: type, count: int) -> np.ndarray:
    return np.frombuffer(data, dtype)[-count:]


def near(centroids: np.ndarray, labels: list[int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Rows beside these centroids, in bfloat16 and as what it stands for."""
    return stored(centroids[labels] + 0.1 * rng.normal(size=(len(labels), centroids.shape[1])), "bfloat16")


def test_finite_scan(worker):
    x = np.zeros((ROWS, D), np.float32)
    x[3, 5] = x[5, 0] = np.nan
    (out,) = worker.call("far_finite_scan.float32", [N, D], arrays=[x])
    assert np.frombuffer(out, np.int64).tolist() == [2, FIRST + 3]


def test_kmeans_assign(worker, rng):
    centroids, labels = rng.normal(size=(3, D)).astype(np.float32), [1, 2, 0, 2, 1, 1]
    x, floats = near(centroids, labels, rng)
    found, distances = worker.call("far_kmeans_assign.bfloat16", [1, N, 3, D, True], arrays=[x, centroids])
    assert last(found, np.int64, ROWS).tolist() == labels
    np.testing.assert_allclose(last(distances, np.float32, ROWS), ((floats - centroids[labels]) ** 2).sum(1), rtol=1e-4)


def test_kmeans_lloyd(worker, rng):
    """Zeros are the first cluster's; the others' means are those of the last rows."""
    init, labels = rng.normal(size=(3, D)).astype(np.float32), [1, 2, 2, 2, 1, 1]
    init[0] *= 0.01
    x, floats = near(init, labels, rng)
    ints, arrays = [1, 1, N, 3, D, 1, False, True], [x, init, None, None]
    centroids, found, _, _ = worker.call("far_kmeans_lloyd.bfloat16", ints, [1e-30], arrays)
    assert last(found, np.int64, ROWS).tolist() == labels
    means = [floats[np.equal(labels, k)].mean(0) for k in (1, 2)]
    np.testing.assert_allclose(np.frombuffer(centroids, np.float32).reshape(3, D)[1:], means, rtol=1e-5, atol=1e-6)


def test_kmeans_plus_plus(worker, rng):
    """The masses of the chunks that ran: 3 of 1024 zeros and the last rows."""
    x, _ = stored(rng.normal(size=(ROWS, D)), "bfloat16")
    uniforms = np.array([[3076.5 / 3078] * 2, [0.9999] * 2], np.float32)
    (rows,) = worker.call("far_kmeans_plus_plus.bfloat16", [1, 1, N, 2, D, 2], arrays=[x, None, uniforms])
    assert np.frombuffer(rows, np.int64).tolist() == [FIRST + 4, FIRST + 5]


def test_knn(worker, rng):
    d = 1024  # the blocks' lists are merged, one for each tile of 128 rows
    first = 2**31 // d
    x, floats = stored(rng.normal(size=(ROWS, d)), "bfloat16")
    values, indices = worker.call("far_knn.bfloat16", [first + ROWS, 2, 1, d, 1, True], arrays=[x, x[[4, 1]]])
    assert np.frombuffer(indices, np.int64).tolist() == [first + 4, first + 1]
    np.testing.assert_allclose(np.frombuffer(values, np.float32), (floats[[4, 1]] ** 2).sum(1), rtol=1e-5)


def test_more_problems_than_a_grid_has_in_y(worker, rng):
    problems, shape = 70_000, (70_000, 2, 3)
    centroids = rng.normal(size=shape).astype(np.float32)
    x = centroids[-ROWS:, ::-1].copy()
    labels, distances = worker.call("far_kmeans_assign.float32", [problems, 2, *shape[1:], True], arrays=[x, centroids])
    assert last(labels, np.int64, 4).tolist() == [1, 0, 1, 0]  # one tile a problem: two problems at the end ran
    assert last(distances, np.float32, 4).tolist() == [0, 0, 0, 0]
