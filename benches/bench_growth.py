"""How k-means and the neighbour search grow with the rows, and what a second thread is worth. Only with --full."""

import pytest
import torch
from bench_kmeans import unit_blobs
from bench_knn import unit_rows

import fastclust

KMEANS_ROWS = [10_000, 100_000, 1_000_000]
KNN_ROWS = [5_000, 20_000, 50_000, 200_000]


@pytest.fixture(autouse=True)
def _only_full(full):
    if not full:
        pytest.skip("--full only")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("n", KMEANS_ROWS)
def test_kmeans_rows(benchmark, n):
    x = unit_blobs(n, 128, 50)
    benchmark.group = f"growth: k-means {n} x 128, K = 100, 10 iterations"
    benchmark.name = "fastclust"
    benchmark.extra_info["multiply-adds"] = n * 100 * 128 * 10
    benchmark.pedantic(lambda: fastclust.kmeans(x, 100, init=x[:100], max_iter=10), rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("n", KNN_ROWS)
def test_knn_rows(benchmark, n):
    x = unit_rows("features", n, 128)
    benchmark.group = f"growth: kNN {n} x 128, k = 50"
    benchmark.name = "fastclust"
    benchmark.extra_info["multiply-adds"] = n * n * 128
    benchmark.pedantic(lambda: fastclust.knn(x, 50), rounds=1 if n > 100_000 else 3, warmup_rounds=n <= 100_000)


@pytest.mark.parametrize("count", [1, 2])
def test_kmeans_threads(benchmark, measure, threads, count):
    threads(count)
    x = unit_blobs(200_000, 128, 50)
    benchmark.group = f"threads: k-means 200000 x 128, K = 100, 10 iterations, {count}"
    benchmark.name = "fastclust"
    measure(lambda: fastclust.kmeans(x, 100, init=x[:100], max_iter=10))


@pytest.mark.parametrize("count", [1, 2])
def test_knn_threads(benchmark, measure, threads, count):
    threads(count)
    x = unit_rows("features", 50_000, 128)
    benchmark.group = f"threads: kNN 50000 x 128, k = 50, {count}"
    benchmark.name = "fastclust"
    measure(lambda: fastclust.knn(x, 50))
