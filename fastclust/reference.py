"""A readable PyTorch twin of every op: what the kernels compute, without regard to speed or memory.

The tests compare each op with its twin in float64. Shapes and names are those of csrc/library.cpp.
"""

from __future__ import annotations

import torch
from torch import Tensor

# -------------------------------------------------------------------------------------------------------------- k-means

# -------------------------------------------------------------------------------------------------------- kNN and graph

# ------------------------------------------------------------------------------------------------------------ diffusion


def diffuse(
    crow: Tensor, col: Tensor, weights: Tensor, y: Tensor, alpha: float, tol: float, max_iter: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Block conjugate gradients on I - alpha D^-½ W D^-½, dense."""
    n = y.shape[0]
    w = torch.sparse_csr_tensor(crow, col, weights, (n, n)).to_dense()
    degree = w.sum(1)
    scale = torch.where(degree > 0, degree, 1.0).rsqrt()
    matrix = torch.eye(n, dtype=w.dtype, device=w.device) - alpha * scale[:, None] * w * scale
    x, r, p = torch.zeros_like(y), y.clone(), y.clone()
    rr = (r * r).sum(0)
    norm2, n_iter = rr, torch.zeros(y.shape[1], dtype=torch.int64, device=y.device)
    for _ in range(max_iter):
        going = rr > tol**2 * norm2
        if not going.any():
            break
        q = matrix @ p
        step = torch.where(going, rr / (p * q).sum(0), 0.0)
        x = x + step * p
        r = r - step * q
        rr_next = (r * r).sum(0)
        p = r + torch.where(rr > 0, rr_next / rr, 0.0) * p
        rr = rr_next
        n_iter += going
    residual = torch.where(norm2 > 0, (y - matrix @ x).norm(dim=0) / norm2.sqrt(), 0.0)
    return x, residual, n_iter


# ------------------------------------------------------------------------------------------------------ soft assignment


def soft_assign(x: Tensor, centroids: Tensor) -> Tensor:
    """log softmax_k of -|x - mu_k|²."""
    return torch.log_softmax(-(x[:, None] - centroids).square().sum(2), dim=1)


# ---------------------------------------------------------------------------------------------------------- pairwise KL


def pairwise_kl(log_p: Tensor, labels: Tensor, margin: float, detach_target: bool) -> tuple[Tensor, Tensor]:
    """Means over similar and dissimilar ordered pairs, by broadcasting to (B, B, K)."""
    target = log_p.detach() if detach_target else log_p
    p = target.exp()
    terms = torch.where(p[:, None] > 0, p[:, None] * (target[:, None] - log_p[None]), 0.0)
    kl = terms.sum(2)
    pairs = (labels[:, None] >= 0) & (labels >= 0) & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    same = labels[:, None] == labels
    similar, dissimilar = kl[pairs & same], (margin - kl[pairs & ~same]).clamp(min=0)
    zero = log_p.new_zeros(())
    means = [2 * values.mean() if values.numel() else zero for values in (similar, dissimilar)]
    return torch.stack(means), torch.tensor([similar.numel(), dissimilar.numel()], device=labels.device)
