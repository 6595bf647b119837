"""Image files: read, brought to one size and number of channels; folders of them with a list of labels."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from methods.common import parallel
from methods.common.data import ImageData, assemble
from methods.common.errors import UserError

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
            if opened.mode.startswith("I"):  # 16 bits a pixel, of which convert() would cut off all above 255
                opened = Image.fromarray((np.asarray(opened) >> 8).astype(np.uint8))
            image = ImageOps.exif_transpose(opened).convert("L" if n_channels == 1 else "RGB")
    except (SyntaxError, EOFError, Image.DecompressionBombError) as error:  # what Pillow raises for some damaged files
        raise ValueError(str(error)) from None
    height, width = image_size
    pixels = np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels.reshape(height, width, n_channels).copy()).permute(2, 0, 1)


def find_images(path: Path) -> list[Path]:
    """The image files in a folder, at any depth, in order, hidden ones left aside; a file stands for itself."""
    if path.is_dir():
        return sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))
    return [path]


def read_images(
    files: Sequence[Path], n_channels: int, image_size: tuple[int, int]
) -> tuple[Tensor, list[Path], list[tuple[Path, str]]]:
    """Read many image files, several at a time.

    Returns:
        The images that can be read, uint8 (N, C, H, W); their files; the other files, each with the reason.
    """

    def read(file: Path) -> Tensor | str:
        try:
            return read_image(file, n_channels, image_size)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error).replace(f" {str(file)!r}", "")
            return reason or type(error).__name__

    with ThreadPoolExecutor() as pool:
        read_in = list(zip(files, pool.map(read, files), strict=True))
    images = [found for _, found in read_in if isinstance(found, Tensor)]
    stack = torch.stack(images) if images else torch.empty(0, n_channels, *image_size, dtype=torch.uint8)
    readable = [file for file, found in read_in if isinstance(found, Tensor)]
    return stack, readable, [(file, found) for file, found in read_in if isinstance(found, str)]


def load_folder(folder: Path, image_size: int, *, need_classes: bool = True) -> ImageData:
    """All images of a folder, at any depth, as RGB squares; labels.csv in it names the classes of some.

    labels.csv has the header `file,label`; files are named relative to the folder. There is no test part. Files that
    cannot be read are named on stderr and left out. Without `need_classes` labels.csv may name none, or be missing.
    """
    if not folder.is_dir():
        raise UserError(f"--data folder:{folder} is no folder")
    if image_size < 8:
        raise UserError(f"--image-size {image_size} is too small; 8 pixels is the least")
    labels = read_labels(folder / "labels.csv") if need_classes or (folder / "labels.csv").exists() else {}
    images, files, unreadable = read_images(find_images(folder), 3, (image_size, image_size))
    if parallel.is_first():
        for file, reason in unreadable:
            print(f"left out {file}: {reason}", file=sys.stderr)
    if not files:
        raise UserError(f"--data folder:{folder} holds no image that can be read")
    names = [file.relative_to(folder).as_posix() for file in files]
    left_out = tuple((file.relative_to(folder).as_posix(), reason) for file, reason in unreadable)
    strangers = sorted(labels.keys() - set(names) - {name for name, _ in left_out})
    if strangers:
        more = f" (and {len(strangers) - 1} more)" if len(strangers) > 1 else ""
        raise UserError(f"{folder}/labels.csv names {strangers[0]}{more}, which is no image in that folder")
    known = {labels[name] for name in names if name in labels}
    classes = sorted(known, key=lambda label: (len(label), label) if all(map(str.isdigit, known)) else (0, label))
    number = {label: index for index, label in enumerate(classes)}
    y = np.array([number[labels[name]] if name in labels else -1 for name in names])
    if need_classes and len(classes) < 2:
        raise UserError(f"{folder}/labels.csv names {len(classes)} classes of readable images; two is the least")
    pixels = images.permute(0, 2, 3, 1).numpy()
    data = assemble(folder.resolve().name, pixels, y, class_names=tuple(classes), need_classes=need_classes)
    return replace(data, files=tuple(names), left_out=left_out)


def read_labels(path: Path) -> dict[str, str]:
    """The label of each file that a CSV file with the header `file,label` names."""
    labels: dict[str, str] = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if not {"file", "label"} <= set(reader.fieldnames or ()):
                raise UserError(f"{path} must begin with the line file,label")
            for row in reader:
                name, label = (row["file"] or "").strip(), (row["label"] or "").strip()
                if not name or not label:
                    raise UserError(f"{path}, line {reader.line_num}: a file and its label are needed")
                name = name.replace("\\", "/").removeprefix("./")
                if labels.setdefault(name, label) != label:
                    raise UserError(f"{path}, line {reader.line_num}: {name} was {labels[name]} above, here {label}")
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: a text file with the line file,label, then one line for each image that you label"
        ) from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return labels
