"""What the pairwise loss has of ClusterNet's training step: fused, eager, and the step without it.

`pytest benches/bench_clusternet.py` measures the batch of the usps preset; `--full` adds 1024 images and the faces'
41 and 68 clusters. Eager broadcasts to (B, B, K), as papers' code usually does, or multiplies to (B, B) matrices.
"""

import pytest
import torch
from torch import Tensor

import fastclust
from fastclust import reference
from methods.common.autoencoder import ClusterAutoencoder, reconstruction_loss

MARGIN = 2.0


def none(log_p: Tensor, labels: Tensor) -> Tensor:
    return log_p.sum() * 0


def fused(log_p: Tensor, labels: Tensor) -> Tensor:
    return fastclust.pairwise_kl(log_p, labels, margin=MARGIN, detach_target=True)


def matrices(log_p: Tensor, labels: Tensor) -> Tensor:
    p = log_p.detach().exp()
    kl = (p * log_p.detach()).sum(1, keepdim=True) - p @ log_p.T
    same = labels[:, None] == labels
    similar = same & ~torch.eye(len(labels), dtype=torch.bool)
    hinge = (MARGIN - kl).clamp(min=0)
    return 2 * (kl * similar).sum() / similar.sum() + 2 * (hinge * ~same).sum() / (~same).sum()


def broadcast(log_p: Tensor, labels: Tensor) -> Tensor:
    return reference.pairwise_kl(log_p, labels, MARGIN, True)


@pytest.mark.parametrize("loss", [none, fused, matrices, broadcast])
@pytest.mark.parametrize(("b", "k"), [(128, 10), (1024, 10), (1024, 68)])
def test_step(benchmark, measure, full, b, k, loss):
    if b > 128 and not full:
        pytest.skip("--full only")
    torch.manual_seed(0)
    network = ClusterAutoencoder(1, (16, 16), k, n_features=32, strides=(2, 2, 2), dropout=0.1, drop_features=True)
    network.centres.copy_(torch.rand(k, 32) - 0.5)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, fused=True)
    images, labels = torch.rand(b, 1, 16, 16), torch.randint(k, (b,))

    def step():
        z = network.features(images)
        log_p = fastclust.soft_assign(z, network.centres)
        total = loss(log_p, labels) + (z - network.centres[labels]).square().sum(1).mean()
        total = total + reconstruction_loss(network.decode(z), images)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()

    benchmark.group = f"ClusterNet's step, {b} images of 16 x 16, {k} clusters"
    measure(step)
