"""Pairwise symmetric KL, forward and backward, against eager PyTorch with B × B matrices.

`pytest benches/bench_pairwise_kl.py` is quick; `--full` adds B 4096, K 100. Two spreads of the logits: with 1 most
pairs are within the margin, as early in a training; with 3 hardly any is.
"""

import pytest
import torch
from torch import Tensor

import fastclust

MARGIN = 2.0


def eager(log_p: Tensor, labels: Tensor) -> Tensor:
    p = log_p.exp()
    kl = (p * log_p).sum(1, keepdim=True) - p @ log_p.T
    same = labels[:, None] == labels
    similar = same & ~torch.eye(len(labels), dtype=torch.bool)
    hinge = (MARGIN - kl).clamp(min=0)
    return 2 * (kl * similar).sum() / similar.sum() + 2 * (hinge * ~same).sum() / (~same).sum()


def ours(log_p: Tensor, labels: Tensor) -> Tensor:
    return fastclust.pairwise_kl(log_p, labels, margin=MARGIN)


@pytest.mark.parametrize("loss", [ours, eager])
@pytest.mark.parametrize("spread", [1, 3])
@pytest.mark.parametrize(("b", "k"), [(1024, 10), (1024, 100), (4096, 100)])
def test_pairwise_kl(benchmark, measure, full, b, k, spread, loss):
    if b > 1024 and not full:
        pytest.skip("--full only")
    generator = torch.Generator().manual_seed(0)
    logits = (spread * torch.randn(b, k, generator=generator)).requires_grad_()
    labels = torch.randint(10, (b,), generator=generator)

    def step(function=loss):
        return torch.autograd.grad(function(logits.log_softmax(1), labels), logits)[0]

    assert (step(ours) - step(eager)).norm() <= 1e-4 * step(eager).norm()
    benchmark.group = f"pairwise KL, B {b}, K {k}, spread {spread}"
    benchmark.name = {"ours": "fastclust", "eager": "eager torch"}[loss.__name__]
    benchmark.extra_info["multiply-adds"] = 3 * b * b * k
    measure(step)
