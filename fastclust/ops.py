"""Typed wrappers over `torch.ops.fastclust`: one function per op of csrc/library.cpp, with the shapes stated there.

Half-precision inputs are computed and returned in float32: k-means and kNN on CUDA read them as they are, all else gets
a copy in float32. An op's complaint about its input is raised as ValueError.
Beside each wrapper stands what torch must know of the op: its fake kernel (shapes, for torch.compile) and its gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ._library import C as C  # importing it registers the ops

_ops = torch.ops.fastclust


def float_tensor(op: str, name: str, value: object) -> Tensor:
    """`value` as the float32 or float64 tensor that the kernels take.

    Raises:
        TypeError: `value` is not a tensor of a floating-point dtype.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{op}: {name} must have a floating-point dtype, got {value.dtype}")
    return value if value.dtype == torch.float64 else value.float()


def stored_tensor(op: str, name: str, value: object) -> Tensor:
    """As `float_tensor`, but float16 and bfloat16 on CUDA stay as they are: the k-means and kNN kernels widen them.

    Raises:
        TypeError: `value` is not a tensor of a floating-point dtype.
    """
    if isinstance(value, Tensor) and value.is_cuda and value.dtype in (torch.float16, torch.bfloat16):
        return value
    return float_tensor(op, name, value)


def computed_dtype(x: Tensor) -> torch.dtype:
    """What is computed in, and returned, for rows like x: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def label_tensor(op: str, name: str, value: object) -> Tensor:
    """`value` as the int64 tensor that the kernels take.

    Raises:
        TypeError: `value` is not a tensor of an integer dtype.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{op}: {name} must have an integer dtype, got {value.dtype}")
    return value.long()


@contextlib.contextmanager
def told_by(op: str) -> Iterator[None]:
    """Complaints of the functions called inside are raised in the name of `op`, which the user has called."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{op}: {str(error).partition(': ')[2]}") from None


def _call(op: Callable[..., Any], *args: object) -> Any:
    if torch.compiler.is_compiling():
        return op(*args)
    try:
        return op(*args)
    except (torch.OutOfMemoryError, NotImplementedError):
        raise
    except RuntimeError as error:
        # csrc/common/tensor.h: require() begins each message with the public function's name, lower case and a colon.
        name, colon, _ = str(error).partition(": ")
        if colon and name.isidentifier() and name.islower():
            raise ValueError(str(error)) from None
        raise


# -------------------------------------------------------------------------------------------------------------- k-means


def kmeans_lloyd(
    x: Tensor,
    init: Tensor,
    sample_weight: Tensor | None,
    fixed_labels: Tensor | None,
    max_iter: int,
    tol: float,
    spherical: bool,
    exact: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lloyd's algorithm from R starts for each of B problems -> centroids, labels, inertia, n_iter."""
    result: tuple[Tensor, Tensor, Tensor, Tensor] = _call(
        _ops.kmeans_lloyd, x, init, sample_weight, fixed_labels, max_iter, tol, spherical, exact
    )
    return result


@torch.library.register_fake("fastclust::kmeans_lloyd")
def _(x, init, sample_weight, fixed_labels, max_iter, tol, spherical, exact):  # type: ignore[no-untyped-def]
    starts = init.shape[:2]
    n_iter = x.new_empty(starts, dtype=torch.int64)
    return torch.empty_like(init), x.new_empty((*starts, x.shape[1]), dtype=torch.int64), init.new_empty(starts), n_iter


def kmeans_plus_plus(x: Tensor, sample_weight: Tensor | None, uniforms: Tensor) -> Tensor:
    """Rows of x chosen by D² sampling, (B, R, K)."""
    rows: Tensor = _call(_ops.kmeans_plus_plus, x, sample_weight, uniforms)
    return rows


@torch.library.register_fake("fastclust::kmeans_plus_plus")
def _(x, sample_weight, uniforms):  # type: ignore[no-untyped-def]
    return x.new_empty(uniforms.shape[:3], dtype=torch.int64)


def kmeans_assign(x: Tensor, centroids: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """The nearest centroid of each row and the squared distance to it, (B, N) each."""
    result: tuple[Tensor, Tensor] = _call(_ops.kmeans_assign, x, centroids, exact)
    return result


@torch.library.register_fake("fastclust::kmeans_assign")
def _(x, centroids, exact):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[:2], dtype=torch.int64), centroids.new_empty(x.shape[:2])


# -------------------------------------------------------------------------------------------------------- kNN and graph


def knn(x: Tensor, queries: Tensor | None, k: int, metric: str, exact: bool) -> tuple[Tensor, Tensor]:
    """The k nearest rows of x for each query, best first: values and indices, (M, k) each."""
    result: tuple[Tensor, Tensor] = _call(_ops.knn, x, queries, k, metric, exact)
    return result


@torch.library.register_fake("fastclust::knn")
def _(x, queries, k, metric, exact):  # type: ignore[no-untyped-def]
    shape = ((x if queries is None else queries).shape[0], k)
    return x.new_empty(shape, dtype=computed_dtype(x)), x.new_empty(shape, dtype=torch.int64)


def knn_to_csr(similarities: Tensor, indices: Tensor, power: float, symmetrize: str) -> tuple[Tensor, Tensor, Tensor]:
    """Neighbour lists -> crow (N + 1), col (E), weights (E) of the affinity graph."""
    result: tuple[Tensor, Tensor, Tensor] = _call(_ops.knn_to_csr, similarities, indices, power, symmetrize)
    return result


@torch.library.register_fake("fastclust::knn_to_csr")
def _(similarities, indices, power, symmetrize):  # type: ignore[no-untyped-def]
    edges = torch.library.get_ctx().new_dynamic_size()
    col = indices.new_empty((edges,))
    return indices.new_empty((similarities.shape[0] + 1,)), col, similarities.new_empty((edges,))


# ------------------------------------------------------------------------------------------------------------ diffusion


def diffuse(
    crow: Tensor, col: Tensor, weights: Tensor, y: Tensor, alpha: float, tol: float, max_iter: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(I - alpha S) F = Y by block conjugate gradients -> f (N, C), residual (C,), n_iter (C,)."""
    result: tuple[Tensor, Tensor, Tensor] = _call(_ops.diffuse, crow, col, weights, y, alpha, tol, max_iter)
    return result


@torch.library.register_fake("fastclust::diffuse")
def _(crow, col, weights, y, alpha, tol, max_iter):  # type: ignore[no-untyped-def]
    columns = (y.shape[1],)
    return torch.empty_like(y, memory_format=torch.contiguous_format), y.new_empty(columns), crow.new_empty(columns)


# ------------------------------------------------------------------------------------------------------ soft assignment


def soft_assign(x: Tensor, centroids: Tensor) -> Tensor:
    """log softmax_k of -|x - mu_k|², (N, K); differentiable in both."""
    log_p: Tensor = _call(_ops.soft_assign, x, centroids)
    return log_p


@torch.library.register_fake("fastclust::soft_assign")
def _(x, centroids):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0], centroids.shape[0]))


@torch.library.register_fake("fastclust::soft_assign_backward")
def _(grad, x, centroids, log_p):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), centroids.new_empty(centroids.shape)


def _soft_assign_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _soft_assign_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, centroids, log_p = ctx.saved_tensors
    grads: tuple[Tensor, Tensor] = _ops.soft_assign_backward(grad, x, centroids, log_p)
    return grads


torch.library.register_autograd("fastclust::soft_assign", _soft_assign_backward, setup_context=_soft_assign_setup)


# ---------------------------------------------------------------------------------------------------------- pairwise KL


def pairwise_kl(log_p: Tensor, labels: Tensor, margin: float, detach_target: bool) -> Tensor:
    """The loss over all pairs, a scalar; its gradient is computed along with it where log_p asks for one."""
    with_grad = torch.is_grad_enabled() and log_p.requires_grad
    loss: Tensor = _call(_ops.pairwise_kl, log_p, labels, margin, detach_target, with_grad)[0]
    return loss


@torch.library.register_fake("fastclust::pairwise_kl")
def _(log_p, labels, margin, detach_target, with_grad):  # type: ignore[no-untyped-def]
    return log_p.new_empty(()), log_p.new_empty((log_p.shape[0] if with_grad else 0, log_p.shape[1]))


def _pairwise_kl_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _pairwise_kl_backward(ctx: Any, grad_loss: Tensor, _: Tensor | None) -> tuple[Tensor, None, None, None, None]:
    (grad,) = ctx.saved_tensors
    return grad_loss * grad, None, None, None, None


torch.library.register_autograd("fastclust::pairwise_kl", _pairwise_kl_backward, setup_context=_pairwise_kl_setup)

# Distances and KL lose their meaning in half precision: under autocast both differentiable ops compute in float32.
for _op in ("soft_assign", "pairwise_kl"):
    for _device in ("cpu", "cuda"):
        torch.library.register_autocast(f"fastclust::{_op}", _device, torch.float32)
