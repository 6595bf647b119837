"""Soft assignment to centroids and the pairwise contrastive loss on it."""

from __future__ import annotations

from torch import Tensor

from . import ops


def soft_assign(x: Tensor, centroids: Tensor) -> Tensor:
    """Log-probabilities of each cluster: log p_nk = −|x_n − μ_k|² − log Σ_l exp(−|x_n − μ_l|²).

    Args:
        x: (N, D) float, any strides; half precision is computed in float32.
        centroids: (K, D) float, K ≥ 1, of the dtype of x.

    Returns:
        (N, K) log-probabilities, differentiable once in both arguments.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes or devices differ, centroids is empty, or a row is not finite.

    Source: ClusterNet, eq. 16.
    """
    return ops.soft_assign(
        ops.float_tensor("soft_assign", "x", x), ops.float_tensor("soft_assign", "centroids", centroids)
    )


def pairwise_kl(log_p: Tensor, labels: Tensor, *, margin: float = 2.0, detach_target: bool = False) -> Tensor:
    """Contrastive symmetric KL over all pairs of rows, without a B × B matrix: rows of one label attract, others repel.

    With p_i = exp(log_p_i) and KL_ij = Σ_k p_ik (log p_ik − log p_jk), over pairs i ≠ j:
    mean over equal labels of KL_ij + KL_ji, plus mean over different labels of [m − KL_ij]₊ + [m − KL_ji]₊. The means
    are the same over ordered and over unordered pairs; an empty set of pairs adds 0. Extra memory is O(B·K). Where
    log_p requires a gradient, it is computed along with the loss, from the same pairs.

    A log-probability of −inf is a probability of 0: 0 · log 0 is 0, and KL_ij is infinite where p_i is positive and p_j
    is not. Such a pair of different labels is beyond every margin; of equal labels, it makes the loss infinite.

    Args:
        log_p: (B, K) log-probabilities, as from `soft_assign` or log_softmax; any strides, any float dtype.
        labels: (B,) integers; −1 marks rows that are in no pair.
        margin: m, in nats.
        detach_target: hold the first argument of each KL fixed in the gradient, ClusterNet's "first fixing p".

    Returns:
        The loss, a scalar of the dtype of log_p (float32 for half precision), differentiable once.

    Raises:
        TypeError: log_p is not a floating-point tensor, or labels not an integer one.
        ValueError: shapes or devices do not match, log_p holds NaN or +inf, a label is below −1, or margin is negative.

    Source: ClusterNet, eqs. 6 and 7; Hsu & Kira 2016.
    """
    log_p = ops.float_tensor("pairwise_kl", "log_p", log_p)
    return ops.pairwise_kl(log_p, ops.label_tensor("pairwise_kl", "labels", labels), margin, detach_target)
