"""What the passes of every trainer are made of: the device, batches of indices, outputs of a whole image set."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from methods.common.augment import to_float
from methods.common.errors import UserError


def pick_device(name: str, threads: int = 0) -> torch.device:
    """The device called `name`; `auto` is CUDA where torch can use it, else the CPU.

    `threads` limits torch on the CPU; 0 leaves it as it is.
    """
    if threads < 0:
        raise UserError(f"--threads {threads} must not be below 0")
    if threads:
        torch.set_num_threads(threads)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def shuffled(indices: Tensor, n_batches: int) -> tuple[Tensor, ...]:
    """Each index once, in random order, in batches whose sizes differ by one at most."""
    return indices[torch.randperm(len(indices), device=indices.device)].tensor_split(n_batches)


def cycled(indices: Tensor, n_batches: int, batch: int) -> tuple[Tensor, ...]:
    """Full batches from the indices in random order, begun anew in another order whenever they are used up."""
    rounds = math.ceil(n_batches * batch / len(indices))
    order = torch.cat([indices[torch.randperm(len(indices), device=indices.device)] for _ in range(rounds)])
    return order[: n_batches * batch].split(batch)


def cosine(peak: float, epoch: float, end: float) -> float:
    """Learning rate peak · ½(1 + cos(π · epoch / end)); `epoch` may be a fraction."""
    return peak * 0.5 * (1 + math.cos(math.pi * min(epoch / end, 1)))


@torch.no_grad()
def infer(function: Callable[[Tensor], Tensor], images: Tensor, batch: int = 1000) -> Tensor:
    """`function` of all uint8 images under the evaluation transform, a batch at a time."""
    return torch.cat([function(to_float(part)) for part in images.split(batch)])
