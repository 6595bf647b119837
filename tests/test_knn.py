"""fastclust.knn against its float64 twin, and at the edges."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastclust
from fastclust import ops, reference

METRICS = ["cosine", "inner_product", "euclidean"]
DTYPES = [torch.float32, torch.float64]


def clusters(n, d, *, spread=1.0, n_clusters=8, seed=0, dtype=torch.float32):
    """Overlapping clusters of unit vectors, as a network's features are."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.nn.functional.normalize(torch.randn(n_clusters, d, generator=generator, dtype=dtype), dim=1)
    noise = torch.randn(n, d, generator=generator, dtype=dtype) * (spread / d**0.5)
    return torch.nn.functional.normalize(centres[torch.arange(n) % n_clusters] + noise, dim=1)


def scores_of(x, queries, metric):
    """The whole matrix of scores in float64, higher is better."""
    x, rows = x.double(), (x if queries is None else queries).double()
    values, indices = reference.knn(x, rows, x.shape[0], metric, True)
    scores = torch.empty_like(values).scatter_(1, indices, -values if metric == "euclidean" else values)
    return scores.fill_diagonal_(-torch.inf) if queries is None else scores


def check(x, k, metric, queries=None):
    """The values are the best k scores, and each index has its value: both to the rounding of the dtype."""
    values, indices = fastclust.knn(x, k, queries=queries, metric=metric)
    scores = scores_of(x.cpu(), None if queries is None else queries.cpu(), metric)
    assert values.shape == indices.shape == (scores.shape[0], k)
    assert values.dtype == x.dtype
    assert indices.dtype == torch.int64
    sign = -1 if metric == "euclidean" else 1
    values, indices = values.cpu().double() * sign, indices.cpu()
    best = scores.topk(k, dim=1).values
    scale = x.double().norm(dim=1).max().item() if metric != "cosine" else 1.0
    scale = scale**2 if metric == "inner_product" else scale
    tolerance = 8 * x.shape[1] ** 0.5 * torch.finfo(x.dtype).eps * max(scale, 1e-300)
    assert (values - best).abs().max() <= tolerance
    assert (values - scores.gather(1, indices)).abs().max() <= tolerance
    assert (values.diff(dim=1) <= 0).all()
    assert all(row.unique().numel() == k for row in indices)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("n", "d", "k"), [(2, 1, 1), (33, 3, 32), (300, 1, 7), (1797, 64, 50), (2500, 130, 20), (700, 600, 9)]
)
def test_self_graph_matches_the_reference(device, dtype, metric, n, d, k):
    x = clusters(n, d, dtype=dtype) + (5.0 if metric == "euclidean" else 0.1)
    check(x.to(device), k, metric)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "m", "d", "k"), [(1, 1, 1, 1), (50, 3, 4, 50), (1500, 1, 40, 5), (700, 333, 20, 30)])
def test_queries_match_the_reference(device, dtype, metric, n, m, d, k):
    x, queries = clusters(n, d, dtype=dtype, seed=1), clusters(m, d, dtype=dtype, seed=2) * 1.5
    check(x.to(device), k, metric, queries.to(device))


@pytest.mark.parametrize("metric", METRICS)
def test_neighbours_are_the_reference_s_own(metric):
    """Where scores differ by more than rounding, the indices have to agree: here they all do, in float64."""
    x = clusters(900, 48, dtype=torch.float64)
    assert torch.equal(fastclust.knn(x, 40, metric=metric).indices, reference.knn(x, None, 40, metric, True)[1])


@given(
    n=st.integers(2, 90),
    d=st.integers(1, 40),
    share=st.floats(0, 1),
    metric=st.sampled_from(METRICS),
    kind=st.sampled_from(["normal", "grid", "duplicates", "scaled"]),
    seed=st.integers(0, 1000),
)
def test_any_shape(n, d, share, metric, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    if kind == "grid":
        x = x.round()
    elif kind == "duplicates":
        x = x[torch.randint(0, max(1, n // 4), (n,), generator=generator)]
    elif kind == "scaled":
        x = x * torch.logspace(-3, 3, n, dtype=torch.float64)[:, None]
    check(x, 1 + int(share * (n - 2)), metric)
    check(x.float(), 1 + int(share * (n - 1)), metric, queries=x[: n // 2 + 1].float() + 0.25)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_lowest_index(device, metric, dtype):
    """Small integers have exact scores, and the cosines of equal rows are one number: the index alone decides."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(0, 2, (1500, 6), generator=generator).to(dtype)
    values, indices = (t.cpu() for t in fastclust.knn(x.to(device), 60, metric=metric))
    if metric == "cosine":
        tied = values[:, 1:] == values[:, :-1]
        assert (indices.diff(dim=1)[tied] > 0).all()
    else:
        assert torch.equal(indices, reference.knn(x.double(), None, 60, metric, True)[1])


def test_all_rows_equal(device):
    n, k = 3000, 12
    values, indices = fastclust.knn(torch.full((n, 5), 0.3, device=device), k, metric="euclidean")
    lowest = torch.arange(k + 1, device=device)
    expected = torch.stack([lowest[lowest != i][:k] for i in range(n)])
    assert torch.equal(indices, expected)
    assert (values == 0).all()


def test_zero_rows_have_similarity_zero(device):
    x = clusters(200, 16).to(device)
    x[[3, 77]] = 0
    values, indices = fastclust.knn(x, 199)
    assert (values[[3, 77]] == 0).all()
    assert torch.equal(indices[3], torch.arange(200, device=device)[torch.arange(200, device=device) != 3])
    assert (values[indices == 3] == 0).all()
    assert not values.isnan().any()


def test_duplicates_of_a_row_are_its_neighbours(device):
    x = clusters(400, 32).to(device)
    x[200] = x[10]
    indices = fastclust.knn(x, 3).indices
    assert indices[10, 0] == 200
    assert indices[200, 0] == 10


def test_sorted_data_does_not_mislead_the_first_guess():
    """Rows in order of cluster, or in a period: the sample that sets a row's first floor is none of its own alone."""
    x = clusters(4096, 24, n_clusters=16, spread=0.2)
    for order in (torch.arange(4096), torch.arange(4096).view(-1, 16).T.reshape(-1)):
        check(x[order].contiguous(), 30, "cosine")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["even", "uneven", "tight", "duplicates", "far from the origin"])
def test_rows_in_clusters(device, dtype, metric, kind):
    """Enough rows for the search to order them by clusters of its own; most neighbours are within one, some are not."""
    generator = torch.Generator().manual_seed(5)
    n, d = 2900, 50
    shares = torch.tensor([0.5, 0.25, 0.1, 0.05] + [0.1 / 20] * 20) if kind == "uneven" else torch.ones(24)
    labels = torch.multinomial(shares, n, replacement=True, generator=generator)
    x = torch.randn(n, d, generator=generator, dtype=dtype) * (1e-3 if kind == "tight" else 0.5)
    x = x * torch.linspace(2, 0.1, d, dtype=dtype) + torch.randn(24, d, generator=generator, dtype=dtype)[labels]
    if kind == "duplicates":
        x[n // 2 :] = x[torch.randint(0, n // 2, (n - n // 2,), generator=generator)]
    elif kind == "far from the origin":
        x = x + 100
    check(x.to(device), 30, metric)


@pytest.mark.parametrize("n_threads", [1, 3])
def test_clusters_and_threads_do_not_change_the_answer(n_threads):
    """What is found depends on no clustering: rows in another order have the same neighbours."""
    x = clusters(6000, 40, n_clusters=10, spread=0.7, dtype=torch.float64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    values, indices = fastclust.knn(x, 25)
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        moved = fastclust.knn(x[order], 25)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(moved.values, values[order], rtol=0, atol=1e-13)
    assert torch.equal(order[moved.indices], indices[order])


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e15, 1e18])
def test_scale_does_not_matter(scale):
    x = clusters(300, 12)
    plain, scaled = fastclust.knn(x, 9), fastclust.knn(x * scale, 9)
    assert torch.equal(plain.indices, scaled.indices)
    for metric, factor in (("euclidean", scale), ("inner_product", scale * scale)):
        if torch.finfo(torch.float32).tiny < factor < 1e38:
            plain, scaled = fastclust.knn(x, 9, metric=metric), fastclust.knn(x * scale, 9, metric=metric)
            torch.testing.assert_close(plain.values, scaled.values / factor, rtol=1e-4, atol=1e-5)


def test_near_points_far_from_the_origin():
    """|x|² + |y|² - 2 x·y would lose all digits of these distances."""
    x = torch.randn(500, 3) * 1e-3 + 100
    values, _ = fastclust.knn(x, 5, metric="euclidean")
    expected, _ = reference.knn(x.double(), None, 5, "euclidean", True)
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=0)


def test_rows_of_very_different_norms():
    x = clusters(600, 40) * torch.logspace(-4, 4, 600)[torch.randperm(600)][:, None]
    for metric in METRICS:
        check(x, 20, metric)


def test_strides_and_offsets(device):
    wide = torch.randn(120, 40, device=device)
    for view in (wide[:, 3:20], wide[::2], wide.T, wide[5:, ::3]):
        assert torch.equal(fastclust.knn(view, 5).indices, fastclust.knn(view.contiguous(), 5).indices)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(device, dtype):
    x = clusters(150, 16).to(device, dtype)
    values, indices = fastclust.knn(x, 6)
    expected = fastclust.knn(x.float(), 6)
    assert values.dtype == torch.float32
    assert torch.equal(values, expected.values)
    assert torch.equal(indices, expected.indices)


def test_fast_keeps_the_values_of_what_it_finds():
    x = clusters(3000, 96)
    exact, fast = fastclust.knn(x, 25), fastclust.knn(x, 25, precision="fast")
    assert (exact.indices == fast.indices).float().mean() > 0.999


def test_empty_batches(device):
    x = torch.randn(10, 3, device=device)
    assert fastclust.knn(x, 4, queries=x[:0]).indices.shape == (0, 4)
    assert fastclust.knn(x[:0], 4).values.shape == (0, 4)


def test_threads_do_not_change_the_result():
    x = clusters(3000, 48)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = fastclust.knn(x, 30)
        torch.set_num_threads(3)
        three = fastclust.knn(x, 30)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one.values, three.values)
    assert torch.equal(one.indices, three.indices)


@pytest.mark.parametrize("queries", [False, True])
def test_opcheck(device, queries):
    x = clusters(60, 8).to(device)
    torch.library.opcheck(torch.ops.fastclust.knn, (x, x[:7] if queries else None, 5, "cosine", True))


def test_compiles(device):
    x = clusters(200, 16).to(device)
    compiled = torch.compile(lambda x: fastclust.knn(x * 2, 5, metric="euclidean"), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x).indices, fastclust.knn(x * 2, 5, metric="euclidean").indices)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: fastclust.knn(x, 20), ValueError, "knn: k must be below the 20 rows of x, got 20"),
        (lambda x: fastclust.knn(x, 21, queries=x), ValueError, "knn: k must be at most the 20 rows of x, got 21"),
        (lambda x: fastclust.knn(x, 0), ValueError, "knn: k must be at least 1, got 0"),
        (lambda x: fastclust.knn(x, 2.0), TypeError, "knn: k must be an int, got float"),
        (
            lambda x: fastclust.knn(x, 2, metric="manhattan"),
            ValueError,
            "knn: metric must be one of .* got 'manhattan'",
        ),
        (lambda x: fastclust.knn(x, 2, precision="low"), ValueError, "knn: precision must be one of"),
        (lambda x: fastclust.knn(x[0], 2), ValueError, "knn: x must have 2 dimensions"),
        (lambda x: fastclust.knn(x[:, :0], 2), ValueError, "knn: x has rows of no features"),
        (lambda x: fastclust.knn(x.long(), 2), TypeError, "knn: x must have a floating-point dtype"),
        (lambda x: fastclust.knn([[1.0]], 2), TypeError, r"knn: x must be a torch\.Tensor"),
        (lambda x: fastclust.knn(x, 2, queries=x[:, :3]), ValueError, r"knn: queries must be \(M, 4\), got \(20, 3\)"),
        (lambda x: fastclust.knn(x, 2, queries=x.double()), ValueError, "knn: queries must have the dtype"),
        (lambda x: fastclust.knn(x.log(), 2), ValueError, "knn: x holds 20 rows that are not finite, first at 0"),
        (lambda x: fastclust.knn(x, 2, queries=x / 0), ValueError, "knn: queries holds 20 rows that are not finite"),
        (lambda x: ops.knn(x, None, 2, "l1", True), ValueError, "knn: metric must be"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call(-torch.rand(20, 4) - 0.5)
