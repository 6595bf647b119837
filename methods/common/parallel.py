"""One training on several processes, as `torchrun` starts them: the result is one process's up to rounding.

Every process holds all data and makes the same draws; each works on its share of every batch. What has to be summed
over a batch (gradients, the statistics of batch normalisation, losses) is summed over the processes. Without torchrun
there is one process, and nothing here costs anything.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Join the processes that torchrun started, if it did: NCCL where there is a GPU for each, else gloo.

    Only the first process prints.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if torch.cuda.device_count() >= local_world_size():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl")
    else:
        dist.init_process_group("gloo")
    try:
        with contextlib.nullcontext() if is_first() else contextlib.redirect_stdout(None):
            yield
    finally:
        dist.destroy_process_group()


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world_size() -> int:
    """Processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


def share(n: int) -> slice:
    """This process's part of n items in a row; parts differ by one at most."""
    return slice(n * rank() // world_size(), n * (rank() + 1) // world_size())


def from_first(value: Any) -> Any:
    """The first process's value (whatever can be pickled) on all of them."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def add_up(tensor: Tensor) -> Tensor:
    """Sum over the processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def add_up_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum the gradients over the processes, in one message."""
    if world_size() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = add_up(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def gather(part: Tensor, n: int) -> Tensor:
    """All n rows where each process has the rows of its `share(n)`; every process gets the same bits."""
    if world_size() == 1:
        return part
    whole = part.new_zeros(n, *part.shape[1:])
    whole[share(n)] = part
    return add_up(whole)


def share_batch_norm(network: nn.Module) -> nn.Module:
    """Have a network's batch normalisation take its statistics from the shares of all processes together."""
    if world_size() > 1:
        for module in network.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = _BatchNorm  # the same parameters and buffers; no state of its own
    return network


class _BatchNorm(nn.BatchNorm2d):
    """Batch normalisation over all processes. (torch's SyncBatchNorm does not run on the CPU.)"""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        x32, axes = x.float(), (0, 2, 3)
        count = add_up(torch.tensor(float(x.numel() // x.shape[1]), device=x.device))
        mean = _Sum.apply(x32.sum(axes)) / count
        centred = x32 - mean[:, None, None]
        variance = _Sum.apply(centred.square().sum(axes)) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


class _Sum(torch.autograd.Function):
    """Sum over the processes; its gradient is summed over them too, for each process's loss holds the sum."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return add_up(x.clone())

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return add_up(gradient.clone())
