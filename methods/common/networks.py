"""Classifiers: pixels standardised, features (of unit length, unless asked otherwise), a linear head on them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm as add_weight_norm

from methods.common.errors import UserError

# Width of the first block and convolutions per block.
_CONVNETS = {"cnn13": (128, 3), "cnn-small": (32, 1)}
_FLAT_WIDTH, _FLAT_FEATURES = 32, 256
NAMES = (*_CONVNETS, "cnn-flat", "resnet18")


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


class Classifier(nn.Module):
    """A body that gives `n_features` numbers per image, brought to unit length or not, and a linear head on them."""

    def __init__(self, n_channels: int, body: nn.Module, n_features: int, n_outputs: int, unit_length: bool = True):
        super().__init__()
        self.unit_length = unit_length
        self.standardise = Standardise(n_channels)
        self.body = body
        self.head = nn.Linear(n_features, n_outputs)

    def features(self, images: Tensor) -> Tensor:
        """Features, float32 (N, n_features), of images (N, C, H, W) in [0, 1]."""
        images = self.standardise(images).contiguous(memory_format=torch.channels_last)
        features = self.body(images).float()
        return F.normalize(features, dim=1) if self.unit_length else features

    def forward(self, images: Tensor) -> Tensor:
        """Logits, float32 (N, n_outputs)."""
        return self.head(self.features(images)).float()


class Ensemble(nn.Module):
    """Classifiers that answer together: by the mean of their probabilities."""

    def __init__(self, members: list[Classifier]):
        super().__init__()
        self.members = nn.ModuleList(members)

    def features(self, images: Tensor) -> Tensor:
        """All members' features side by side, float32 (N, members · n_features)."""
        return torch.cat([member.features(images) for member in self.members], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Log of the mean probability, float32 (N, n_outputs)."""
        logs = torch.stack([member(images).log_softmax(dim=1) for member in self.members])
        return logs.logsumexp(dim=0) - math.log(len(logs))


def build(
    name: str,
    *,
    n_channels: int,
    image_size: tuple[int, int],
    n_outputs: int,
    weight_norm: bool,
    unit_length: bool = True,
    members: int = 1,
) -> Classifier | Ensemble:
    """The network called `name`; all arguments together are what a checkpoint needs to build it again.

    `weight_norm`: weight normalisation on convolutions and head. `unit_length`: of the features. `members`: so many of
    them in one ensemble.
    """
    if members > 1:
        shape = {"n_channels": n_channels, "image_size": image_size, "n_outputs": n_outputs}
        kind = {"weight_norm": weight_norm, "unit_length": unit_length}
        return Ensemble([build(name, **shape, **kind) for _ in range(members)])
    if name in _CONVNETS:
        width, convs_per_block = _CONVNETS[name]
        body = nn.Sequential(*_convnet(n_channels, min(image_size), width, convs_per_block))
    elif name == "cnn-flat":
        width, body = _FLAT_FEATURES, nn.Sequential(*_flat(n_channels, image_size))
    elif name == "resnet18":
        width, body = 512, _resnet18(n_channels, min(image_size))
    else:
        raise UserError(f"--network {name} is unknown; there are {', '.join(NAMES)}")
    network = Classifier(n_channels, body, width, n_outputs, unit_length)
    if weight_norm:
        for module in list(network.modules()):
            if isinstance(module, nn.Conv2d | nn.Linear):
                add_weight_norm(module)
    return network


def _convnet(channels: int, side: int, width: int, convs_per_block: int) -> Iterator[nn.Module]:
    """The "13-layer" network of Laine and Aila (ICLR 2017) and its small sister.

    Two blocks of 3 x 3 convolutions (width, 2 width), each with a 2 x 2 max-pool behind it; then 3 x 3 without padding
    (4 width), 1 x 1 (2 width), 1 x 1 (width), and the mean over all positions. BatchNorm and LeakyReLU(0.1) follow each
    convolution. A pool that would leave less than 4 pixels, too few for the unpadded convolution, is left out.
    """

    def conv(n_in: int, n_out: int, kernel: int, padding: int) -> Iterator[nn.Module]:
        yield nn.Conv2d(n_in, n_out, kernel, padding=padding)
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


def _flat(channels: int, image_size: tuple[int, int]) -> Iterator[nn.Module]:
    """For small grey images: 3 x 3 convolutions (32, 64, … maps) of stride 2 down to 4 pixels, and a linear layer on
    all positions, where `_convnet` takes their mean. BatchNorm and LeakyReLU(0.1) follow each. The first convolution
    keeps the size of images of up to 16 pixels.
    """
    sides, width, stride = tuple(image_size), _FLAT_WIDTH, 1 if min(image_size) <= 16 else 2
    while True:
        yield nn.Conv2d(channels, width, 3, stride, padding=1)
        yield nn.BatchNorm2d(width)
        yield nn.LeakyReLU(0.1)
        sides, channels = tuple(-(-side // stride) for side in sides), width
        if min(sides) <= 4:
            break
        width, stride = 2 * width, 2
    yield nn.Flatten()
    yield nn.Linear(channels * math.prod(sides), _FLAT_FEATURES)
    yield nn.BatchNorm1d(_FLAT_FEATURES)
    yield nn.LeakyReLU(0.1)


def _resnet18(n_channels: int, side: int) -> nn.Module:
    """torchvision's ResNet-18 up to its 512 features; images of up to 32 pixels get a 3 x 3 stem without pooling."""
    from torchvision.models import resnet18

    network = resnet18()
    if side <= 32:
        network.conv1 = nn.Conv2d(n_channels, 64, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    elif n_channels != 3:
        network.conv1 = nn.Conv2d(n_channels, 64, 7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.fc = nn.Identity()
    return network
