"""Diffusion and the pseudo-labels made from it, against dense float64 solves, and at the edges."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastclust
from fastclust import ops, reference

warnings.filterwarnings("ignore", message="Sparse")
DTYPES = [torch.float32, torch.float64]


def random_graph(n: int, degree: float, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """A symmetric CSR graph whose weights differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    there = torch.rand(n, n, generator=generator) < degree / n
    w = torch.where(there, torch.rand(n, n, dtype=torch.float64, generator=generator) ** 4, 0.0).triu(1)
    return (w + w.T).to(dtype).to_sparse_csr()


def ring_of_cliques(cliques: int, size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Cliques joined by one weak edge each: what little passes between them takes CG many steps."""
    n = cliques * size
    w = torch.block_diag(*[torch.ones(size, size, dtype=torch.float64)] * cliques)
    for c in range(cliques):
        a, b = c * size, (c * size + size + 1) % n
        w[a, b] = w[b, a] = 1e-3
    w.fill_diagonal_(0)
    return w.to(dtype).to_sparse_csr()


def parts(graph: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return graph.crow_indices(), graph.col_indices(), graph.values()


def system_matrix(graph: Tensor, alpha: float) -> Tensor:
    w = graph.to_dense().double()
    degree = w.sum(1)
    scale = torch.where(degree > 0, degree, 1.0).rsqrt()
    return torch.eye(len(w), dtype=torch.float64) - alpha * scale[:, None] * w * scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 2, 3, 5, 9, 17, 32, 33, 100])
def test_solves_the_system(columns, dtype, device):
    graph = random_graph(257, 12, dtype)
    y = torch.randn(257, columns, dtype=dtype)
    result = fastclust.diffuse(graph.to(device), y.to(device), tol=0.0, max_iter=100)
    assert result.f.device.type == device
    expected = torch.linalg.solve(system_matrix(graph, 0.99), y.double())
    limit = 2e-5 if dtype == torch.float32 else 1e-12
    assert (result.f.cpu() - expected).norm() <= limit * expected.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_iter", [0, 1, 4, 20])
def test_takes_the_steps_of_conjugate_gradients(max_iter, dtype, device):
    graph = ring_of_cliques(11, 13, dtype)
    y = torch.randn(143, 7, dtype=dtype)
    y[:, 3] = 0
    f, residual, n_iter = fastclust.diffuse(graph.to(device), y.to(device), max_iter=max_iter)
    twin_f, twin_residual, twin_n_iter = reference.diffuse(
        *(part.double() if part.is_floating_point() else part for part in parts(graph)),
        y.double(),
        0.99,
        1e-6,
        max_iter,
    )
    limit = 1e-5 if dtype == torch.float32 else 1e-12
    assert (f.cpu() - twin_f).norm() <= limit * twin_f.norm()
    assert torch.allclose(
        residual.cpu().double(), twin_residual, rtol=1e-3, atol=1e-5 if dtype == torch.float32 else 1e-9
    )
    assert (n_iter.cpu() - twin_n_iter).abs().max() <= (1 if dtype == torch.float32 else 0)
    assert n_iter[3] == 0
    assert residual[3] == 0
    assert (f[:, 3] == 0).all()


def test_residual_is_that_of_the_answer(device):
    graph, y = ring_of_cliques(20, 10, torch.float32), torch.randn(200, 4)
    for max_iter in (3, 20, 200):
        f, residual, _ = fastclust.diffuse(graph.to(device), y.to(device), max_iter=max_iter)
        true = (y.double() - system_matrix(graph, 0.99) @ f.cpu().double()).norm(dim=0) / y.double().norm(dim=0)
        assert torch.allclose(residual.cpu().double(), true, rtol=1e-2, atol=2e-6)


def test_columns_stop_by_themselves(device):
    graph = ring_of_cliques(30, 8).to(device)
    y = torch.randn(240, 3, dtype=torch.float64, device=device)
    matrix = system_matrix(graph.cpu(), 0.99)
    y[:, 1] = torch.linalg.eigh(matrix).eigenvectors[:, 5].to(device)  # an eigenvector takes one step
    together = fastclust.diffuse(graph, y, tol=1e-9, max_iter=300)
    assert together.n_iter[1] == 1
    assert together.n_iter[0] > 5
    assert (together.residual < 1e-8).all()
    for column in range(3):
        alone = fastclust.diffuse(graph, y[:, column : column + 1], tol=1e-9, max_iter=300)
        assert alone.n_iter[0] == together.n_iter[column]
        assert torch.allclose(alone.f[:, 0], together.f[:, column], rtol=1e-9, atol=1e-9)


def test_alpha_zero_returns_y(device):
    y = torch.randn(50, 3, device=device)
    result = fastclust.diffuse(random_graph(50, 5, torch.float32).to(device), y, alpha=0.0)
    assert torch.equal(result.f, y)
    assert (result.n_iter == 1).all()


@pytest.mark.parametrize("size", [1, 6])
def test_graph_without_edges(size, device):
    graph = torch.zeros(size, size).to_sparse_csr().to(device)
    y = torch.randn(size, 4, device=device)
    assert torch.equal(fastclust.diffuse(graph, y).f, y)


def test_empty_inputs(device):
    empty = torch.zeros(0, 0).to_sparse_csr().to(device)
    assert fastclust.diffuse(empty, torch.zeros(0, 3, device=device)).f.shape == (0, 3)
    none = fastclust.diffuse(random_graph(9, 3, torch.float32).to(device), torch.zeros(9, 0, device=device))
    assert none.f.shape == (9, 0)
    assert none.residual.shape == none.n_iter.shape == (0,)


def test_any_strides_and_dtypes(device):
    graph = random_graph(60, 8, torch.float32).to(device)
    y = torch.randn(6, 121, device=device)
    view = y.T[1::2, ::2]
    assert torch.equal(fastclust.diffuse(graph, view).f, fastclust.diffuse(graph, view.contiguous()).f)
    half = fastclust.diffuse(graph, view.half()).f
    assert half.dtype == torch.float32
    assert torch.equal(half, fastclust.diffuse(graph, view.half().float()).f)
    assert fastclust.diffuse(graph, view.double()).f.dtype == torch.float64
    narrow = torch.sparse_csr_tensor(graph.crow_indices().int(), graph.col_indices().int(), graph.values(), graph.shape)
    assert torch.equal(fastclust.diffuse(narrow, view).f, fastclust.diffuse(graph, view).f)


def test_weights_of_any_scale(device):
    graph, y = random_graph(80, 10, torch.float32), torch.randn(80, 3)
    expected = fastclust.diffuse(graph.to(device), y.to(device)).f
    for factor in (1e-30, 1e30):
        scaled = torch.sparse_csr_tensor(*parts(graph)[:2], graph.values() * factor, graph.shape).to(device)
        assert torch.allclose(fastclust.diffuse(scaled, y.to(device)).f, expected, rtol=1e-3, atol=1e-4)


def test_order_of_the_rows_does_not_matter(device):
    """The CPU re-orders rows in pieces of 8192: more rows than that, some alone, against the same graph shuffled."""
    n = 9000
    row = torch.arange(n - 40)
    hops = torch.cat([torch.stack([row, (row + hop) % (n - 40)]) for hop in (1, 7, 50)], 1)
    graph = torch.sparse_coo_tensor(
        torch.cat([hops, hops.flip(0)], 1), torch.rand(hops.shape[1], dtype=torch.float64).repeat(2), (n, n)
    )
    shuffle = torch.randperm(n)
    moved = torch.sparse_coo_tensor(shuffle[graph.coalesce().indices()], graph.coalesce().values(), (n, n))
    y = torch.randn(n, 5, dtype=torch.float64)
    f = fastclust.diffuse(graph.coalesce().to_sparse_csr().to(device), y.to(device), max_iter=60).f.cpu()
    y_moved = torch.empty_like(y)
    y_moved[shuffle] = y
    f_moved = fastclust.diffuse(moved.coalesce().to_sparse_csr().to(device), y_moved.to(device), max_iter=60).f.cpu()
    assert torch.allclose(f_moved[shuffle], f, rtol=1e-9, atol=1e-9)


def test_threads_do_not_change_a_bit():
    graph, y = random_graph(3000, 30, torch.float32), torch.randn(3000, 37)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(fastclust.diffuse(graph, y))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@given(
    n=st.integers(1, 40),
    columns=st.integers(1, 6),
    alpha=st.floats(0, 0.999),
    degree=st.floats(0, 8),
    seed=st.integers(0, 99),
)
def test_converges_on_any_graph(n, columns, alpha, degree, seed):
    graph = random_graph(n, degree, seed=seed)
    y = torch.randn(n, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    f, residual, n_iter = fastclust.diffuse(graph, y, alpha=alpha, tol=1e-10, max_iter=400)
    assert (residual <= 1e-9).all()
    assert (n_iter <= 400).all()
    expected = torch.linalg.solve(system_matrix(graph, alpha), y)
    assert torch.allclose(f, expected, rtol=1e-6, atol=1e-6)


def csr(crow: list[int], col: list[int], weights: list[float], n: int) -> Tensor:
    return torch.sparse_csr_tensor(
        torch.tensor(crow), torch.tensor(col), torch.tensor(weights), (n, n), check_invariants=False
    )


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (csr([0, 1, 2], [1, 2], [1.0, 1.0], 2), r"diffuse: graph has a column outside \[0, N\) in row 1"),
        (csr([0, 1, 2], [1, -1], [1.0, 1.0], 2), r"diffuse: graph has a column outside \[0, N\) in row 1"),
        (csr([0, 2, 2], [1, 0], [1.0, 1.0], 2), "diffuse: graph has columns that do not ascend in row 0"),
        (csr([0, 2, 2], [1, 1], [1.0, 1.0], 2), "diffuse: graph has columns that do not ascend in row 0"),
        (csr([0, 3, 2], [0, 1], [1.0, 1.0], 2), "diffuse: graph has row offsets that fall at row 1"),
        (csr([0, 1, 7], [0, 1], [1.0, 1.0], 2), "diffuse: graph has row offsets that do not run from 0"),
        (csr([1, 1, 2], [0, 1], [1.0, 1.0], 2), "diffuse: graph has row offsets that do not run from 0"),
        (csr([0, 1, 2], [1, 0], [1.0, -1.0], 2), "diffuse: graph has a weight that is negative or not finite in row 1"),
        (csr([0, 1, 2], [1, 0], [float("nan"), 1.0], 2), "diffuse: graph has a weight .* in row 0"),
        (csr([0, 1, 2], [1, 0], [1.0, float("inf")], 2), "diffuse: graph has a weight .* in row 1"),
    ],
)
def test_refuses_a_broken_graph(graph, message, device):
    with pytest.raises(ValueError, match=message):
        fastclust.diffuse(graph.to(device), torch.zeros(2, 1, device=device))


def test_refuses_wrong_arguments(device):
    graph, y = random_graph(10, 4, torch.float32).to(device), torch.randn(10, 2, device=device)
    bad = y.clone()
    bad[7, 1] = float("nan")
    for arguments, error, message in [
        ((graph, bad, {}), ValueError, "diffuse: y holds 1 row that is not finite, at 7"),
        ((graph, y[:9], {}), ValueError, "diffuse: y has 9 rows, but graph has 10"),
        ((graph, y[:, 0], {}), ValueError, r"diffuse: y must be \(N, C\), got \(10,\)"),
        ((graph, y.long(), {}), TypeError, "diffuse: y must have a floating-point dtype"),
        ((graph.to_dense(), y, {}), TypeError, "diffuse: graph must be a torch.sparse_csr tensor, got a torch.strided"),
        ((None, y, {}), TypeError, "diffuse: graph must be a torch.sparse_csr tensor, got NoneType"),
        ((torch.zeros(10, 9).to_sparse_csr(), y, {}), ValueError, r"diffuse: graph must be \(N, N\), got \(10, 9\)"),
        ((graph, y, {"alpha": 1.0}), ValueError, r"diffuse: alpha must be in \[0, 1\), got 1"),
        ((graph, y, {"alpha": -0.1}), ValueError, "diffuse: alpha"),
        ((graph, y, {"alpha": float("nan")}), ValueError, "diffuse: alpha"),
        ((graph, y, {"tol": -1.0}), ValueError, "diffuse: tol"),
        ((graph, y, {"max_iter": -1}), ValueError, "diffuse: max_iter"),
    ]:
        with pytest.raises(error, match=message):
            fastclust.diffuse(arguments[0], arguments[1], **arguments[2])


def test_opcheck(device):
    graph, y = random_graph(20, 5, torch.float32).to(device), torch.randn(20, 3, device=device)
    crow, col, weights = (
        part.clone() for part in parts(graph)
    )  # torch 2.11's opcheck takes no views of sparse tensors
    torch.library.opcheck(torch.ops.fastclust.diffuse, (crow, col, weights, y, 0.9, 1e-6, 5))


def test_compiles(device):
    graph, y = random_graph(20, 5, torch.float32).to(device), torch.randn(20, 3, device=device)
    crow, col, weights = (part.clone() for part in parts(graph))  # torch.compile takes no views of sparse tensors

    def solve(crow: Tensor, col: Tensor, weights: Tensor, y: Tensor) -> Tensor:
        return ops.diffuse(crow, col, weights, y, 0.99, 1e-6, 20)[0] * 2

    compiled = torch.compile(solve, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(crow, col, weights, y), 2 * fastclust.diffuse(graph, y).f)


# -------------------------------------------------------------------------------------------------------- pseudo-labels


def test_pseudo_labels_as_the_formulas_say(device):
    graph = random_graph(90, 6)
    labels = torch.full((90,), -1)
    labels[:12] = torch.arange(12) % 4
    labels[11] = 0
    result = fastclust.propagate_labels(graph.to(device), labels.to(device), max_iter=200, tol=1e-12)

    y = torch.stack([(labels == c).double() / (labels == c).sum() for c in range(4)], 1)
    f = torch.linalg.solve(system_matrix(graph, 0.99), y).clamp(min=0)
    f[f < 1e-9] = 0
    z = f / f.sum(1, keepdim=True).clamp(min=1e-30)
    omega = torch.where(f.sum(1) > 0, 1 + torch.special.xlogy(z, z).sum(1) / torch.log(torch.tensor(4.0)), 0.0)
    omega = omega / omega.max()
    omega[:12] = 1
    pseudo = torch.where(labels >= 0, labels, z.argmax(1))
    reached = f.sum(1) > 0
    zeta = torch.tensor([90 / 4 / (pseudo[reached] == c).sum() for c in range(4)], dtype=torch.float64)
    assert torch.equal(result.labels.cpu(), pseudo)
    assert torch.allclose(result.scores.cpu(), z, atol=1e-6)
    assert torch.allclose(result.weights.cpu(), omega.double(), atol=1e-5)
    assert torch.allclose(result.class_weights.cpu(), zeta)
    short = fastclust.propagate_labels(graph.to(device), labels.to(device), max_iter=2)
    assert torch.equal(short.residual, fastclust.diffuse(graph.to(device), y.to(device), max_iter=2).residual)
    assert (short.residual > 1e-3).all()


def test_cliques_take_the_label_of_their_labelled_point(device):
    labels = torch.full((60,), -1)
    labels[[0, 12, 24, 36, 48]] = torch.arange(5)
    result = fastclust.propagate_labels(
        ring_of_cliques(5, 12, torch.float32).to(device), labels.to(device), max_iter=200
    )
    assert torch.equal(result.labels.cpu(), torch.arange(5).repeat_interleave(12))
    assert torch.allclose(result.class_weights.cpu(), torch.ones(5))
    assert (result.weights > 0.5).all()


def test_labelled_points_keep_their_label_whatever_the_graph_says(device):
    labels = torch.zeros(12, dtype=torch.int64)
    labels[5], labels[6] = 1, -1
    result = fastclust.propagate_labels(ring_of_cliques(1, 12).to(device), labels.to(device))
    assert result.labels[5] == 1
    assert result.weights[5] == 1
    assert result.weights[6] <= 1


def test_points_no_label_reaches_weigh_nothing(device):
    graph = torch.block_diag(torch.ones(3, 3), torch.ones(2, 2), torch.zeros(1, 1)).to_sparse_csr().to(device)
    labels = torch.tensor([1, -1, -1, -1, -1, -1], device=device)
    with pytest.warns(UserWarning, match="propagate_labels: 1 of 2 classes are empty"):
        result = fastclust.propagate_labels(graph, labels)
    assert result.weights.tolist() == [1, 1, 1, 0, 0, 0]
    assert result.class_weights.tolist() == [0, 1]
    assert (result.scores[3:] == 0).all()
    assert (result.labels[:3] == 1).all()


def test_one_class_is_certain_where_it_reaches(device):
    graph = torch.block_diag(torch.ones(3, 3), torch.ones(2, 2)).to_sparse_csr().to(device)
    result = fastclust.propagate_labels(graph, torch.tensor([0, -1, -1, -1, -1], device=device))
    assert result.weights.tolist() == [1, 1, 1, 0, 0]
    assert result.class_weights.tolist() == pytest.approx([5 / 3])


def test_more_classes_than_labels_hold(device):
    labels = torch.tensor([0, 1, -1, -1], device=device)
    with pytest.warns(UserWarning, match="1 of 3 classes"):
        result = fastclust.propagate_labels(ring_of_cliques(1, 4).to(device), labels, n_classes=3)
    assert result.scores.shape == (4, 3)
    assert result.class_weights[2] == 0


def test_pseudo_labels_refuse_wrong_arguments(device):
    graph = ring_of_cliques(1, 4).to(device)
    labels = torch.tensor([0, 1, -1, -1], device=device)
    for bad, options, error, message in [
        (labels[:3], {}, ValueError, r"propagate_labels: labels must be \(4,\), got \(3,\)"),
        (labels.float(), {}, TypeError, "propagate_labels: labels must have an integer dtype"),
        (labels - 1, {}, ValueError, "propagate_labels: labels holds -2, below -1"),
        (torch.full_like(labels, -1), {}, ValueError, "propagate_labels: labels holds no labelled point"),
        (labels, {"n_classes": 1}, ValueError, "propagate_labels: labels holds 1, but n_classes is 1"),
        (labels, {"alpha": 1.0}, ValueError, "propagate_labels: alpha must be in"),
    ]:
        with pytest.raises(error, match=message):
            fastclust.propagate_labels(graph, bad, **options)
    with pytest.raises(ValueError, match="propagate_labels: graph is empty"):
        fastclust.propagate_labels(torch.zeros(0, 0).to_sparse_csr(), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(TypeError, match="propagate_labels: graph must be"):
        fastclust.propagate_labels(graph.to_dense(), labels)
