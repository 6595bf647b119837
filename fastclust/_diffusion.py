"""Label diffusion on a graph, and pseudo-labels from it."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops


class DiffusionResult(NamedTuple):
    """What `diffuse` returns."""

    f: Tensor
    """(N, C) the diffused columns."""
    residual: Tensor
    """(C,) |y − (I − αS) f| / |y| of each column, computed from the f returned; 0 where a column of y is 0."""
    n_iter: Tensor
    """(C,) int64: the steps each column took."""


class PseudoLabels(NamedTuple):
    """What `propagate_labels` returns."""

    labels: Tensor
    """(N,) int64 in [0, C): the true label where there is one, elsewhere the class of the highest score."""
    weights: Tensor
    """(N,) ω in [0, 1]: how certain each label is; 1 where it is the true one, 0 where no label reaches."""
    class_weights: Tensor
    """(C,) ζ: (N / C) / (points of the class); 0 for an empty class."""
    scores: Tensor
    """(N, C) rows that sum to 1, or 0 where no label reaches."""
    residual: Tensor
    """(C,) how far the diffusion is from solved; see `DiffusionResult`."""
    n_iter: Tensor
    """(C,) int64: the steps each class took."""


def _csr(op: str, graph: object, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """crow, col and weights of a square CSR matrix, the weights in at least `dtype`."""
    if not isinstance(graph, Tensor) or graph.layout != torch.sparse_csr:
        what = f"a {graph.layout} tensor" if isinstance(graph, Tensor) else type(graph).__name__
        raise TypeError(f"{op}: graph must be a torch.sparse_csr tensor, got {what}")
    if graph.dim() != 2 or graph.shape[0] != graph.shape[1]:
        raise ValueError(f"{op}: graph must be (N, N), got {tuple(graph.shape)}")
    weights = ops.float_tensor(op, "graph", graph.values())
    if dtype is not None:
        weights = weights.to(torch.promote_types(weights.dtype, dtype))
    return graph.crow_indices().long(), graph.col_indices().long(), weights


def diffuse(graph: Tensor, y: Tensor, *, alpha: float = 0.99, tol: float = 1e-6, max_iter: int = 20) -> DiffusionResult:
    """Solves (I − αS) F = Y, S = D^-½ W D^-½, for all columns at once by conjugate gradients.

    Each column has its own step sizes and stops by itself; columns are independent, so the result does not depend on
    which others are solved along. The condition number is at most (1 + α) / (1 − α), 199 at α = 0.99: about 100 steps
    bring 1e-6, the 20 of the literature rather 1e-1 on hard graphs. `residual` tells. In float32 it cannot fall below
    about 1e-7 / (1 − α), whatever `tol`. torch.compile does not trace sparse CSR tensors: in a compiled function,
    call `ops.diffuse` with crow, col and weights.

    Args:
        graph: (N, N) sparse CSR, the weights W: symmetric (assumed, not checked), finite, not negative, columns
            ascending in each row, as `knn_graph` makes it. A row without weights has degree 0, taken as 1: F = Y there.
        y: (N, C) float, any strides. Computed in the wider of its dtype and the graph's, at least float32.
        alpha: how far labels spread, in [0, 1).
        tol: a column stops when its residual by the recurrence of conjugate gradients is at most this.
        max_iter: no column takes more steps.

    Returns:
        f (N, C), residual (C,) and n_iter (C,) int64, on the graph's device.

    Raises:
        TypeError: graph is not a CSR tensor, or a dtype is not floating-point.
        ValueError: a shape, a parameter, an index or a weight is wrong, or y is not finite; the text names it.

    Source: Zhou et al. 2004, "Learning with local and global consistency"; the settings of Iscen et al. 2019; eq. 2 of
    CycleCluster with μ = 1/α − 1.
    """
    y = ops.float_tensor("diffuse", "y", y)
    if y.dim() != 2:
        raise ValueError(f"diffuse: y must be (N, C), got {tuple(y.shape)}")
    crow, col, weights = _csr("diffuse", graph, y.dtype)
    return DiffusionResult(*ops.diffuse(crow, col, weights, y.to(weights.dtype), alpha, tol, max_iter))


def propagate_labels(
    graph: Tensor,
    labels: Tensor,
    *,
    n_classes: int | None = None,
    alpha: float = 0.99,
    tol: float = 1e-6,
    max_iter: int = 20,
) -> PseudoLabels:
    """Spreads known labels over a graph: pseudo-labels with a certainty for each point and a weight for each class.

    Y holds 1 / (labelled points of c) on the labelled points of class c. F = `diffuse`(Y) gives Z = max(F, 0), rows
    scaled to sum 1; ω_i = (1 − H(z_i) / log C) / max_j (1 − H(z_j) / log C); ζ_c = (N / C) / |points of class c|.
    Labelled points keep their label with ω = 1. Where no label reaches, Z is 0: ω is 0, the label is class 0 for form's
    sake, and the point counts in no class.

    Args:
        graph: (N, N) sparse CSR, symmetric; see `diffuse`.
        labels: (N,) integers: the class of each labelled point, −1 elsewhere.
        n_classes: C; by default the largest label + 1.
        alpha, tol, max_iter: see `diffuse`.

    Returns:
        labels (N,) int64, weights ω (N,), class_weights ζ (C,), scores Z (N, C), residual (C,) and n_iter (C,).

    Raises:
        TypeError: graph is not a CSR tensor, or labels not an integer one.
        ValueError: labels does not match graph, no point is labelled, or a label is outside [−1, C).

    Warns:
        UserWarning: some class is empty: no point is labelled with it and none takes its label; its ζ is 0.

    Source: Iscen et al. 2019, "Label propagation for deep semi-supervised learning", eqs. 7-11; CycleCluster III-B.
    """
    op = "propagate_labels"
    _, _, weights = _csr(op, graph)
    labels = ops.label_tensor(op, "labels", labels)
    n_points = graph.shape[0]
    if labels.shape != (n_points,):
        raise ValueError(f"{op}: labels must be ({n_points},), got {tuple(labels.shape)}")
    if n_points == 0 or (lowest := int(labels.min())) < -1:
        raise ValueError(f"{op}: " + ("graph is empty" if n_points == 0 else f"labels holds {lowest}, below -1"))
    if (highest := int(labels.max())) < 0:
        raise ValueError(f"{op}: labels holds no labelled point")
    if n_classes is None:
        n_classes = highest + 1
    if highest >= n_classes:
        raise ValueError(f"{op}: labels holds {highest}, but n_classes is {n_classes}")

    labelled = labels >= 0
    y = torch.zeros(n_points, n_classes, dtype=weights.dtype, device=weights.device)
    y[labelled, labels[labelled]] = 1.0
    y /= y.sum(0).clamp(min=1.0)
    with ops.told_by(op):
        diffused = diffuse(graph, y, alpha=alpha, tol=tol, max_iter=max_iter)
    z = diffused.f.clamp_(min=0)
    total = z.sum(1, keepdim=True)
    reached = total.squeeze(1) > 0
    scores = z / torch.where(reached, total.squeeze(1), 1.0).unsqueeze(1)

    entropy = torch.special.entr(scores).sum(1) / math.log(max(n_classes, 2))
    certainty = torch.where(reached, (1 - entropy).clamp(min=0), 0.0)
    certainty = certainty / certainty.max().clamp(min=torch.finfo(certainty.dtype).tiny)
    pseudo = torch.where(labelled, labels, scores.argmax(1))
    omega = torch.where(labelled, 1.0, certainty)

    counts = torch.bincount(pseudo[reached | labelled], minlength=n_classes)
    if empty := int((counts == 0).sum()):
        warnings.warn(f"{op}: {empty} of {n_classes} classes are empty: class weight 0", stacklevel=2)
    zeta = torch.where(counts > 0, n_points / n_classes / counts.clamp(min=1), 0.0).to(weights.dtype)
    return PseudoLabels(pseudo, omega, zeta, scores, diffused.residual, diffused.n_iter)
