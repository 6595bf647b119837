"""fp16 and bf16 rows on CUDA: read as they are, without a copy in float32, and with its answers to the bit."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastclust

HALVES = [torch.float16, torch.bfloat16]
METRICS = ["cosine", "inner_product", "euclidean"]

on_cuda = pytest.mark.parametrize("device", ["cuda"], indirect=True)
pytestmark = pytest.mark.parametrize("dtype", HALVES)


class Listener(TorchDispatchMode):
    """Notes which ops are called with rows of which dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[tuple[str, torch.dtype]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.heard.append(
            (str(func).removesuffix(".default"), args[0].dtype if args and isinstance(args[0], torch.Tensor) else None)
        )
        return func(*args, **(kwargs or {}))


def dtypes_of_rows(call, dtype: torch.dtype, device: str) -> tuple[dict[str, torch.dtype], object]:
    """What each op of fastclust is given for x, and what comes out, without a GPU."""
    with FakeTensorMode(), Listener() as listener:
        out = call(torch.empty(60, 20, dtype=dtype, device=device))
    return {op.removeprefix("fastclust."): dtype for op, dtype in listener.heard if op.startswith("fastclust")}, out


@pytest.mark.parametrize(("device", "kept"), [("cuda", True), ("cpu", False)])
def test_rows_reach_the_ops_as_they_are(dtype, device, kept):
    given = dtype if kept else torch.float32
    heard, result = dtypes_of_rows(lambda x: fastclust.kmeans(x, 3, init="k-means++", max_iter=2), dtype, device)
    assert heard == {"kmeans_plus_plus": given, "kmeans_lloyd": given}
    assert (result.centroids.dtype, result.inertia.dtype) == (torch.float32, torch.float32)
    heard, result = dtypes_of_rows(lambda x: fastclust.kmeans_assign(x, x[:4].float()), dtype, device)
    assert heard == {"kmeans_assign": given}
    assert result.distances.dtype == torch.float32
    for queries in (None, slice(0, 7)):
        heard, result = dtypes_of_rows(
            lambda x, queries=queries: fastclust.knn(x, 3, queries=None if queries is None else x[queries]),
            dtype,
            device,
        )
        assert heard == {"knn": given}
        assert result.values.dtype == torch.float32
    heard, _ = dtypes_of_rows(lambda x: fastclust.knn(x, 3, queries=x.float()), dtype, device)
    assert heard == {"knn": torch.float32}, "queries of another dtype: both in float32"


def test_the_cpu_ops_refuse_them(dtype):
    x = torch.zeros(4, 2, dtype=dtype)
    with pytest.raises((RuntimeError, ValueError), match="knn: x must be float32 or float64"):  # by torch's version
        torch.ops.fastclust.knn(x, None, 1, "euclidean", True)


def views(dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """Contiguous, from an odd offset, and with strides that no kernel reads."""
    wide = torch.randn(301, 41, device=device).to(dtype)
    return [wide, wide[1:], wide[:, 1:34], wide.T, wide[::2, ::3]]


@on_cuda
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_kmeans(device, dtype, precision):
    for x in views(dtype, device):
        options = {"n_init": 2, "max_iter": 5, "tol": 1e-4, "precision": precision, "seed": 0}
        for got, want in zip(fastclust.kmeans(x, 9, **options), fastclust.kmeans(x.float(), 9, **options), strict=True):
            assert torch.equal(got, want)
        for got, want in zip(
            fastclust.kmeans_assign(x, x[:7].float()), fastclust.kmeans_assign(x.float(), x[:7].float()), strict=True
        ):
            assert torch.equal(got, want)


@on_cuda
def test_spherical_and_constrained_kmeans(device, dtype):
    x = torch.randn(300, 20, device=device).to(dtype)
    labels = torch.where(torch.rand(300, device=device) < 0.2, 1, -1)
    options = {"spherical": True, "labels": labels, "sample_weight": torch.rand(300, device=device), "seed": 0}
    for got, want in zip(fastclust.kmeans(x, 5, **options), fastclust.kmeans(x.float(), 5, **options), strict=True):
        assert torch.equal(got, want)


@on_cuda
@pytest.mark.parametrize("metric", METRICS)
def test_knn(device, dtype, metric):
    for x in views(dtype, device):
        for queries in (None, x[3:30]):
            got = fastclust.knn(x, 8, metric=metric, queries=queries)
            want = fastclust.knn(x.float(), 8, metric=metric, queries=None if queries is None else queries.float())
            assert torch.equal(got.values, want.values)
            assert torch.equal(got.indices, want.indices)


@on_cuda
def test_bad_rows_are_told(device, dtype):
    x = torch.randn(50, 4, device=device).to(dtype)
    x[17, 2] = torch.inf
    with pytest.raises(ValueError, match="kmeans_assign: x holds 1 row that is not finite, at 17"):
        fastclust.kmeans_assign(x, x[:3].float())


@on_cuda
def test_no_copy_of_the_rows_in_float32(device, dtype):
    """Beside the rows: a scaled half of each element, O(N), and kNN's lists (70 MB on 132 processors)."""
    x = torch.randn(800_000, 256, device=device).to(dtype)
    copy = 4 * x.numel()
    for call in (
        lambda: fastclust.kmeans_assign(x, x[:8].float()),
        lambda: fastclust.knn(x, 3, queries=x[:8], metric="euclidean"),
    ):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        assert torch.cuda.max_memory_allocated() - before < 0.75 * copy


@on_cuda
def test_compiled_and_under_autocast(device, dtype):
    x = torch.randn(200, 20, device=device).to(dtype)
    want = fastclust.kmeans_assign(x, x[:5].float())
    compiled = torch.compile(lambda x, c: fastclust.kmeans_assign(x, c).labels, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, x[:5].float()), want.labels)
    with torch.autocast("cuda", dtype=dtype):
        assert torch.equal(fastclust.kmeans_assign(x, x[:5].float()).labels, want.labels)
        assert torch.equal(fastclust.knn(x, 3).indices, fastclust.knn(x.float(), 3).indices)
