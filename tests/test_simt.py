"""The CUDA kernels' own source on the CPU: g++ and tests/simt run them thread by thread and watch every memory access.

The shim (tests/simt/simt.h) ends the process at an access out of bounds, a race within a launch or a divergent barrier;
the worker runs every call under three orders of threads and asks for the same bits. `TestShim` plants one fault of each
kind.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from simt.harness import ROOT, Worker, build, needs_compiler

DTYPES = [np.float32, np.float64]

pytestmark = needs_compiler


@pytest.fixture(scope="session")
def binary() -> Path:
    return build(ROOT / "build" / "simt")


def squared_distances(x: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    x, centroids = x.astype(np.float64), centroids.astype(np.float64)
    return ((x[..., :, None, :] - centroids[..., None, :, :]) ** 2).sum(-1)


class TestShim:
    FAULTS: ClassVar = {
        "missing barrier": "race in reverse: a read and a write",
        "missing warp barrier": "race in rotate: a read and a write",
        "unordered count": "race in count: a read and a write",
        "across blocks": "race in across_blocks: a read and a write",
        "read beyond": "out of bounds in read_beyond: read of 4 bytes",
        "write beyond": "out of bounds in write_beyond: write of 4 bytes",
        "read before": "out of bounds in read_before: read of 4 bytes",
        "shared beyond": "out of bounds in shared_beyond: write of 4 bytes",
        "divergent barrier": "divergent barrier in divergent_barrier",
        "two barriers": "divergent barrier in two_barriers",
        "divergent shuffle": "divergent warp collective in divergent_shuffle",
        "order": "order: planted gives other results",
    }

    @staticmethod
    def run(binary: Path, fault: str) -> np.ndarray:
        worker = Worker(binary)
        try:
            (out,) = worker.call("planted", arrays=[np.arange(128, dtype=np.float32), fault.encode()])
        finally:
            worker.close()
        return np.frombuffer(out, np.float32)

    @pytest.mark.parametrize("fault", FAULTS)
    def test_planted_fault_is_found(self, binary, fault):
        with pytest.raises(RuntimeError) as caught:
            self.run(binary, fault)
        assert self.FAULTS[fault] in str(caught.value)

    def test_sound_kernels_pass(self, binary):
        expected = np.arange(128, dtype=np.float32).reshape(2, 64)[:, ::-1].reshape(4, 32).copy()
        expected[:2] = np.roll(expected[:2], -1, axis=1)
        np.testing.assert_array_equal(self.run(binary, "none"), expected.ravel())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (9, 1), (7, 33), (300, 3)])
def test_finite_scan(worker, rng, dtype, shape):
    x = rng.normal(size=shape).astype(dtype)
    (out,) = worker.call(f"finite_scan.{x.dtype}", shape, arrays=[x])
    assert np.frombuffer(out, np.int64).tolist() == [0, -1]
    bad = sorted({shape[0] - 1, shape[0] // 2})
    for row, value in zip(bad, [np.nan, np.inf], strict=False):
        x[row, shape[1] // 2] = value
    (out,) = worker.call(f"finite_scan.{x.dtype}", shape, arrays=[x])
    assert np.frombuffer(out, np.int64).tolist() == [len(bad), bad[0]]


def check_assignment(labels, distances, x, centroids):
    """The nearest by the distance in the kernel's own arithmetic; that distance against float64."""
    exact = squared_distances(x, centroids)
    tolerance = 64 * np.finfo(x.dtype).eps
    chosen = np.take_along_axis(exact, labels[..., None], -1)[..., 0]
    assert (chosen <= exact.min(-1) * (1 + tolerance)).all()
    np.testing.assert_allclose(distances, chosen, rtol=tolerance)


class TestKMeans:
    @staticmethod
    def assign(worker, x, centroids, exact=True):
        ints = [*x.shape[:2], centroids.shape[1], x.shape[2], exact]
        labels, distances = worker.call(f"kmeans_assign.{x.dtype}", ints, arrays=[x, centroids])
        return (
            np.frombuffer(labels, np.int64).reshape(x.shape[:2]),
            np.frombuffer(distances, x.dtype).reshape(x.shape[:2]),
        )

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("b", "n", "k", "d"),
        [
            (1, 1, 1, 1),
            (1, 63, 2, 1),
            (2, 64, 64, 16),
            (1, 65, 65, 17),
            (3, 129, 5, 40),
            (1, 5, 200, 7),
            (2, 130, 129, 15),
        ],
    )
    def test_assign(self, worker, rng, dtype, b, n, k, d):
        x, centroids = rng.normal(size=(b, n, d)).astype(dtype), rng.normal(size=(b, k, d)).astype(dtype)
        check_assignment(*self.assign(worker, x, centroids), x, centroids)

    def test_ties_go_to_the_lowest_label(self, worker, rng):
        centroids = np.repeat(rng.normal(size=(1, 35, 9)), 4, axis=1).astype(np.float32)[:, rng.permutation(140)]
        x = np.concatenate([centroids[:, ::-1], rng.normal(size=(1, 30, 9)).astype(np.float32)], axis=1)
        labels, distances = self.assign(worker, x, centroids)
        np.testing.assert_array_equal(labels, squared_distances(x, centroids).argmin(-1))
        assert (distances[0, :140] == 0).all()

    @pytest.mark.parametrize(("k", "d"), [(8, 16), (130, 70)])
    def test_margins_that_halves_do_not_see(self, worker, rng, k, d):
        """Centroids in pairs 1e-4 apart, far from the origin: the filter alone errs, with the re-check nothing does."""
        centroids = np.repeat(rng.normal(size=(1, k // 2, d)), 2, axis=1) + 30
        centroids += rng.normal(size=centroids.shape) * 1e-4
        x = np.concatenate([centroids[:, rng.integers(0, k, 90)], rng.normal(size=(1, 40, d)) + 30], axis=1)
        x, centroids = (x + 1e-5 * rng.normal(size=x.shape)).astype(np.float32), centroids.astype(np.float32)
        nearest = squared_distances(x, centroids).argmin(-1)
        np.testing.assert_array_equal(self.assign(worker, x, centroids)[0], nearest)
        wrong = self.assign(worker, x, centroids, exact=False)[0] != nearest
        assert 0 < wrong.mean() < 0.6

    @staticmethod
    def lloyd(worker, x, init, max_iter, tol=0.0, weight=None, fixed=None, spherical=False):
        (b, n, d), (_, r, k, _) = x.shape, init.shape
        out = worker.call(
            f"kmeans_lloyd.{x.dtype}", [b, r, n, k, d, max_iter, spherical, True], [tol], [x, init, weight, fixed]
        )
        centroids = np.frombuffer(out[0], x.dtype).reshape(init.shape)
        labels = np.frombuffer(out[1], np.int64).reshape(b, r, n)
        return (
            centroids,
            labels,
            np.frombuffer(out[2], x.dtype).reshape(b, r),
            np.frombuffer(out[3], np.int64).reshape(b, r),
        )

    @staticmethod
    def reference(x, init, max_iter, tol=0.0, weight=None, fixed=None, spherical=False):
        """csrc/kmeans/kmeans.h in float64, for one problem and one start."""
        x, centroids = x.astype(np.float64), init.astype(np.float64)
        weight = np.ones(len(x)) if weight is None else weight.astype(np.float64)
        fixed = np.full(len(x), -1) if fixed is None else fixed
        k, before, n_iter = len(centroids), None, 0

        def assign():
            distances = squared_distances(x, centroids)
            labels = np.where(fixed >= 0, fixed, distances.argmin(1))
            return labels, distances[np.arange(len(x)), labels]

        while n_iter < max_iter:
            labels, distances = assign()
            n_iter += 1
            if before is not None and (labels == before).all():
                break
            before, moved = labels, centroids.copy()
            weights = np.bincount(labels, weight, k)
            for c in np.flatnonzero(weights > 0):
                total = (x * weight[:, None])[labels == c].sum(0)
                norm = np.linalg.norm(total) if spherical else weights[c]
                moved[c] = total / norm if norm > 0 else moved[c]
            rows = np.flatnonzero((labels == weights.argmax()) & (weight > 0) & (fixed < 0) & (distances > 0))
            farthest = rows[np.lexsort((rows, -distances[rows]))]
            for c, row in zip(np.flatnonzero(weights == 0), farthest, strict=False):
                moved[c] = x[row]
            shift = ((moved - centroids) ** 2).sum()
            centroids = moved
            if shift <= tol * x.var(0).mean():
                break
        labels, distances = assign()
        return centroids, labels, (weight * distances).sum(), n_iter

    def compare(self, worker, x, init, max_iter, **options):
        got = self.lloyd(worker, x, init, max_iter, **options)
        weight, fixed = options.pop("weight", None), options.pop("fixed", None)
        for b, r in np.ndindex(init.shape[:2]):
            one = {"weight": None if weight is None else weight[b], "fixed": None if fixed is None else fixed[b]}
            centroids, labels, inertia, n_iter = self.reference(x[b], init[b, r], max_iter, **one, **options)
            eps = 1e3 * np.finfo(x.dtype).eps
            np.testing.assert_allclose(got[0][b, r], centroids, rtol=eps, atol=eps)
            np.testing.assert_array_equal(got[1][b, r], labels)
            np.testing.assert_allclose(got[2][b, r], inertia, rtol=eps, atol=eps)
            assert got[3][b, r] == n_iter
        return got

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("b", "r", "n", "k", "d", "max_iter"),
        [
            (1, 1, 1, 1, 1, 3),
            (1, 1, 65, 3, 2, 0),
            (2, 2, 66, 4, 3, 40),
            (1, 1, 2100, 3, 1, 2),
            (1, 2, 70, 70, 4, 5),
            (1, 1, 40, 9, 130, 3),
            (2, 1, 270, 3, 17, 3),
        ],
    )
    def test_lloyd(self, worker, rng, dtype, b, r, n, k, d, max_iter):
        x = rng.normal(size=(b, n, d)).astype(dtype)
        init = np.stack([[x[i, rng.permutation(n)[:k]] for _ in range(r)] for i in range(b)])
        n_iter = self.compare(worker, x, init, max_iter)[3]
        if max_iter == 40:
            assert (n_iter < max_iter).all()
            assert len(np.unique(n_iter)) > 1, "groups that stop at different times"

    def test_lloyd_with_weights_and_fixed_labels(self, worker, rng):
        x = rng.normal(size=(2, 90, 3)).astype(np.float32)
        weight = rng.integers(0, 4, size=(2, 90)).astype(np.float32)
        fixed = np.where(rng.random((2, 90)) < 0.2, rng.integers(0, 4, size=(2, 90)), -1)
        self.compare(worker, x, x[:, None, :4], 8, weight=weight, fixed=fixed)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_sums_are_exact_beside_a_giant(self, worker, rng, dtype):
        """A row 10^15 times as large as the others takes the leading bits of the whole numbers that are summed."""
        x = rng.normal(size=(1, 150, 2)).astype(dtype)
        x[0, 0] = 1e15
        self.compare(worker, x, x[:, None, :4], 4)

    def test_empty_clusters_take_the_farthest_rows(self, worker, rng):
        x = rng.normal(size=(1, 300, 2)).astype(np.float32)
        x[0, 5] = x[0, 80]  # two rows equally far
        x[0, [5, 80]] *= 9
        init = np.concatenate([x[:, :2], np.full((1, 6, 2), 1e3, np.float32)], axis=1)[:, None]
        self.compare(worker, x, init, 1)
        self.compare(worker, x, init, 6)

    def test_more_clusters_than_distinct_rows(self, worker):
        x = np.repeat(np.array([[[0.0], [1.0]]], np.float32), 5, axis=1)
        init = np.arange(4, dtype=np.float32).reshape(1, 1, 4, 1) + np.float32(0.25)
        self.compare(worker, x, init, 9)

    def test_spherical(self, worker, rng):
        x = rng.normal(size=(1, 120, 3)).astype(np.float32)
        x /= np.linalg.norm(x, axis=-1, keepdims=True)
        self.compare(worker, x, x[:, None, :5], 6, spherical=True)

    def test_tolerance_stops(self, worker, rng):
        x = (rng.normal(size=(1, 300, 2)) + 100).astype(np.float64)
        n_iter = self.compare(worker, x, x[:, None, :6], 30, tol=1e-2)[3]
        assert n_iter[0, 0] < 20

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("b", "r", "n", "k", "d", "tries"), [(1, 1, 1, 1, 1, 1), (1, 2, 1030, 3, 3, 2), (1, 1, 70, 70, 2, 2)]
    )
    def test_plus_plus(self, worker, rng, dtype, b, r, n, k, d, tries):
        x = rng.normal(size=(b, n, d)).astype(dtype)
        weight = rng.integers(0, 3, size=(b, n)).astype(dtype) if k < n else None
        uniforms = rng.random((b, r, k, tries)).astype(dtype)
        (out,) = worker.call(f"kmeans_plus_plus.{x.dtype}", [b, r, n, k, d, tries], arrays=[x, weight, uniforms])
        rows = np.frombuffer(out, np.int64).reshape(b, r, k)
        for i, j in np.ndindex(b, r):
            own = None if weight is None else weight[i]
            np.testing.assert_array_equal(rows[i, j], seed_plus_plus(x[i], own, uniforms[i, j]))

    def test_plus_plus_with_duplicates(self, worker, rng):
        x = np.repeat(rng.normal(size=(1, 3, 2)), 20, axis=1).astype(np.float32)
        uniforms = rng.random((1, 1, 6, 2)).astype(np.float32)
        (out,) = worker.call("kmeans_plus_plus.float32", [1, 1, 60, 6, 2, 2], arrays=[x, None, uniforms])
        np.testing.assert_array_equal(np.frombuffer(out, np.int64), seed_plus_plus(x[0], None, uniforms[0, 0]))


def seed_plus_plus(x, weight, uniforms):
    x = x.astype(np.float64)
    weight = np.ones(len(x)) if weight is None else weight.astype(np.float64)
    nearest, rows = np.full(len(x), np.inf), []
    for pick, us in enumerate(uniforms.astype(np.float64)):
        mass = weight * nearest if pick > 0 else weight
        if pick == 0 or mass.sum() == 0:
            mass, us = weight, us[:1]
        drawn = [int(np.argmax(np.cumsum(mass) > u * mass.sum())) for u in us]
        left = [np.minimum(nearest, squared_distances(x, x[row][None])[:, 0]) for row in drawn]
        best = int(np.argmin([(weight * m).sum() for m in left])) if pick > 0 else 0
        rows.append(drawn[best])
        nearest = left[best]
    return rows
