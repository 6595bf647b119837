"""Augmentation of whole batches on the device: one draw per image, one gather or one resampling per batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.common.randaugment import rand_augment


def to_float(images: Tensor) -> Tensor:
    """uint8 images as float32 in [0, 1]: the evaluation transform."""
    return images.float() / 255


@dataclass(frozen=True)
class Augment:
    """Random changes that keep an image's class.

    Attributes:
        pad: pixels by which the image is moved at most, in both directions, its border mirrored (pad and crop).
        flip: mirror left and right, every second image.
        rotate: greatest angle in degrees.
        scale: greatest relative change of size; 0.1 is 0.9 … 1.1.
        shift: greatest move in pixels, fractions included; what comes in from outside is black.
        rand_augment: operations of RandAugment on top of that.
        cutout: side in pixels of a black square anywhere on the image, cut off at its border (DeVries and Taylor 2017).
    """

    pad: int = 0
    flip: bool = False
    rotate: float = 0.0
    scale: float = 0.0
    shift: float = 0.0
    rand_augment: int = 0
    cutout: int = 0

    def __call__(self, images: Tensor) -> Tensor:
        """Augmented float32 images in [0, 1] from uint8 images, both (N, C, H, W)."""
        if self.pad or self.flip:
            images = self._crop_and_flip(images)
        images = to_float(images)
        if self.rotate or self.scale or self.shift:
            images = self._resample(images)
        images = rand_augment(images, self.rand_augment)
        return cut_out(images, self.cutout) if self.cutout else images

    def _crop_and_flip(self, images: Tensor) -> Tensor:
        n, _, height, width = images.shape
        device = images.device
        move = torch.randint(-self.pad, self.pad + 1, (2, n, 1), device=device)
        rows = _mirrored(torch.arange(height, device=device) + move[0], height)
        columns = _mirrored(torch.arange(width, device=device) + move[1], width)
        if self.flip:
            flipped = torch.rand(n, 1, device=device) < 0.5
            columns = torch.where(flipped, columns.flip(1), columns)
        image = torch.arange(n, device=device)[:, None, None]
        return images.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

    def _resample(self, images: Tensor) -> Tensor:
        n, _, height, width = images.shape
        uniform = torch.rand(4, n, device=images.device) * 2 - 1
        angle = uniform[0] * math.radians(self.rotate)
        zoom = 1 + uniform[1] * self.scale
        # affine_grid counts in half images: height and width are both 2.
        move_x, move_y = uniform[2] * self.shift * 2 / width, uniform[3] * self.shift * 2 / height
        cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
        aspect = height / width
        matrix = torch.stack(
            [torch.stack([cos, -sin * aspect, move_x], dim=1), torch.stack([sin / aspect, cos, move_y], dim=1)], dim=1
        )
        grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)


def cut_out(images: Tensor, side: int) -> Tensor:
    """Images (N, C, H, W) that each lose a square of that many pixels to black, anywhere, cut off at the border."""
    n, _, height, width = images.shape
    inside = []
    for size in (height, width):
        first = torch.randint(size, (n, 1), device=images.device) - side // 2
        place = torch.arange(size, device=images.device)
        inside.append((place >= first) & (place < first + side))
    return images.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0)


def _mirrored(position: Tensor, size: int) -> Tensor:
    """Positions outside 0 … size - 1 reflected at the border, the border itself not repeated."""
    position = position.abs()
    return torch.where(position >= size, 2 * (size - 1) - position, position)
