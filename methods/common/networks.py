"""Networks: features of unit length, a linear head on them, and the standardisation of pixels in front."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm as add_weight_norm

from methods.common.errors import UserError

# Width of the first block and convolutions per block.
_CONVNETS = {"cnn13": (128, 3), "cnn-small": (32, 1)}


class Standardise(nn.Module):
    """Per-channel (x - mean) / deviation; the constants live in the checkpoint beside the weights."""

    def __init__(self, n_channels: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_channels, 1, 1))
        self.register_buffer("deviation", torch.ones(n_channels, 1, 1))

    def set(self, mean: Tensor, deviation: Tensor) -> None:
        self.mean.copy_(mean[:, None, None])
        self.deviation.copy_(deviation[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.deviation


class ConvNet(nn.Module):
    """The "13-layer" network of Laine and Aila (ICLR 2017) and its small sisters.

    Two blocks of 3 x 3 convolutions (width, 2 width), each with a 2 x 2 max-pool behind it; then 3 x 3 without padding
    (4 width), 1 x 1 (2 width), 1 x 1 (width), and the mean over all positions. BatchNorm and LeakyReLU(0.1) follow each
    convolution. A pool that would leave less than 4 pixels, too few for the unpadded convolution, is left out.

    Args:
        width: channels of the first block, and the number of features.
        convs_per_block: 3 in the 13-layer network.
        weight_norm: weight normalisation on convolutions and head.
    """

    def __init__(
        self,
        n_channels: int,
        image_size: tuple[int, int],
        n_outputs: int,
        *,
        width: int,
        convs_per_block: int,
        weight_norm: bool,
    ):
        super().__init__()
        norm = add_weight_norm if weight_norm else nn.Identity()
        self.standardise = Standardise(n_channels)
        self.body = nn.Sequential(*self._body(n_channels, min(image_size), width, convs_per_block, norm))
        self.head = norm(nn.Linear(width, n_outputs))

    @staticmethod
    def _body(channels: int, side: int, width: int, convs_per_block: int, norm) -> Iterator[nn.Module]:
        def conv(n_in: int, n_out: int, kernel: int, padding: int) -> Iterator[nn.Module]:
            yield norm(nn.Conv2d(n_in, n_out, kernel, padding=padding))
            yield nn.BatchNorm2d(n_out)
            yield nn.LeakyReLU(0.1)

        for block_width in (width, 2 * width):
            for _ in range(convs_per_block):
                yield from conv(channels, block_width, 3, 1)
                channels = block_width
            if side // 2 >= 4:
                yield nn.MaxPool2d(2)
                side //= 2
        yield from conv(channels, 4 * width, 3, 0)
        yield from conv(4 * width, 2 * width, 1, 0)
        yield from conv(2 * width, width, 1, 0)
        yield nn.AdaptiveAvgPool2d(1)
        yield nn.Flatten()

    def features(self, images: Tensor) -> Tensor:
        """Features of unit length, (N, width), of images (N, C, H, W) in [0, 1]."""
        return F.normalize(self.body(self.standardise(images)), dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, n_outputs)."""
        return self.head(self.features(images))


def build(name: str, *, n_channels: int, image_size: tuple[int, int], n_outputs: int, weight_norm: bool) -> ConvNet:
    """The network called `name`; all arguments together are what a checkpoint needs to build it again."""
    if name not in _CONVNETS:
        raise UserError(f"--network {name} is unknown; there are {', '.join(_CONVNETS)}")
    width, convs_per_block = _CONVNETS[name]
    return ConvNet(
        n_channels,
        image_size,
        n_outputs,
        width=width,
        convs_per_block=convs_per_block,
        weight_norm=weight_norm,
    )
