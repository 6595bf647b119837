"""Image sets as uint8 tensors, and the choice of labelled images."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from methods.common.errors import UserError

NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")


@dataclass(frozen=True)
class ImageData:
    """A split image set. Images are uint8 (N, C, H, W); classes are int64 (N,), -1 where unknown."""

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    class_names: tuple[str, ...]

    @property
    def n_classes(self) -> int:
        return len(self.class_names)

    @property
    def n_channels(self) -> int:
        return self.x_train.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.x_train.shape[2], self.x_train.shape[3]

    def to(self, device: torch.device) -> ImageData:
        moved = {key: getattr(self, key).to(device) for key in NPZ_KEYS}
        return replace(self, **moved)

    def fingerprint(self) -> int:
        """Checksum of all images and classes: a resumed run must meet the data it was started with."""
        checksum = 0
        for key in NPZ_KEYS:
            checksum = zlib.crc32(getattr(self, key).cpu().numpy(), checksum)
        return checksum

    def pixel_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation per channel of the training images in [0, 1], each (C,) float32."""
        channels = self.x_train.transpose(0, 1).flatten(start_dim=1)
        histogram = torch.stack([torch.bincount(channel, minlength=256) for channel in channels]).double()
        share = histogram / histogram.sum(dim=1, keepdim=True)
        value = torch.arange(256, dtype=torch.float64, device=share.device) / 255
        mean = share @ value
        deviation = ((value - mean[:, None]).square() * share).sum(dim=1).sqrt()
        return mean.float(), deviation.clamp(min=1e-3).float()


def load(spec: str, *, seed: int) -> ImageData:
    """Load the image set that `spec` names: `digits` or `npz:FILE`. The seed only matters where no split is given."""
    kind, _, path = spec.partition(":")
    if kind == "npz" and path:
        return load_npz(Path(path))
    if spec in _BY_NAME:
        return _BY_NAME[spec](seed)
    raise UserError(f"--data {spec} is unknown; there are {', '.join(_BY_NAME)} and npz:FILE")


def load_digits(seed: int) -> ImageData:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, split 80 / 20 with every class in proportion."""
    from sklearn.datasets import load_digits as load_sklearn_digits
    from sklearn.model_selection import train_test_split

    bunch = load_sklearn_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    x_train, x_test, y_train, y_test = train_test_split(
        images, bunch.target, test_size=0.2, stratify=bunch.target, random_state=seed
    )
    return _assemble("digits", x_train, y_train, x_test, y_test)


def load_npz(path: Path) -> ImageData:
    """Images from an .npz file.

    x_train, x_test: uint8, (N, H, W) or (N, H, W, 3). y_train, y_test: integers (N,), -1 for a training image whose
    class is unknown. The classes are the distinct values of y_train.
    """
    arrays = _read_npz(path)
    _require_keys(path, arrays, NPZ_KEYS)
    arrays = {key: arrays[key] for key in NPZ_KEYS}
    for split in ("train", "test"):
        _check_images(f"{path}: x_{split}", arrays[f"x_{split}"])
        _check_classes(f"{path}: y_{split}", arrays[f"y_{split}"], len(arrays[f"x_{split}"]))
    if arrays["x_train"].shape[1:] != arrays["x_test"].shape[1:]:
        shapes = f"{arrays['x_train'].shape[1:]} and {arrays['x_test'].shape[1:]}"
        raise UserError(f"{path}: images of x_train and x_test differ in shape: {shapes}")
    return _assemble(path.stem, **arrays)


def read_npz_images(path: Path, n_channels: int, image_size: tuple[int, int]) -> Tensor:
    """New images, uint8 (N, C, H, W), from `x` or else `x_test` of an .npz file; they must have the given shape."""
    arrays = _read_npz(path)
    key = "x" if "x" in arrays else "x_test"
    _require_keys(path, arrays, (key,))
    _check_images(f"{path}: {key}", arrays[key])
    images = _to_tensor(arrays[key])
    if images.shape[1:] != (n_channels, *image_size):
        found, wanted = tuple(images.shape[1:]), (n_channels, *image_size)
        raise UserError(f"{path}: {key} holds images of (channels, height, width) {found}; the run's are {wanted}")
    return images


def choose_labelled(classes: Tensor, n_labels: int, n_classes: int, seed: int) -> Tensor:
    """Choose which training images keep their label.

    The labels are spread evenly over the classes; a remainder goes to classes drawn by the seed.

    Args:
        classes: int64 (N,), -1 where the class is unknown.
        n_labels: how many, at least one per class; 0 takes all that are known.

    Returns:
        int64, ascending indices of the labelled images.
    """
    classes = classes.cpu()
    known = int((classes >= 0).sum())
    if n_labels == 0:
        return torch.nonzero(classes >= 0).flatten()
    if n_labels > known:
        raise UserError(f"--labels {n_labels} is more than the {known} training images whose class is known")
    if n_labels < n_classes:
        raise UserError(f"--labels {n_labels} is fewer than one for each of the {n_classes} classes")
    rng = np.random.default_rng(seed)
    share = np.full(n_classes, n_labels // n_classes)
    share[rng.permutation(n_classes)[: n_labels % n_classes]] += 1
    chosen = []
    for label in range(n_classes):
        members = np.flatnonzero(classes.numpy() == label)
        if len(members) < share[label]:
            raise UserError(f"--labels {n_labels} asks for {share[label]} of class {label}, which has {len(members)}")
        chosen.append(rng.choice(members, share[label], replace=False))
    return torch.from_numpy(np.sort(np.concatenate(chosen)))


def _read_npz(path: Path) -> Mapping[str, np.ndarray]:
    """All arrays of an .npz file that a trainer may ask for."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in (*NPZ_KEYS, "x") if key in archive}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or 'not an .npz file'}") from None
    except (ValueError, EOFError, TypeError, AttributeError, NotImplementedError, zipfile.BadZipFile, zlib.error):
        raise UserError(f"{path} cannot be read: damaged, or not an .npz file of plain arrays") from None


def _require_keys(path: Path, arrays: Mapping[str, np.ndarray], keys: Sequence[str]) -> None:
    missing = [key for key in keys if key not in arrays]
    if missing:
        raise UserError(f"{path} lacks the arrays {', '.join(missing)}")


def _check_images(name: str, images: np.ndarray) -> None:
    if images.dtype != np.uint8:
        raise UserError(f"{name} must be uint8, is {images.dtype}")
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)):
        raise UserError(f"{name} must be (N, H, W) or (N, H, W, 3), is {images.shape}")
    if len(images) == 0:
        raise UserError(f"{name} holds no image")
    if min(images.shape[1:3]) < 4:
        raise UserError(f"{name} holds images of {images.shape[1]} x {images.shape[2]}; 4 x 4 is the least")


def _check_classes(name: str, classes: np.ndarray, n_images: int) -> None:
    if classes.shape != (n_images,):
        raise UserError(f"{name} must be ({n_images},), one class per image, is {classes.shape}")
    if not np.issubdtype(classes.dtype, np.integer):
        raise UserError(f"{name} must hold integers, is {classes.dtype}")


def _assemble(name: str, x_train: np.ndarray, y_train: np.ndarray, x_test: np.ndarray, y_test: np.ndarray) -> ImageData:
    """Number the classes 0 … C - 1 and turn the images into uint8 (N, C, H, W) tensors."""
    values = np.unique(y_train[y_train >= 0])
    if len(values) < 2:
        raise UserError(f"{name}: y_train names {len(values)} classes; two is the least")
    strangers = np.setdiff1d(y_test, values)
    if len(strangers):
        raise UserError(f"{name}: y_test holds class {strangers[0]}, which y_train does not")

    def numbered(classes: np.ndarray) -> Tensor:
        index = np.searchsorted(values, classes)
        return torch.from_numpy(np.where(classes >= 0, index, -1).astype(np.int64))

    class_names = tuple(str(value) for value in values)
    return ImageData(name, _to_tensor(x_train), numbered(y_train), _to_tensor(x_test), numbered(y_test), class_names)


def _to_tensor(images: np.ndarray) -> Tensor:
    """(N, H, W) or (N, H, W, C) as a (N, C, H, W) tensor."""
    images = images[..., None] if images.ndim == 3 else images
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


_BY_NAME: dict[str, Callable[[int], ImageData]] = {"digits": load_digits}
