"""ClusterNet's convolutional autoencoder, with the cluster centres that give its features a class."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastclust
from methods.common.augment import to_float
from methods.common.data import ImageData
from methods.common.errors import UserError
from methods.common.pretraining import Pretraining, Settings

NAME = "cluster-autoencoder"

_FILTERS, _KERNELS = (32, 64, 128), (5, 5, 3)


class ClusterAutoencoder(nn.Module):
    """Three convolutions and a fully connected layer with tanh, the same mirrored, and K centres in between.

    InstanceNorm and LeakyReLU follow each convolution but the decoder's last, which is linear; dropout follows every
    layer but that one. A convolution of stride s leaves ⌈side / s⌉ pixels.

    Args:
        n_outputs: K, how many centres.
        n_features: D, dimensions of the latent space.
        strides: of the three convolutions; at least 2 pixels must be left, since InstanceNorm makes a single one 0.
        dropout: share of a layer's outputs set to 0 in training.
        drop_features: whether the clustering too sees the features after dropout, or the decoder alone.
    """

    def __init__(
        self,
        n_channels: int,
        image_size: tuple[int, int],
        n_outputs: int,
        *,
        n_features: int,
        strides: tuple[int, int, int],
        dropout: float,
        drop_features: bool,
    ):
        super().__init__()
        sizes = [tuple(image_size)]
        for stride in strides:
            sizes.append(tuple(-(-side // stride) for side in sizes[-1]))
        height, width = sizes[-1]
        if height * width < 2:
            raise UserError(f"--strides {strides} leave a single pixel of {image_size[0]} x {image_size[1]}")
        channels = (n_channels, *_FILTERS)
        n_flat = channels[-1] * height * width

        def block(layer: nn.Module, n_out: int) -> Iterator[nn.Module]:
            yield from (layer, nn.InstanceNorm2d(n_out), nn.LeakyReLU(), nn.Dropout(dropout))

        encoder: list[nn.Module] = []
        decoder: list[nn.Module] = [nn.Linear(n_features, n_flat), nn.Tanh(), nn.Dropout(dropout)]
        decoder.append(nn.Unflatten(1, (channels[-1], height, width)))
        for level, (kernel, stride) in enumerate(zip(_KERNELS, strides, strict=True)):
            conv = nn.Conv2d(channels[level], channels[level + 1], kernel, stride, padding=kernel // 2)
            encoder += block(conv, channels[level + 1])
        for level in (2, 1, 0):
            kernel, stride = _KERNELS[level], strides[level]
            # What the stride rounded away on the way in, per side.
            short = [
                large - (small - 1) * stride - 1 for large, small in zip(sizes[level], sizes[level + 1], strict=True)
            ]
            conv = nn.ConvTranspose2d(
                channels[level + 1], channels[level], kernel, stride, padding=kernel // 2, output_padding=short
            )
            decoder += block(conv, channels[level]) if level else [conv]
        self.encoder = nn.Sequential(*encoder, nn.Flatten(), nn.Linear(n_flat, n_features), nn.Tanh())
        self.decoder = nn.Sequential(*decoder)
        self.dropout = nn.Dropout(dropout)
        self.drop_features = drop_features
        self.register_buffer("centres", torch.zeros(n_outputs, n_features))
        self.register_buffer("counts", torch.zeros(n_outputs))

    def features(self, images: Tensor) -> Tensor:
        """z, (N, D) in (-1, 1), of images (N, C, H, W) in [0, 1]."""
        z = self.encoder(images)
        return self.dropout(z) if self.drop_features else z

    def decode(self, z: Tensor) -> Tensor:
        """Images (N, C, H, W) of features (N, D); no function holds them within [0, 1]."""
        return self.decoder(z if self.drop_features else self.dropout(z))

    def forward(self, images: Tensor) -> Tensor:
        """Log-probabilities (N, K) of the clusters; the nearest centre has the greatest."""
        return fastclust.soft_assign(self.features(images), self.centres)


def build(name: str, **options: Any) -> ClusterAutoencoder:
    """The network from what a checkpoint holds of its architecture; `name` is NAME."""
    return ClusterAutoencoder(**options)


def reconstruction_loss(decoded: Tensor, images: Tensor, scale: str = "sum") -> Tensor:
    """Squared errors, `sum`med over an image or their `mean`, and the mean over images (ClusterNet, eq. 8)."""
    error = (decoded - images).square().flatten(start_dim=1)
    return (error.sum(dim=1) if scale == "sum" else error.mean(dim=1)).mean()


class Reconstruction(Pretraining):
    """Adam on the reconstruction loss alone (ClusterNet, 5.1)."""

    title, loss_name = "autoencoder", "L_recon"

    def __init__(
        self,
        network: ClusterAutoencoder,
        architecture: dict[str, Any],
        data: ImageData,
        settings: Settings,
        folder: Path,
    ):
        # Which features the clustering sees does not matter yet.
        shape = {name: value for name, value in architecture.items() if name != "drop_features"}
        optimizer = torch.optim.Adam(network.parameters(), lr=settings.lr, fused=True)
        super().__init__(network, shape, optimizer, data, settings, folder)

    def loss(self, images: Tensor) -> Tensor:
        pixels = to_float(images)
        return reconstruction_loss(self.network.decode(self.network.features(pixels)), pixels)
