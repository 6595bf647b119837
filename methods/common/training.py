"""What the passes of every trainer are made of: the device, batches of indices, losses, outputs of whole image sets."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from methods.common import parallel
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
    torch.backends.cudnn.deterministic = True  # a resumed run is to end with the same bits
    if name == "auto":
        one_each = torch.cuda.is_available() and torch.cuda.device_count() >= parallel.local_world_size()
        return torch.device("cuda", torch.cuda.current_device()) if one_each else torch.device("cpu")
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
    mine = images[parallel.share(len(images))]
    return parallel.gather(torch.cat([function(to_float(part)) for part in mine.split(batch)]), len(images))


@torch.no_grad()
def settle_statistics(network: nn.Module, images: Tensor, batch: int) -> None:
    """Take batch normalisation's statistics anew, from uint8 images (N, C, H, W) as they are, about `batch` at once.

    Those that training leaves are of the images that it saw, mixed or strongly changed, and of weights of some steps
    ago: images as they are have others, and a network in evaluation mode then gathers them in few clusters.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # all batches count alike
    network.train()
    parts = max(len(images) // batch, 1)
    for part in range(parts):
        network(to_float(images[part::parts]))  # a stride: images may lie sorted by class
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum


def mean_loss(total: Tensor, n_steps: int) -> float:
    """The mean of a pass's losses, of which this process has its share; it must be finite."""
    mean = float(parallel.add_up(total)) / n_steps
    if not math.isfinite(mean):
        raise UserError("the loss is no longer finite; a lower --lr may help")
    return mean


def error_rate(predicted: Tensor, truth: Tensor) -> float:
    """Per cent of wrong classes."""
    return 100 * float((predicted != truth).double().mean())
