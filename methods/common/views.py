"""Views for learning from images without classes: strong random changes of whole batches, drawn on their device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.common.augment import to_float

_ASPECT = 4 / 3  # greatest ratio of a crop's sides


@dataclass(frozen=True)
class Views:
    """Random changes that keep what an image shows; each image draws its own.

    Attributes:
        crop: least share of the area that a random resized crop keeps, its sides in a ratio of 3/4 to 4/3; 1: no crop.
        flip: mirror left and right, every second image.
        rotate: greatest angle in degrees.
        shift: greatest move in pixels, fractions included; what comes in from outside is black.
        jitter: greatest relative change of brightness, contrast and saturation, a quarter of it the greatest turn of
            hue in circles, for four images in five; 0: none.
        grey: share of the images that lose their colour.
        shear: greatest slant, the move to the side over the move down.
        light: greatest relative change of brightness, then of contrast, of grey images too.
        zoom: greatest change of size, as a logarithm, smaller or larger.
        stretch: greatest change of width against height, as a logarithm.
        gamma: greatest logarithm of the power that brightness is raised to.
    """

    crop: float = 1.0
    flip: bool = False
    rotate: float = 0.0
    shift: float = 0.0
    jitter: float = 0.0
    grey: float = 0.0
    shear: float = 0.0
    light: float = 0.0
    zoom: float = 0.0
    stretch: float = 0.0
    gamma: float = 0.0

    def __call__(self, images: Tensor) -> Tensor:
        """Changed float32 images in [0, 1] from uint8 images, both (N, C, H, W)."""
        views = self._resample(to_float(images))
        if self.light:
            views = self._relight(views)
        if self.gamma:
            views = views ** torch.exp(self.gamma * (2 * torch.rand(len(views), 1, 1, 1, device=views.device) - 1))
        if views.shape[1] == 3:
            if self.jitter:
                chosen = torch.rand(len(views), 1, 1, 1, device=views.device) < 0.8
                views = torch.where(chosen, colour_jitter(views, self.jitter), views)
            if self.grey:
                chosen = torch.rand(len(views), 1, 1, 1, device=views.device) < self.grey
                views = torch.where(chosen, luminance(views).expand_as(views), views)
        return views

    def _relight(self, images: Tensor) -> Tensor:
        factors = 1 + self.light * (2 * torch.rand(2, len(images), 1, 1, 1, device=images.device) - 1)
        images = (images * factors[0]).clamp(0, 1)
        mean = images.mean(dim=(1, 2, 3), keepdim=True)
        return (mean + (images - mean) * factors[1]).clamp(0, 1)

    def _resample(self, images: Tensor) -> Tensor:
        """Crop, flip, rotation, zoom, stretch, shear and shift in one interpolation."""
        n, _, height, width = images.shape
        uniform = torch.rand(8, n, device=images.device)
        area = self.crop + (1 - self.crop) * uniform[0]
        aspect = torch.exp((2 * uniform[1] - 1) * math.log(_ASPECT)) if self.crop < 1 else torch.ones_like(area)
        # Half sides of the window in affine_grid's unit, half an image.
        across, down = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
        x = (1 - across) * (2 * uniform[2] - 1) + (2 * uniform[3] - 1) * self.shift * 2 / width
        y = (1 - down) * (2 * uniform[4] - 1) + (2 * uniform[5] - 1) * self.shift * 2 / height
        if self.zoom or self.stretch:
            log_zoom, log_stretch = (2 * torch.rand(2, n, device=images.device) - 1).unbind()
            log_zoom, log_stretch = log_zoom * self.zoom, log_stretch * self.stretch
            across, down = across * torch.exp(log_zoom + log_stretch), down * torch.exp(log_zoom - log_stretch)
        angle = (2 * uniform[6] - 1) * math.radians(self.rotate)
        cos, sin, shape = torch.cos(angle), torch.sin(angle), height / width
        mirror = torch.where(uniform[7] < 0.5, -1.0, 1.0) if self.flip else torch.ones_like(area)
        x_across, x_down = cos * across * mirror, -sin * down * shape
        y_across, y_down = sin * across * mirror / shape, cos * down
        if self.shear:
            slant = (2 * torch.rand(n, device=images.device) - 1) * self.shear * shape
            x_down, y_down = x_down + x_across * slant, y_down + y_across * slant
        rows = [torch.stack([x_across, x_down, x], dim=1), torch.stack([y_across, y_down, y], dim=1)]
        grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
        moved = self.rotate or self.shear or self.shift or self.zoom or self.stretch
        outside = "zeros" if moved else "border"
        return F.grid_sample(images, grid, padding_mode=outside, align_corners=False)


def luminance(images: Tensor) -> Tensor:
    """Grey images (N, 1, H, W) of RGB images, weighted as in ITU-R BT.601."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device, dtype=images.dtype)
    return torch.einsum("nchw,c->nhw", images, weights)[:, None]


def colour_jitter(images: Tensor, strength: float) -> Tensor:
    """RGB images in [0, 1] with brightness, contrast, saturation and hue changed, in an order drawn for the batch."""

    def factor() -> Tensor:
        return 1 + strength * (2 * torch.rand(len(images), 1, 1, 1, device=images.device) - 1)

    for change in torch.randperm(4).tolist():
        if change == 0:
            images = images * factor()
        elif change == 1:
            mean = luminance(images).mean(dim=(2, 3), keepdim=True)
            images = mean + (images - mean) * factor()
        elif change == 2:
            grey = luminance(images)
            images = grey + (images - grey) * factor()
        else:
            images = turn_hue(images, (factor()[:, 0] - 1) / 4)
        images = images.clamp(0, 1)
    return images


def turn_hue(images: Tensor, turns: Tensor) -> Tensor:
    """RGB images in [0, 1] with the hue of HSV moved by `turns`, (N, 1, 1) of a full circle."""
    value, chroma = images.amax(dim=1), images.amax(dim=1) - images.amin(dim=1)
    red, green, blue = images.unbind(dim=1)
    divisor = chroma.clamp(min=1e-8)
    sixth = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    sixth = sixth + 6 * turns
    # A channel is highest where the hue is within a sixth of it, and lowest beyond two sixths.
    channels = []
    for offset in (5, 3, 1):
        position = (offset + sixth) % 6
        channels.append(value - chroma * torch.minimum(position, 4 - position).clamp(0, 1))
    return torch.stack(channels, dim=1)
