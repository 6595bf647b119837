"""RandAugment (Cubuk et al., 2020) with the operations and ranges of FixMatch (Sohn et al., 2020, Appendix E).

Each image gets `n_ops` operations, drawn evenly, each with a strength drawn evenly from its range, or a given share of
the range away from the image as it is. A batch is worked on by operation, on the device it is on.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

# All take images (n, C, H, W) in [0, 1] and one number of [0, 1] per image, (n, 1, 1, 1).
Operation = Callable[[Tensor, Tensor], Tensor]


def rand_augment(
    images: Tensor, n_ops: int = 1, operations: dict[str, Operation] | None = None, magnitude: float = 0.0
) -> Tensor:
    """Images float32 (N, C, H, W) in [0, 1] with `n_ops` random operations on each.

    Args:
        operations: to draw from; FixMatch's unless told otherwise.
        magnitude: of 10, how far each operation goes, at either sign where it has one; 0 draws it evenly.
    """
    operations = operations or OPERATIONS
    for _ in range(n_ops):
        operation = torch.randint(len(operations), (len(images),), device=images.device)
        strength = torch.rand(len(images), 1, 1, 1, device=images.device)
        members = operation.argsort().split(torch.bincount(operation, minlength=len(operations)).tolist())
        changed = torch.empty_like(images)
        for (name, apply), chosen in zip(operations.items(), members, strict=True):
            if len(chosen):
                drawn = _fixed(strength[chosen], magnitude / 10, name in _SIGNED) if magnitude else strength[chosen]
                changed[chosen] = apply(images[chosen], drawn).clamp(0, 1)
        images = changed
    return images


def _fixed(strength: Tensor, share: float, signed: bool) -> Tensor:
    """Strengths that lie `share` of the range away from no change: that is at 0.5 with a sign, else at 1."""
    return 0.5 + torch.where(strength < 0.5, -0.5, 0.5) * share if signed else torch.full_like(strength, 1 - share)


def _blend(images: Tensor, with_: Tensor, strength: Tensor, least: float) -> Tensor:
    """From `with_` towards the image by a factor of least … 1 - least."""
    return with_ + (least + (1 - 2 * least) * strength) * (images - with_)


def _grey(images: Tensor) -> Tensor:
    return tv.rgb_to_grayscale(images) if images.shape[1] == 3 else images


def _warp(images: Tensor, rows: list[list[Tensor | float]]) -> Tensor:
    """Each image at the positions that its matrix [[a, b, c], [d, e, f]] gives, in half images; outside is black."""
    one = images.new_ones(len(images))
    matrix = torch.stack([torch.stack([value * one for value in row], dim=1) for row in rows], dim=1)
    height, width = images.shape[2:]
    matrix[:, 0, 1] *= height / width  # half a height is not half a width
    matrix[:, 1, 0] *= width / height
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="nearest", padding_mode="zeros", align_corners=False)


def _signed(strength: Tensor, most: float) -> Tensor:
    return (2 * strength.flatten() - 1) * most


def _rotate(images: Tensor, strength: Tensor, degrees: float) -> Tensor:
    angle = _signed(strength, math.radians(degrees))
    cos, sin = torch.cos(angle), torch.sin(angle)
    return _warp(images, [[cos, -sin, 0.0], [sin, cos, 0.0]])


def _posterize(images: Tensor, strength: Tensor, least_bits: int) -> Tensor:
    bits = least_bits + ((9 - least_bits) * strength).long().clamp(max=8 - least_bits)  # so many are kept of 8
    step = 2.0 ** (8 - bits)
    return (images * 255 / step + 1e-4).floor() * step / 255


def _to_bytes(images: Tensor) -> Tensor:
    return (images * 255).round().to(torch.uint8)


def make_operations(least_blend: float, degrees: float, least_bits: int) -> dict[str, Operation]:
    """The fourteen, by the ranges that differ between papers.

    Args:
        least_blend: the factor from which brightness, colour, contrast and sharpness go to 1 - least_blend.
        degrees: greatest rotation.
        least_bits: fewest bits that posterize keeps.
    """

    def blend(x: Tensor, with_: Tensor, s: Tensor) -> Tensor:
        return _blend(x, with_, s, least_blend)

    return {
        "auto_contrast": lambda x, _: tv.autocontrast(x),
        "brightness": lambda x, s: blend(x, torch.zeros_like(x), s),
        "color": lambda x, s: blend(x, _grey(x).expand_as(x), s),
        "contrast": lambda x, s: blend(x, _grey(x).mean(dim=(1, 2, 3), keepdim=True).expand_as(x), s),
        "equalize": lambda x, _: tv.equalize(_to_bytes(x)).float() / 255,
        "identity": lambda x, _: x,
        "posterize": lambda x, s: _posterize(x, s, least_bits),
        "rotate": lambda x, s: _rotate(x, s, degrees),
        "sharpness": lambda x, s: blend(x, tv.adjust_sharpness(x, 0.0), s),
        "shear_x": lambda x, s: _warp(x, [[1.0, _signed(s, 0.3), 0.0], [0.0, 1.0, 0.0]]),
        "shear_y": lambda x, s: _warp(x, [[1.0, 0.0, 0.0], [_signed(s, 0.3), 1.0, 0.0]]),
        "solarize": lambda x, s: torch.where(x < s, x, 1 - x),
        "translate_x": lambda x, s: _warp(x, [[1.0, 0.0, _signed(s, 0.6)], [0.0, 1.0, 0.0]]),
        "translate_y": lambda x, s: _warp(x, [[1.0, 0.0, 0.0], [0.0, 1.0, _signed(s, 0.6)]]),
    }


OPERATIONS = make_operations(least_blend=0.05, degrees=30, least_bits=4)  # FixMatch
RUC_OPERATIONS = make_operations(least_blend=0.01, degrees=45, least_bits=1)  # RUC, Table 4
_SIGNED = {"rotate", "shear_x", "shear_y", "translate_x", "translate_y"}
