"""The CUDA kernels of kNN, diffusion, soft assignment and pairwise KL on the CPU; see test_simt.py."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
from simt.harness import needs_compiler

DTYPES = [np.float32, np.float64]
METRICS = ["cosine", "inner_product", "euclidean"]
SYMMETRIZE = ["none", "sum", "mean", "max"]

pytestmark = needs_compiler


def call(worker, op, x, ints=(), reals=(), arrays=(), dtypes=()):
    out = worker.call(f"{op}.{x.dtype}", ints, reals, arrays)
    return [np.frombuffer(data, dtype) for data, dtype in zip(out, dtypes, strict=True)]


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


@pytest.mark.parametrize("dtype", DTYPES)
class TestSoftAssign:
    @pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 1), (65, 3, 17), (63, 65, 2), (3, 130, 5)])
    def test_forward(self, worker, rng, dtype, n, k, d):
        x, centroids = (rng.normal(size=(rows, d)).astype(dtype) + 100 for rows in (n, k))
        (log_p,) = call(worker, "soft_assign", x, [n, k, d], arrays=[x, centroids], dtypes=[dtype])
        distances = ((x[:, None].astype(np.float64) - centroids.astype(np.float64)) ** 2).sum(-1)
        np.testing.assert_allclose(log_p.reshape(n, k), log_softmax(-distances), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 1), (65, 3, 67), (258, 66, 2)])
    def test_backward(self, worker, rng, dtype, n, k, d):
        x, centroids = (rng.normal(size=(rows, d)).astype(dtype) for rows in (n, k))
        grad, log_p = rng.normal(size=(n, k)).astype(dtype), log_softmax(rng.normal(size=(n, k))).astype(dtype)
        grads = call(
            worker, "soft_assign_backward", x, [n, k, d], arrays=[grad, x, centroids, log_p], dtypes=[dtype, dtype]
        )
        t = grad - np.exp(log_p.astype(np.float64)) * grad.sum(1, keepdims=True, dtype=np.float64)
        pulls = 2 * t[..., None] * (centroids[None].astype(np.float64) - x[:, None])
        tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == np.float32 else {"rtol": 1e-11, "atol": 1e-11}
        np.testing.assert_allclose(grads[0].reshape(n, d), pulls.sum(1), **tolerance)
        np.testing.assert_allclose(grads[1].reshape(k, d), -pulls.sum(0), **tolerance)


class TestPairwiseKL:
    @staticmethod
    def reference(log_p, labels, margin):
        """The loss, and its derivative by each ordered pair's KL_ij."""
        log_p = log_p.astype(np.float64)
        with np.errstate(invalid="ignore"):
            terms = np.exp(log_p)[:, None] * (log_p[:, None] - log_p[None])
        kl = np.where(np.exp(log_p)[:, None] > 0, terms, 0).sum(-1)
        valid = (labels[:, None] >= 0) & (labels[None] >= 0) & ~np.eye(len(labels), dtype=bool)
        similar = valid & (labels[:, None] == labels[None])
        dissimilar = valid & ~similar
        hinge = np.maximum(margin - kl, 0)
        pairs = [(similar, kl + kl.T), (dissimilar, hinge + hinge.T)]
        slopes = [similar * 2.0, -2.0 * (dissimilar & (kl < margin))]
        loss = sum(values[mask].mean() for mask, values in pairs if mask.any())
        return loss, sum(slope / max(mask.sum(), 1) for (mask, _), slope in zip(pairs, slopes, strict=True))

    @staticmethod
    def batch(rng, b, k, dtype, empty=True):
        log_p = log_softmax(rng.normal(size=(b, k)) * 2).astype(dtype)
        if empty and k > 2:
            log_p[rng.random(log_p.shape) < 0.02] = -np.inf
        return log_p, rng.integers(-1, 4, size=b)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("b", "k"), [(1, 3), (2, 1), (64, 10), (65, 17)])
    def test_forward(self, worker, rng, dtype, b, k):
        log_p, labels = self.batch(rng, b, k, dtype, empty=False)
        self.check_forward(worker, log_p, labels)

    def test_zero_probabilities(self, worker, rng):
        log_p, labels = self.batch(rng, 70, 9, np.float64)
        assert np.isneginf(log_p).any()
        labels[labels == 2] = -1
        assert np.isposinf(self.check_forward(worker, log_p, labels))

    @staticmethod
    def run(worker, log_p, labels, detach=False):
        types = [log_p.dtype, log_p.dtype, np.int64]
        return call(worker, "pairwise_kl", log_p, [*log_p.shape, detach], [2.0], [log_p, labels], types)

    def check_forward(self, worker, log_p, labels):
        loss, _, findings = self.run(worker, log_p, labels)
        np.testing.assert_allclose(loss[0], self.reference(log_p, labels, 2.0)[0], rtol=2e-5)
        assert findings.tolist() == [0, -1, 0, -1]
        return loss[0]

    def test_findings(self, worker, rng):
        log_p, labels = self.batch(rng, 70, 5, np.float32)
        log_p[[3, 69], [1, 4]] = np.nan, np.inf
        labels[11] = -2
        out = self.run(worker, log_p, labels)
        assert out[2].tolist() == [2, 3, 1, 11]

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("detach", [False, True])
    @pytest.mark.parametrize(("b", "k"), [(1, 3), (65, 10), (9, 130)])
    def test_backward(self, worker, rng, dtype, detach, b, k):
        log_p, labels = self.batch(rng, b, k, dtype, empty=False)
        _, got, _ = self.run(worker, log_p, labels, detach)
        self.check_gradient(got, log_p, labels, detach)

    @pytest.mark.parametrize(("b", "k", "detach"), [(5, 2, False), (130, 5, False), (17, 130, True)])
    def test_products(self, worker, rng, b, k, detach):
        """The tensor cores' way, in panels of 128 rows; some rows lack what others of another label have."""
        log_p, labels = self.batch(rng, b, k, np.float32, empty=False)
        log_p[labels == 2] *= 1e-3  # nearly equal rows, whose products cancel
        log_p[labels == 2] = log_softmax(log_p[labels == 2])
        log_p[labels == 3, 1] = -np.inf
        ints = [b, k, detach, 128]
        loss, got = call(worker, "pairwise_kl_products", log_p, ints, [2.0], [log_p, labels], [log_p.dtype] * 2)
        np.testing.assert_allclose(loss, self.reference(log_p, labels, 2.0)[0], rtol=2e-5)
        self.check_gradient(got, log_p, labels, detach)
        if b < 100:
            (alone,) = call(worker, "pairwise_kl_products", log_p, [*ints, 0], [2.0], [log_p, labels], [log_p.dtype])
            np.testing.assert_array_equal(alone, loss)

    def test_products_tell_of_infinite_divergences(self, worker, rng):
        log_p, labels = self.batch(rng, 40, 9, np.float32)
        assert np.isneginf(log_p).any()
        ints = [*log_p.shape, False, 128]
        loss, _ = call(worker, "pairwise_kl_products", log_p, ints, [2.0], [log_p, labels], [log_p.dtype] * 2)
        assert np.isposinf(loss)

    def check_gradient(self, got, log_p, labels, detach):
        (b, k), dtype = log_p.shape, log_p.dtype
        _, g = self.reference(log_p, labels, 2.0)
        log_p = np.maximum(log_p.astype(np.float64), -1e300)  # where p is 0 no product with it counts
        p = np.exp(log_p)
        expected = -g.T @ p
        if not detach:
            expected += p * ((log_p + 1) * g.sum(1, keepdims=True) - g @ log_p)
        scale = np.abs(expected).max() + 1e-30
        np.testing.assert_allclose(
            got.reshape(b, k) / scale, expected / scale, atol=2e-5 if dtype == np.float32 else 1e-12
        )


def random_graph(rng, n, density, dtype):
    w = scipy.sparse.random(n, n, density, random_state=rng, data_rvs=rng.random)
    w.setdiag(0)
    w = scipy.sparse.csr_array(w + w.T).astype(dtype)
    w.eliminate_zeros()
    w.sort_indices()
    return w


class TestDiffusion:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("n", "c"), [(1, 1), (40, 3), (300, 1), (33, 65)])
    def test_solve(self, worker, rng, dtype, n, c):
        w = random_graph(rng, n, min(1.0, 4 / n), dtype)
        y = rng.random((n, c)).astype(dtype)
        y[:, 0] = 0
        tol = 1e-3 if dtype == np.float32 else 1e-9
        f, residual, n_iter = call(
            worker, "diffuse", y, [n, w.nnz, c, 60], [0.9, tol], self.csr(w, y), [dtype, dtype, np.int64]
        )
        w = w.astype(np.float64)
        degree = np.asarray(w.sum(1)).ravel()
        half = np.where(degree > 0, 1 / np.sqrt(np.where(degree > 0, degree, 1)), 0)
        system = np.eye(n) - 0.9 * half[:, None] * w.toarray() * half
        np.testing.assert_allclose(f.reshape(n, c), np.linalg.solve(system, y), atol=20 * tol)
        norms = np.linalg.norm(y, axis=0)
        expected = np.linalg.norm(y - system @ f.reshape(n, c), axis=0) / np.where(norms > 0, norms, 1)
        np.testing.assert_allclose(residual, expected, atol=1e-5 if dtype == np.float32 else 1e-13)
        assert residual.max() <= 2 * tol
        assert n_iter[0] == 0
        assert (n_iter[1:] > 0).all()
        assert n_iter.max() < 60

    @pytest.mark.parametrize("max_iter", [0, 1, 2])
    def test_stops_at_max_iter(self, worker, rng, max_iter):
        w = random_graph(rng, 50, 0.1, np.float64)
        y = rng.random((50, 2))
        f, residual, n_iter = call(
            worker, "diffuse", y, [50, w.nnz, 2, max_iter], [0.99, 0.0], self.csr(w, y), [y.dtype, y.dtype, np.int64]
        )
        assert n_iter.tolist() == [max_iter] * 2
        half = 1 / np.sqrt(np.asarray(w.sum(1)))
        system = np.eye(50) - 0.99 * half[:, None] * w.toarray() * half
        x, r, p = np.zeros_like(y), y, y
        for _ in range(max_iter):
            step = (r * r).sum(0) / (p * (system @ p)).sum(0)
            x, r, before = x + step * p, r - step * (system @ p), r
            p = r + (r * r).sum(0) / (before * before).sum(0) * p
        np.testing.assert_allclose(f.reshape(50, 2), x, rtol=1e-10)
        np.testing.assert_allclose(residual, np.linalg.norm(r, axis=0) / np.linalg.norm(y, axis=0), rtol=1e-10)

    @staticmethod
    def csr(w, *more):
        return [w.indptr.astype(np.int64), w.indices.astype(np.int64), w.data, *more]

    @pytest.mark.parametrize(
        ("fault", "row"), [("none", -1), ("ends", -1), ("falls", 3), ("range", 5), ("order", 7), ("weight", 9)]
    )
    def test_inspect(self, worker, rng, fault, row):
        w = random_graph(rng, 40, 0.5, np.float32)
        crow, col, weights = self.csr(w)
        if fault == "ends":
            crow[-1] -= 1
        elif fault == "falls":
            crow[4] = crow[3] - 1
        elif fault == "range":
            col[crow[6] - 1] = 40
            weights[-1] = -1
        elif fault == "order":
            col[crow[7] + 1] = col[crow[7]]
        elif fault == "weight":
            weights[crow[10] - 1] = np.nan
        number = ["none", "crow", "range", "order", "weight"].index("crow" if fault in ("ends", "falls") else fault)
        (found,) = call(worker, "inspect_graph", weights, [40, w.nnz], [], [crow, col, weights], [np.int64])
        assert found.tolist() == [number, row]


class TestKNN:
    @staticmethod
    def search(worker, x, k, metric, queries=None):
        m = len(x if queries is None else queries)
        values, indices = call(
            worker,
            "knn",
            x,
            [len(x), m, k, x.shape[1], METRICS.index(metric), 1],
            [],
            [x, queries],
            [x.dtype, np.int64],
        )
        return values.reshape(m, k), indices.reshape(m, k)

    @staticmethod
    def scores(x, queries, metric):
        x, queries = x.astype(np.float64), queries.astype(np.float64)
        if metric == "euclidean":
            return -np.sqrt(((queries[:, None] - x) ** 2).sum(-1))
        if metric == "cosine":
            x, queries = (
                rows / np.where((norm := np.linalg.norm(rows, axis=1, keepdims=True)) > 0, norm, 1)
                for rows in (x, queries)
            )
        return queries @ x.T

    def check(self, worker, x, k, metric, queries=None, tolerance=None):
        values, indices = self.search(worker, x, k, metric, queries)
        scores = self.scores(x, x if queries is None else queries, metric)
        if queries is None:
            np.fill_diagonal(scores, -np.inf)
            assert (indices != np.arange(len(x))[:, None]).all()
        best = -np.sort(-scores, axis=1)[:, :k]
        tolerance = tolerance or (1e-5 if x.dtype == np.float32 else 1e-12)
        chosen = np.take_along_axis(scores, indices, 1)
        np.testing.assert_allclose(chosen, best, atol=tolerance, rtol=tolerance)
        np.testing.assert_allclose(-values if metric == "euclidean" else values, chosen, atol=tolerance, rtol=tolerance)
        assert all(len(set(row)) == k for row in indices.tolist())
        return indices

    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("n", "m", "k", "d"), [(2, None, 1, 1), (65, None, 5, 3), (130, 3, 129, 17), (300, 70, 1, 2), (129, 1, 7, 33)]
    )
    def test_search(self, worker, rng, dtype, metric, n, m, k, d):
        x = rng.normal(size=(n, d)).astype(dtype)
        queries = None if m is None else rng.normal(size=(m, d)).astype(dtype)
        if n > 2:
            x[1] = 0
        self.check(worker, x, k, metric, queries)

    def test_lists_fill_up(self, worker, rng):
        x = np.sort(rng.random(400).astype(np.float32))[:, None]
        self.check(worker, x, 2, "inner_product", np.ones((65, 1), np.float32))

    @pytest.mark.parametrize("metric", ["inner_product", "euclidean"])
    def test_margins_that_halves_do_not_see(self, worker, rng, metric):
        """Scores closer than halves can tell apart: without its bound the filter would drop some of the best."""
        x = (rng.normal(size=16) + 2e-3 * rng.normal(size=(400, 16))).astype(np.float32)
        x[0] += 1  # where euclidean takes its shift
        self.check(
            worker, x, 20, metric, x[1:130] * np.float32(1.001), tolerance=1e-6
        )  # two tiles of queries, no splits

    @pytest.mark.parametrize("metric", METRICS)
    def test_ties_go_to_the_lowest_index(self, worker, rng, metric):
        x = np.repeat(rng.integers(-2, 3, size=(6, 4)), 40, axis=0)[rng.permutation(240)].astype(np.float32)
        x[:, 0] = 4
        _, indices = self.search(worker, x, 50, metric, x[:5])
        if metric == "cosine":
            x /= np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True).astype(np.float32)
        scores = self.scores(x, x[:5], "inner_product" if metric == "cosine" else metric).round(5)
        expected = np.lexsort((np.broadcast_to(np.arange(240), scores.shape), -scores))[:, :50]
        np.testing.assert_array_equal(indices, expected)

    @pytest.mark.parametrize("symmetrize", SYMMETRIZE)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("n", "k", "power"), [(2, 1, 1.0), (40, 7, 3.0), (90, 33, 0.5)])
    def test_graph(self, worker, rng, dtype, symmetrize, n, k, power):
        indices = np.stack([rng.permutation(np.delete(np.arange(n), i))[:k] for i in range(n)])
        if n > 2:
            indices[:, 0] = 0  # a hub
            indices[0, 0] = 1
            indices[:, 1:] = np.where(indices[:, 1:] == indices[:, :1], (indices[:, :1] + 1) % n, indices[:, 1:])
            indices = np.stack([self.distinct(row, i, n) for i, row in enumerate(indices)])
        similarities = rng.uniform(-0.3, 1, size=(n, k)).astype(dtype)
        crow, col, weights = call(
            worker,
            "knn_graph",
            similarities,
            [n, k, SYMMETRIZE.index(symmetrize)],
            [power],
            [similarities, indices],
            [np.int64, np.int64, dtype],
        )
        w = np.zeros((n, n))
        np.put_along_axis(w, indices, np.maximum(similarities.astype(np.float64), 0) ** power, 1)
        whole = {"none": w, "sum": w + w.T, "mean": (w + w.T) / 2, "max": np.maximum(w, w.T)}[symmetrize]
        expected = scipy.sparse.csr_array(whole)
        np.testing.assert_array_equal(crow, expected.indptr)
        np.testing.assert_array_equal(col, expected.indices)
        np.testing.assert_allclose(weights, expected.data, rtol=1e-5)

    @staticmethod
    def distinct(row, own, n):
        """`row` with repeated entries replaced by the next free one."""
        taken = {own}
        out = []
        for j in row:
            while j in taken:
                j = (j + 1) % n
            taken.add(j)
            out.append(j)
        return out
