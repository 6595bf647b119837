"""The pairwise contrastive loss, against broadcasting to (B, B, K) in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastclust
from fastclust import ops, reference

DTYPES = [torch.float32, torch.float64]


def batch(
    b: int, k: int, groups: int, dtype: torch.dtype = torch.float64, spread: float = 1.5
) -> tuple[Tensor, Tensor]:
    """Log-probabilities, and labels of which some are -1 and some, large, share a class."""
    log_p = (spread * torch.randn(b, k, dtype=torch.float64)).log_softmax(1).to(dtype)
    return log_p, torch.randint(-1, groups, (b,)) * 10**9


def labels_with_free_rows(labels: Tensor) -> Tensor:
    return labels.clamp(min=-1)


def both_gradients(log_p: Tensor, labels: Tensor, margin: float, detach: bool, device: str) -> tuple[Tensor, Tensor]:
    """Of three times the loss, by the op and by the twin in float64, after comparing the loss with and without."""
    ours, twin = log_p.to(device).requires_grad_(), log_p.double().requires_grad_()
    loss = ops.pairwise_kl(ours, labels.to(device), margin, detach)
    expected_loss = reference.pairwise_kl(twin, labels, margin, detach)
    limit = 1e-5 if log_p.dtype == torch.float32 else 1e-12
    for value in (loss, ops.pairwise_kl(ours.detach(), labels.to(device), margin, detach)):
        assert torch.allclose(value.cpu().double(), expected_loss, rtol=limit, atol=limit)
    (grad,) = torch.autograd.grad(3 * loss, ours)
    (expected,) = torch.autograd.grad(3 * expected_loss + 0 * twin.sum(), twin)
    return grad.cpu().double(), expected


def margin_of_rank(log_p: Tensor, share: float) -> float:
    """The margin that this share of all divergences lies within."""
    p = log_p.double().exp()
    kl = ((p * log_p.double()).sum(1, keepdim=True) - p @ log_p.double().T).flatten()
    return max(float(kl.quantile(share)), 0.1)


@pytest.mark.parametrize("share", [0.03, 0.5, 0.97])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("b", "k", "groups"),
    [(2, 3, 1), (2, 3, 2), (40, 1, 3), (64, 16, 4), (65, 17, 3), (200, 10, 10), (300, 100, 40), (400, 30, 6)],
)
def test_matches_broadcasting(b, k, groups, dtype, detach, share, device):
    log_p, labels = batch(b, k, groups, dtype)
    margin = margin_of_rank(log_p, share)
    grad, expected = both_gradients(log_p, labels_with_free_rows(labels), margin, detach, device)
    # with one cluster the gradient is 0, and the twin's own rounding is all there is
    assert (grad - expected).norm() <= (1e-5 if dtype == torch.float32 else 1e-12) * expected.norm() + 1e-15


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2], [-1, -1, -1], [0, -1, -1], [5, 5, -1]])
def test_an_empty_set_of_pairs_adds_nothing(labels, device):
    log_p, _ = batch(3, 4, 1)
    grad, expected = both_gradients(log_p, torch.tensor(labels), 2.0, False, device)
    assert torch.allclose(grad, expected)


@pytest.mark.parametrize("b", [0, 1])
def test_no_pairs_at_all(b, device):
    log_p = torch.randn(b, 3, device=device).log_softmax(1).requires_grad_()
    loss = fastclust.pairwise_kl(log_p, torch.zeros(b, dtype=torch.int64, device=device))
    assert loss == 0
    loss.backward()
    assert (log_p.grad == 0).all()


def test_no_clusters_at_all(device):
    loss = fastclust.pairwise_kl(torch.zeros(3, 0, device=device), torch.tensor([0, 0, 1], device=device), margin=1.5)
    assert loss == 3.0


def test_hinge_is_per_direction(device):
    p = torch.tensor([[0.5, 0.5], [0.999, 0.001]], dtype=torch.float64)
    there, back = (p[0] * (p[0] / p[1]).log()).sum(), (p[1] * (p[1] / p[0]).log()).sum()
    assert there > 2 > back
    loss = fastclust.pairwise_kl(p.log().to(device), torch.tensor([0, 1], device=device), margin=2.0)
    assert loss.item() == pytest.approx((2 - back).item())


def test_rows_labelled_minus_one_are_in_no_pair(device):
    log_p, labels = batch(70, 5, 4)
    labels = labels_with_free_rows(labels)
    free = labels < 0
    assert free.any()
    log_p = log_p.to(device).requires_grad_()
    loss = fastclust.pairwise_kl(log_p, labels.to(device))
    loss.backward()
    assert (log_p.grad[free.to(device)] == 0).all()
    assert loss.item() == pytest.approx(fastclust.pairwise_kl(log_p[~free], labels[~free].to(device)).item(), rel=1e-12)


def test_near_equal_rows_keep_their_digits(device):
    """KL around 1e-9 from float32 log-probabilities: h_i - sum p log q would lose it all."""
    base = torch.randn(10, dtype=torch.float64)
    log_p = (base + 3e-5 * torch.randn(50, 10, dtype=torch.float64)).log_softmax(1).float()
    labels = torch.zeros(50, dtype=torch.int64)
    p = log_p.double().exp()
    expected = (p[:, None] - p).mul(log_p[:, None].double() - log_p.double()).sum() / (50 * 49)
    loss = fastclust.pairwise_kl(log_p.to(device), labels.to(device))
    assert 0 < expected < 1e-7
    assert loss.item() == pytest.approx(expected.item(), rel=2e-2)


def test_equal_rows(device):
    log_p = torch.full((6, 4), 0.25, device=device).log()
    labels = torch.tensor([0, 0, 0, 1, 1, 1], device=device)
    assert fastclust.pairwise_kl(log_p, labels, margin=2.0).item() == pytest.approx(4.0, rel=1e-6)


def test_zero_probabilities(device):
    log_p = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], device=device).log()
    apart = log_p.clone().requires_grad_()
    loss = fastclust.pairwise_kl(apart, torch.tensor([0, 1, 2], device=device), margin=2.0)
    # of the six directions only KL(row 0 || row 1) = log 2 is finite and within the margin
    assert loss.item() == pytest.approx(2 * (2 - 0.6931472) / 6, rel=1e-6)
    loss.backward()
    assert apart.grad.isfinite().all()
    same = fastclust.pairwise_kl(log_p[:2], torch.tensor([3, 3], device=device))
    assert same.item() == float("inf")
    alike = fastclust.pairwise_kl(log_p[[1, 1]], torch.tensor([3, 3], device=device))
    assert alike.item() == 0


@pytest.mark.parametrize("detach", [False, True])
def test_zero_probabilities_among_pairs_that_nearly_all_count(detach, device):
    """The gradient may not come from sums that hold a stand-in for log 0."""
    log_p = (0.1 * torch.randn(200, 12)).log_softmax(1)
    log_p[70, 3] = log_p[130, :2] = -torch.inf
    labels = torch.arange(200) % 5
    labels[[70, 130]] = torch.tensor([5, 6])  # in no similar pair, where it makes the loss infinite
    ours = log_p.to(device).requires_grad_()
    fastclust.pairwise_kl(ours, labels.to(device), detach_target=detach).backward()
    twin = log_p.double().requires_grad_()
    target = twin.detach() if detach else twin
    p = target.exp()
    kl = torch.where(p[:, None] > 0, p[:, None] * (target[:, None] - twin[None]).clamp(max=1e30), 0.0).sum(2)
    same, others = labels[:, None] == labels, ~torch.eye(200, dtype=torch.bool)
    loss = 2 * kl[same & others].mean() + 2 * (2.0 - kl[~same]).clamp(min=0).mean()
    (expected,) = torch.autograd.grad(loss, twin)
    finite = log_p.isfinite()
    assert (ours.grad.cpu().double()[finite] - expected[finite]).norm() <= 1e-5 * expected[finite].norm()


def test_saturated_softmax_is_finite(device):
    log_p = (200 * torch.randn(100, 8)).log_softmax(1).to(device).requires_grad_()
    loss = fastclust.pairwise_kl(log_p, torch.arange(100, device=device) % 3)
    loss.backward()
    twin = reference.pairwise_kl(log_p.detach().cpu().double(), torch.arange(100) % 3, 2.0, False)
    assert loss.item() == pytest.approx(twin.item(), rel=1e-5)
    assert log_p.grad.isfinite().all()


@pytest.mark.parametrize("b", [3, 70])
def test_gradcheck(b, device):
    logits = torch.randn(b, 3, dtype=torch.float64, device=device, requires_grad=True)
    labels = torch.arange(b, device=device) % 3 - 1
    # log_p itself, not behind log_softmax, which would hide a constant
    assert torch.autograd.gradcheck(lambda z: fastclust.pairwise_kl(z, labels, margin=0.7), (logits,))


def test_training_separates_and_gathers(device):
    logits = torch.randn(60, 3, device=device, requires_grad=True)
    labels = torch.arange(60, device=device) % 3
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        loss = fastclust.pairwise_kl(logits.log_softmax(1), labels, detach_target=True)
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    assert fastclust.metrics.cluster_accuracy(labels, logits.argmax(1)) == 1


@given(
    b=st.integers(0, 20), k=st.integers(1, 6), groups=st.integers(1, 5), margin=st.floats(0, 3), seed=st.integers(0, 99)
)
def test_any_batch(b, k, groups, margin, seed):
    torch.manual_seed(seed)
    log_p, labels = batch(b, k, groups)
    labels = labels_with_free_rows(labels)
    loss = ops.pairwise_kl(log_p, labels, margin, False)
    assert torch.allclose(loss, reference.pairwise_kl(log_p, labels, margin, False), rtol=1e-10, atol=1e-12)
    order = torch.randperm(b)
    assert torch.allclose(ops.pairwise_kl(log_p[order], labels[order], margin, False), loss, rtol=1e-10, atol=1e-12)
    assert loss >= 0


def test_threads_do_not_change_a_bit():
    log_p, labels = batch(700, 21, 6, torch.float32)
    log_p, labels = log_p.requires_grad_(), labels_with_free_rows(labels)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            loss = fastclust.pairwise_kl(log_p, labels)
            results.append([loss, *torch.autograd.grad(loss, log_p)])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_any_strides_and_dtypes(device):
    log_p, labels = batch(81, 6, 3, torch.float32)
    wide = log_p.T.contiguous().to(device)
    labels = labels_with_free_rows(labels).to(device)
    assert torch.equal(fastclust.pairwise_kl(wide.T, labels), fastclust.pairwise_kl(log_p.to(device), labels))
    assert torch.equal(
        fastclust.pairwise_kl(log_p.to(device)[1::2], labels[1::2]),
        fastclust.pairwise_kl(log_p.to(device)[1::2].contiguous(), labels[1::2].contiguous()),
    )
    half = log_p.to(device).half().requires_grad_()
    loss = fastclust.pairwise_kl(half, (labels > 0).to(torch.int8))
    assert loss.dtype == torch.float32
    loss.backward()
    assert half.grad.dtype == torch.float16


def test_refuses_wrong_arguments(device):
    log_p, labels = batch(6, 3, 2, torch.float32)
    log_p, labels = log_p.to(device), labels_with_free_rows(labels).to(device)
    bad = log_p.clone()
    bad[1, 0], bad[4, 2] = float("nan"), float("inf")
    low = labels.clone()
    low[3] = -2
    for arguments, options, error, message in [
        ((bad, labels), {}, ValueError, r"pairwise_kl: log_p holds NaN or \+inf in 2 rows, first at 1"),
        ((log_p, low), {}, ValueError, "pairwise_kl: labels holds 1 value below -1, at 3"),
        ((log_p, labels[:5]), {}, ValueError, r"pairwise_kl: labels must be \(6,\), got \(5,\)"),
        ((log_p[0], labels), {}, ValueError, "pairwise_kl: log_p must have 2 dimensions"),
        ((log_p, labels.float()), {}, TypeError, "pairwise_kl: labels must have an integer dtype"),
        ((log_p.long(), labels), {}, TypeError, "pairwise_kl: log_p must have a floating-point dtype"),
        ((log_p, labels), {"margin": -1.0}, ValueError, "pairwise_kl: margin must be finite and not negative"),
        ((log_p, labels), {"margin": float("nan")}, ValueError, "pairwise_kl: margin"),
    ]:
        with pytest.raises(error, match=message):
            fastclust.pairwise_kl(*arguments, **options)


def test_opcheck_and_compile(device):
    log_p, labels = batch(20, 4, 3, torch.float32)
    log_p, labels = log_p.to(device).requires_grad_(), labels_with_free_rows(labels).to(device)
    for with_grad in (False, True):
        x = log_p.detach().requires_grad_(with_grad)
        torch.library.opcheck(torch.ops.fastclust.pairwise_kl, (x, labels, 2.0, False, with_grad))
    compiled = torch.compile(fastclust.pairwise_kl, fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(compiled(log_p, labels, detach_target=True), log_p)
    (expected,) = torch.autograd.grad(fastclust.pairwise_kl(log_p, labels, detach_target=True), log_p)
    assert torch.equal(grad, expected)
