"""Image files: read, brought to one size and number of channels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".ppm")


def read_image(path: Path, n_channels: int, image_size: tuple[int, int]) -> Tensor:
    """Read an image file of any size and aspect ratio.

    It is turned upright, made grey (one channel) or RGB (three), scaled until it covers `image_size` = (height, width),
    and cropped to that around its centre.

    Returns:
        uint8 (C, H, W).

    Raises:
        OSError, ValueError: the file cannot be read as an image.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened).convert("L" if n_channels == 1 else "RGB")
    except (SyntaxError, EOFError, Image.DecompressionBombError) as error:  # what Pillow raises for some damaged files
        raise ValueError(str(error)) from None
    height, width = image_size
    pixels = np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels.reshape(height, width, n_channels).copy()).permute(2, 0, 1)


def find_images(path: Path) -> list[Path]:
    """The image files in a folder, at any depth, in order; a file stands for itself."""
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    return [path]
