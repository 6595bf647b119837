"""fastclust.knn_graph: weights, symmetrisation and layout against the dense twin."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastclust
from fastclust import ops, reference

SYMMETRIZATIONS = ["sum", "mean", "max", "none"]


def random_lists(n, k, dtype=torch.float64, seed=0):
    """Similarities in [-0.2, 1] and k distinct neighbours per row, none itself."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(n, n, generator=generator, dtype=torch.float64).fill_diagonal_(2).argsort(1)
    similarities = torch.rand(n, k, generator=generator, dtype=dtype) * 1.2 - 0.2
    similarities[similarities.abs() < 1e-3] = 0  # its powers do not vanish in float32
    return similarities, order[:, :k].contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("symmetrize", SYMMETRIZATIONS)
@pytest.mark.parametrize("power", [1.0, 2.5, 3.0, 9.0])
def test_csr_matches_the_reference(device, dtype, symmetrize, power):
    similarities, indices = random_lists(130, 17, dtype)
    crow, col, weights = (
        t.cpu() for t in ops.knn_to_csr(similarities.to(device), indices.to(device), power, symmetrize)
    )
    expected = reference.knn_to_csr(similarities.double(), indices, power, symmetrize)
    assert torch.equal(crow, expected[0])
    assert torch.equal(col, expected[1])
    torch.testing.assert_close(weights.double(), expected[2], rtol=8 * torch.finfo(dtype).eps, atol=0)


@given(
    n=st.integers(2, 60), share=st.floats(0, 1), symmetrize=st.sampled_from(SYMMETRIZATIONS), seed=st.integers(0, 99)
)
def test_any_shape(n, share, symmetrize, seed):
    similarities, indices = random_lists(n, 1 + int(share * (n - 2)), seed=seed)
    for got, expected in zip(
        ops.knn_to_csr(similarities, indices, 3.0, symmetrize),
        reference.knn_to_csr(similarities, indices, 3.0, symmetrize),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("symmetrize", ["sum", "max"])
def test_many_rows_that_all_name_one(device, symmetrize):
    n = 9001
    offsets = torch.tensor([1, n // 2, n - 1])
    indices = torch.cat([(torch.arange(n)[:, None] + offsets) % n, torch.full((n, 1), 4711)], dim=1)
    similarities = torch.rand(n, 4, dtype=torch.float64) + 0.1
    similarities[(indices == 4711).cumsum(1) > 1] = 0  # named once already
    crow, col, weights = ops.knn_to_csr(similarities.to(device), indices.to(device), 2.0, symmetrize)
    rows = torch.arange(n).repeat_interleave(4)
    w = torch.sparse_coo_tensor(torch.stack([rows, indices.flatten()]), similarities.flatten() ** 2, (n, n)).coalesce()
    expected = (w + w.T).coalesce() if symmetrize == "sum" else greater(w, w.T.coalesce())
    kept = expected.values() > 0
    assert torch.repeat_interleave(torch.arange(n), crow.diff().cpu()).equal(expected.indices()[0][kept])
    assert col.cpu().equal(expected.indices()[1][kept])
    torch.testing.assert_close(weights.cpu(), expected.values()[kept], rtol=1e-14, atol=0)


def greater(a, b):
    """max(a, b) of sparse matrices that are not negative: (a + b + |a - b|) / 2."""
    return ((a + b + (a - b).coalesce().abs()) / 2).coalesce()


@pytest.mark.parametrize("symmetrize", SYMMETRIZATIONS)
@pytest.mark.parametrize("metric", ["cosine", "inner_product", "euclidean"])
def test_graph_is_what_it_says(device, symmetrize, metric):
    x = torch.randn(400, 12, dtype=torch.float64, device=device)
    graph = fastclust.knn_graph(x, 15, metric=metric, symmetrize=symmetrize)
    assert graph.layout == torch.sparse_csr
    assert graph.shape == (400, 400)
    torch._validate_sparse_csr_tensor_args(graph.crow_indices(), graph.col_indices(), graph.values(), graph.shape)
    values, indices = reference.knn(x.cpu(), None, 15, metric, True)
    if metric == "euclidean":
        values = torch.exp(-(values**2) / (values[:, -1:] * values[:, -1][indices]))
    expected = torch.sparse_csr_tensor(*reference.knn_to_csr(values, indices, 3.0, symmetrize), (400, 400)).to_dense()
    dense = graph.to_dense().cpu()
    torch.testing.assert_close(dense, expected, rtol=1e-9, atol=1e-12)
    assert (dense.diagonal() == 0).all()
    assert (graph.values() > 0).all()
    if symmetrize != "none":
        assert torch.equal(dense, dense.T)


def test_zero_weights_are_not_stored(device):
    """Two opposite pairs: each point's second neighbour is orthogonal or opposite and drops out."""
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]], device=device)
    graph = fastclust.knn_graph(x, 2, symmetrize="none")
    assert graph.crow_indices().tolist() == [0, 1, 2, 3, 4]
    assert graph.col_indices().tolist() == [1, 0, 3, 2]
    assert graph.values().tolist() == [1, 1, 1, 1]
    empty = fastclust.knn_graph(torch.eye(5, device=device), 3)
    assert empty.values().numel() == 0
    assert empty.crow_indices().tolist() == [0] * 6


def test_duplicates_under_the_self_tuning_kernel(device):
    """σ = 0 where a row has k duplicates: their weight is one, and nothing is NaN."""
    x = torch.cat([torch.zeros(6, 3), torch.randn(30, 3)]).to(device)
    graph = fastclust.knn_graph(x, 4, metric="euclidean", symmetrize="none")
    dense = graph.to_dense()
    assert not dense.isnan().any()
    assert (dense[:6].sum(1) == 4).all()


def test_half_precision_becomes_float32(device):
    assert fastclust.knn_graph(torch.randn(50, 4, device=device).half(), 5).dtype == torch.float32


def test_threads_do_not_change_the_result():
    x = torch.randn(1500, 20)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = fastclust.knn_graph(x, 20)
        torch.set_num_threads(3)
        three = fastclust.knn_graph(x, 20)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one.col_indices(), three.col_indices())
    assert torch.equal(one.values(), three.values())


def test_no_rows(device):
    graph = fastclust.knn_graph(torch.randn(0, 3, device=device), 4)
    assert graph.shape == (0, 0)


def test_opcheck(device):
    similarities, indices = (t.to(device) for t in random_lists(30, 4))
    torch.library.opcheck(torch.ops.fastclust.knn_to_csr, (similarities, indices, 3.0, "sum"))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: fastclust.knn_graph(x, 3, symmetrize="half"), ValueError, "knn_graph: symmetrize must be one of"),
        (lambda x: fastclust.knn_graph(x, 3, metric="l1"), ValueError, "knn_graph: metric must be one of"),
        (lambda x: fastclust.knn_graph(x, 3, power=0.0), ValueError, "knn_graph: power must be positive and finite"),
        (lambda x: fastclust.knn_graph(x, 3, power=float("nan")), ValueError, "knn_graph: power must be positive"),
        (lambda x: fastclust.knn_graph(x, 20), ValueError, "k must be below the 20 rows of x, got 20"),
        (lambda x: fastclust.knn_graph(x.int(), 3), TypeError, "knn_graph: x must have a floating-point dtype"),
        (
            lambda x: ops.knn_to_csr(x, x.long() + 30, 3.0, "sum"),
            ValueError,
            r"knn_graph: indices must be in \[0, N\)",
        ),
        (lambda x: ops.knn_to_csr(x, x[:3].long(), 3.0, "sum"), ValueError, r"knn_graph: indices must be \(20, 4\)"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.rand(20, 4) + 0.5)
