"""Soft assignment to centroids, against log_softmax in float64."""

import pytest
import torch

import fastclust
from fastclust import reference

DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 1), (5, 2, 3), (37, 10, 32), (130, 33, 7), (64, 100, 130), (9, 4, 0)])
def test_matches_log_softmax(n, k, d, dtype, device):
    x, centroids = torch.randn(n, d, dtype=dtype), torch.randn(k, d, dtype=dtype)
    log_p = fastclust.soft_assign(x.to(device), centroids.to(device))
    assert log_p.device.type == device
    assert log_p.dtype == dtype
    expected = reference.soft_assign(x.double(), centroids.double())
    error = (log_p.cpu() - expected).abs().max()
    torch_error = (reference.soft_assign(x, centroids) - expected).abs().max()
    if dtype == torch.float64:
        torch_error = 1e-14 * expected.abs().max()
    assert error <= 2 * torch_error + 4 * torch.finfo(dtype).eps * (1 + expected.abs().max())
    assert torch.allclose(log_p.exp().sum(1).cpu(), torch.ones(n, dtype=dtype))


def test_far_from_the_origin_keeps_its_digits(device):
    """In float32, |x|² - 2 x.mu + |mu|² would be wrong in the second digit here."""
    x = torch.randint(-8, 9, (50, 16)) / 4 + 1000.0
    centroids = torch.randint(-8, 9, (6, 16)) / 4 + 1000.0
    expected = reference.soft_assign(x.double(), centroids.double())
    assert torch.allclose(fastclust.soft_assign(x.to(device), centroids.to(device)).cpu().double(), expected, rtol=1e-5)


def test_far_points_do_not_underflow(device):
    x, centroids = torch.full((3, 2), 50.0, device=device), torch.tensor([[0.0, 0.0], [1.0, 0.0]], device=device)
    log_p = fastclust.soft_assign(x, centroids)
    assert torch.allclose(log_p[:, 0], torch.full((3,), -99.0, device=device))
    assert (log_p[:, 1].abs() < 1e-6).all()


@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 2), (7, 3, 4), (33, 35, 2)])
def test_gradients(n, k, d, device):
    x = torch.randn(n, d, dtype=torch.float64, device=device, requires_grad=True)
    centroids = torch.randn(k, d, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(fastclust.soft_assign, (x, centroids))


def test_gradients_of_many_rows_match_float64(device):
    x, centroids, grad = torch.randn(20000, 3), torch.randn(5, 3), torch.randn(20000, 5)
    inputs = [t.to(device).requires_grad_() for t in (x, centroids)]
    twins = [t.double().requires_grad_() for t in (x, centroids)]
    grads = torch.autograd.grad(fastclust.soft_assign(*inputs), inputs, grad.to(device))
    expected = torch.autograd.grad(reference.soft_assign(*twins), twins, grad.double())
    for ours, twin in zip(grads, expected, strict=True):
        assert (ours.cpu() - twin).norm() <= 1e-5 * twin.norm()


def test_centroids_without_gradient(device):
    x = torch.randn(4, 2, device=device, requires_grad=True)
    fastclust.soft_assign(x, torch.randn(3, 2, device=device)).sum().backward()
    assert x.grad is not None


def test_threads_do_not_change_a_bit():
    x, centroids = torch.randn(5000, 9, requires_grad=True), torch.randn(11, 9, requires_grad=True)
    grad = torch.randn(5000, 11)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            log_p = fastclust.soft_assign(x, centroids)
            results.append([log_p, *torch.autograd.grad(log_p, (x, centroids), grad)])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_any_strides_and_dtypes(device):
    x, centroids = torch.randn(3, 21, device=device).T[1::2], torch.randn(8, 6, device=device)[::2, ::2]
    expected = fastclust.soft_assign(x.contiguous(), centroids.contiguous())
    assert torch.equal(fastclust.soft_assign(x, centroids), expected)
    half = fastclust.soft_assign(x.bfloat16(), centroids.bfloat16())
    assert half.dtype == torch.float32
    assert fastclust.soft_assign(x[:0], centroids).shape == (0, 4)


def test_empty_batch_has_a_gradient(device):
    centroids = torch.randn(4, 3, device=device, requires_grad=True)
    fastclust.soft_assign(torch.zeros(0, 3, device=device), centroids).sum().backward()
    assert (centroids.grad == 0).all()


def test_refuses_wrong_arguments(device):
    x, centroids = torch.randn(6, 3, device=device), torch.randn(4, 3, device=device)
    bad = x.clone()
    bad[2, 0] = bad[4, 1] = float("inf")
    for arguments, error, message in [
        ((bad, centroids), ValueError, "soft_assign: x holds 2 rows that are not finite, first at 2"),
        ((x, bad[:5]), ValueError, "soft_assign: centroids holds 2 rows that are not finite"),
        ((x, centroids[:, :2]), ValueError, r"soft_assign: centroids must be \(K, 3\), got \(4, 2\)"),
        ((x, centroids[:0]), ValueError, "soft_assign: centroids is empty"),
        ((x[0], centroids), ValueError, "soft_assign: x must have 2 dimensions"),
        ((x, centroids.double()), ValueError, "soft_assign: centroids must have the dtype of the first argument"),
        ((x.long(), centroids), TypeError, "soft_assign: x must have a floating-point dtype"),
        ((x, [1.0]), TypeError, "soft_assign: centroids must be a torch.Tensor"),
        (
            (x * 1e30, centroids),
            ValueError,
            "soft_assign: distances of x to centroids holds 6 rows that are not finite",
        ),
    ]:
        with pytest.raises(error, match=message):
            fastclust.soft_assign(*arguments)


def test_opcheck_and_compile(device):
    x = torch.randn(9, 3, device=device, requires_grad=True)
    centroids = torch.randn(4, 3, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.fastclust.soft_assign, (x, centroids))
    compiled = torch.compile(fastclust.soft_assign, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, centroids), fastclust.soft_assign(x, centroids))
