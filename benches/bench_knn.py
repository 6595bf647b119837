"""Exact neighbours beside faiss's flat index, and the graph beside its neighbours: one answer, then the time.

    pytest benches/bench_knn.py            a few seconds
    pytest benches/bench_knn.py --full     the sizes of docs/results

"features" are overlapping clusters of unit vectors, as a network gives them; "noise" has no structure, the hard case.
FASTCLUST_CPU_CAPABILITY chooses our kernels. faiss's OpenBLAS does not know every virtual CPU and then runs several
times slower than it can: OPENBLAS_VERBOSE=2 tells what it takes the CPU for, OPENBLAS_CORETYPE=SkylakeX sets it where
there is AVX-512.
"""

import pytest
import torch

import fastclust

faiss = pytest.importorskip("faiss")

#: n, d, k
QUICK = [(5000, 64, 20)]
FULL = [(50_000, 128, 50), (20_000, 512, 100)]


def unit_rows(kind: str, n: int, d: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator)
    if kind == "features":
        x += torch.randn(100, d, generator=generator)[torch.randint(100, (n,), generator=generator)]
    return torch.nn.functional.normalize(x, dim=1)


def run_fastclust(x: torch.Tensor, k: int) -> torch.Tensor:
    return fastclust.knn(x, k).values


def run_faiss(x: torch.Tensor, k: int) -> torch.Tensor:
    """Each row finds itself first; its column is left out."""
    index = faiss.IndexFlatIP(x.shape[1])
    index.add(x.numpy())
    return torch.from_numpy(index.search(x.numpy(), k + 1)[0])[:, 1:]


def run_graph(x: torch.Tensor, k: int) -> torch.Tensor:
    return fastclust.knn_graph(x, k).values()


RUNNERS = {"fastclust": run_fastclust, "faiss": run_faiss, "fastclust graph": run_graph}


@pytest.fixture(scope="session")
def sizes(full: bool) -> list[tuple[int, int, int]]:
    return FULL if full else QUICK


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("kind", ["features", "noise"])
@pytest.mark.parametrize("size", range(len(FULL)))
def test_knn(benchmark, measure, sizes, size, kind, runner):
    if size >= len(sizes):
        pytest.skip("--full")
    n, d, k = sizes[size]
    x = unit_rows(kind, n, d)
    if runner == "faiss":
        assert (run_fastclust(x, k) - run_faiss(x, k)).abs().max() < 1e-5
    benchmark.group = f"kNN {n} x {d}, k = {k}, {kind}"
    benchmark.name = runner
    benchmark.extra_info["multiply-adds"] = n * n * d
    measure(RUNNERS[runner], x, k)
