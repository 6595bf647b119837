"""A readable PyTorch twin of every op: what the kernels compute, without regard to speed or memory.

The tests compare each op with its twin in float64. Shapes and names are those of csrc/library.cpp.
"""

from __future__ import annotations

import torch
from torch import Tensor

# -------------------------------------------------------------------------------------------------------------- k-means


def kmeans_assign(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest of centroids (B, K, D) to each row of x (B, N, D) -> labels (B, N), squared distances (B, N)."""
    squared = (x[:, :, None] - centroids[:, None]).square().sum(dim=-1)
    distances, labels = squared.min(dim=-1)
    return labels, distances


def kmeans_lloyd(
    x: Tensor,
    init: Tensor,
    sample_weight: Tensor | None = None,
    fixed_labels: Tensor | None = None,
    max_iter: int = 100,
    tol: float = 0.0,
    spherical: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lloyd's algorithm as csrc/kmeans/kmeans.h states it: one problem and start after another."""
    runs = []
    for b, r in torch.cartesian_prod(torch.arange(init.shape[0]), torch.arange(init.shape[1])).tolist():
        weight = x.new_ones(x.shape[1]) if sample_weight is None else sample_weight[b]
        fixed = x.new_full((x.shape[1],), -1, dtype=torch.int64) if fixed_labels is None else fixed_labels[b]
        runs.append(_lloyd(x[b], init[b, r], weight, fixed, max_iter, tol, spherical))
    fields = [torch.stack([torch.as_tensor(run[i]) for run in runs]) for i in range(4)]
    centroids, labels, inertia, n_iter = (field.view(*init.shape[:2], *field.shape[1:]) for field in fields)
    return centroids, labels, inertia, n_iter


def _lloyd(
    x: Tensor, c: Tensor, weight: Tensor, fixed: Tensor, max_iter: int, tol: float, spherical: bool
) -> tuple[Tensor, Tensor, Tensor, int]:
    def assign() -> tuple[Tensor, Tensor]:
        squared = (x[:, None] - c).square().sum(dim=-1)
        labels = torch.where(fixed >= 0, fixed, squared.argmin(dim=-1))
        return labels, squared.take_along_dim(labels[:, None], dim=1)[:, 0]

    limit = tol * x.var(dim=0, correction=0).mean()
    previous, n_iter = None, 0
    while n_iter < max_iter:
        n_iter += 1
        labels, squared = assign()
        if previous is not None and labels.equal(previous):
            break
        member = (labels[:, None] == torch.arange(len(c), device=x.device)).to(x.dtype) * weight[:, None]
        mass, sums = member.sum(dim=0), member.T @ x
        divisor = sums.norm(dim=1) if spherical else mass
        moved = torch.where(((mass > 0) & (divisor > 0))[:, None], sums / divisor[:, None], c)
        rows = ((labels == mass.argmax()) & (fixed < 0) & (weight > 0) & (squared > 0)).nonzero()[:, 0]
        farthest = rows[squared[rows].argsort(descending=True, stable=True)]
        for k, row in zip((mass == 0).nonzero()[:, 0].tolist(), farthest.tolist(), strict=False):
            moved[k] = x[row]
        shift, c, previous = (moved - c).square().sum(), moved, labels
        if shift <= limit:
            break
    labels, squared = assign()
    return c, labels, (weight * squared).sum(), n_iter


def kmeans_plus_plus(x: Tensor, sample_weight: Tensor | None, uniforms: Tensor) -> Tensor:
    """Greedy D² sampling with the given uniforms (B, R, K, L) -> rows of x (B, R, K)."""
    B, R, K, _ = uniforms.shape
    rows = x.new_empty((B, R, K), dtype=torch.int64)
    for b, r in torch.cartesian_prod(torch.arange(B), torch.arange(R)).tolist():
        weight = x.new_ones(x.shape[1]) if sample_weight is None else sample_weight[b]
        mass = torch.zeros_like(weight)
        for k in range(K):
            known = k > 0 and bool(mass.sum() > 0)
            prefix = (mass if known else weight).cumsum(dim=0)
            candidates = torch.searchsorted(prefix, uniforms[b, r, k, : None if known else 1] * prefix[-1], right=True)
            squared = weight * (x[b][:, None] - x[b, candidates]).square().sum(dim=-1).T
            left = torch.minimum(mass, squared) if k > 0 else squared
            best = left.sum(dim=1).argmin()
            rows[b, r, k], mass = candidates[best], left[best]
    return rows


# -------------------------------------------------------------------------------------------------------- kNN and graph


def knn(x: Tensor, queries: Tensor | None, k: int, metric: str, exact: bool) -> tuple[Tensor, Tensor]:
    """The whole (M, N) matrix of scores, sorted; ties keep the order of the indices."""
    rows = x if queries is None else queries
    if metric == "cosine":
        x, rows = (torch.where(t.any(1, keepdim=True), t / t.norm(dim=1, keepdim=True), 0.0) for t in (x, rows))
    distances = metric == "euclidean"
    scores = -torch.cdist(rows, x, compute_mode="donot_use_mm_for_euclid_dist") if distances else rows @ x.T
    if queries is None:
        scores.fill_diagonal_(-torch.inf)
    values, indices = scores.sort(dim=1, descending=True, stable=True)
    return (-values if distances else values)[:, :k], indices[:, :k]


def knn_to_csr(similarities: Tensor, indices: Tensor, power: float, symmetrize: str) -> tuple[Tensor, Tensor, Tensor]:
    """W dense, symmetrised, then its entries that are not zero."""
    n = similarities.shape[0]
    w = similarities.new_zeros((n, n)).scatter_(1, indices, similarities.clamp(min=0) ** power)
    w = {"none": w, "sum": w + w.T, "mean": (w + w.T) / 2, "max": torch.maximum(w, w.T)}[symmetrize]
    csr = w.to_sparse_csr()
    return csr.crow_indices(), csr.col_indices(), csr.values()


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


def pairwise_kl(log_p: Tensor, labels: Tensor, margin: float, detach_target: bool) -> Tensor:
    """The mean over similar plus the mean over dissimilar ordered pairs, by broadcasting to (B, B, K)."""
    target = log_p.detach() if detach_target else log_p
    p = target.exp()
    terms = torch.where(p[:, None] > 0, p[:, None] * (target[:, None] - log_p[None]), 0.0)
    kl = terms.sum(2)
    pairs = (labels[:, None] >= 0) & (labels >= 0) & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    same = labels[:, None] == labels
    similar, dissimilar = kl[pairs & same], (margin - kl[pairs & ~same]).clamp(min=0)
    zero = log_p.new_zeros(())
    return sum((2 * values.mean() for values in (similar, dissimilar) if values.numel()), zero)
