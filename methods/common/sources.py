"""Where image sets come from: scikit-learn's digits, known sets by name, .npz files, folders of image files."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from methods.common.config import RunConfig
from methods.common.data import ARRAYS, ImageData, assemble, check_images, to_tensor
from methods.common.errors import UserError
from methods.common.images import load_folder

# Name -> class of torchvision.datasets (None: torchvision does not have it), names of the classes.
_NAMED: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "usps": ("USPS", ()),
    "mnist": ("MNIST", ()),
    "fashion-mnist": (
        "FashionMNIST",
        ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
    ),
    "cifar10": (
        "CIFAR10",
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    ),
    "cifar100": ("CIFAR100", ()),
    "stl10": ("STL10", ()),
    "mini-imagenet": (None, ()),
}

# CIFAR-100's superclass of each of its classes, these in alphabetical order.
_SUPERCLASS = (
    *(4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7),
    *(6, 13, 15, 3, 15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10),
    *(16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16),
    *(12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13),
)


def load(config: RunConfig, *, need_classes: bool = True) -> ImageData:
    """The image set that the settings ask for (`data`, `data_dir`, `download`, `image_size`, `subset…`, `seed`).

    Without `need_classes` a file or a folder may know no classes.
    """
    kind, _, path = config.data.partition(":")
    if kind == "npz" and path:
        data = load_npz(Path(path), need_classes=need_classes)
    elif kind == "folder" and path:
        data = load_folder(Path(path), config.image_size, need_classes=need_classes)
    elif config.data == "digits":
        data = load_digits(config.seed)
    elif config.data == "cifar100-20":
        data = superclasses(load_named("cifar100", Path(config.data_dir), config.download))
    elif config.data in _NAMED:
        data = load_named(config.data, Path(config.data_dir), config.download)
    else:
        names = ", ".join(("digits", *_NAMED, "cifar100-20"))
        raise UserError(f"--data {config.data} is unknown; there are {names}, npz:FILE and folder:DIR")
    if config.subset:
        data = data.subset(config.subset, config.seed)
    return data.subset(config.subset_test, config.seed, "test") if config.subset_test else data


def load_digits(seed: int) -> ImageData:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, split 80 / 20 with every class in proportion."""
    from sklearn.datasets import load_digits as load_sklearn_digits
    from sklearn.model_selection import train_test_split

    bunch = load_sklearn_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    x_train, x_test, y_train, y_test = train_test_split(
        images, bunch.target, test_size=0.2, stratify=bunch.target, random_state=seed
    )
    return assemble("digits", x_train, y_train, x_test, y_test)


def load_named(name: str, folder: Path, download: bool) -> ImageData:
    """A known set with its official split, from NAME.npz in the folder, or else from torchvision's files there."""
    source, class_names = _NAMED[name]
    path = folder / f"{name.replace('-', '_')}.npz"
    if path.exists():
        return load_npz(path, name, class_names)
    if source is None:
        raise UserError(
            f"--data {name}: {path} is missing. Nobody offers this set for download: make the file yourself "
            f"(uint8 images x_train, x_test; classes y_train, y_test), or name its folder with --data-dir"
        )
    from torchvision import datasets

    try:
        parts = [getattr(datasets, source)(str(folder), **part, download=download) for part in _parts(source)]
    except (RuntimeError, OSError, EOFError, ValueError, zlib.error) as error:
        if download:
            raise UserError(
                f"--data {name} could not be downloaded to {folder}: {str(error).splitlines()[0]}"
            ) from None
        raise UserError(
            f"--data {name}: neither {path.name} nor torchvision's {source} is in the folder {folder}; name its folder "
            f"with --data-dir or FASTCLUST_DATA, or add --download"
        ) from None
    x_train, x_test = (np.asarray(part.data) for part in parts)
    if source == "STL10":
        x_train, x_test = (np.moveaxis(images, 1, 3) for images in (x_train, x_test))
    y_train, y_test = (np.asarray(part.labels if source == "STL10" else part.targets, np.int64) for part in parts)
    return assemble(name, x_train, y_train, x_test, y_test, class_names or tuple(getattr(parts[0], "classes", ())))


def _parts(source: str) -> list[dict[str, object]]:
    """What torchvision's class of that name calls its training and its test part."""
    if source == "STL10":
        return [{"split": "train"}, {"split": "test"}]
    return [{"train": True}, {"train": False}]


def superclasses(data: ImageData) -> ImageData:
    """CIFAR-100 with its twenty superclasses as the classes ("CIFAR-20")."""
    if data.n_classes != len(_SUPERCLASS):
        raise UserError(f"--data cifar100-20: the file of cifar100 names {data.n_classes} classes, not 100")
    coarse = torch.tensor(_SUPERCLASS)
    names = tuple(str(k) for k in range(20))
    return replace(
        data, name="cifar100-20", y_train=coarse[data.y_train], y_test=coarse[data.y_test], class_names=names
    )


def load_npz(path: Path, name: str = "", class_names: tuple[str, ...] = (), *, need_classes: bool = True) -> ImageData:
    """Images from an .npz file.

    x_train, and x_test where there is a test part: uint8, (N, H, W) or (N, H, W, 3). y_train, y_test: integers (N,),
    -1 for an image whose class is unknown; without y_test, all of the test part is. The classes are the distinct values
    of y_train. Without `need_classes` y_train may be missing.
    """
    arrays = dict(_read_npz(path))
    if not need_classes and "x_train" in arrays:
        arrays.setdefault("y_train", np.full(len(arrays["x_train"]), -1))
    _require_keys(path, arrays, ("x_train", "y_train", *(("x_test",) if "y_test" in arrays else ())))
    data = {key: arrays[key] for key in ARRAYS if key in arrays}
    try:
        return assemble(name or path.stem, **data, class_names=class_names, need_classes=need_classes)
    except UserError as error:
        raise UserError(f"{path}: {str(error).partition(': ')[2]}") from None


def read_npz_images(path: Path, n_channels: int, image_size: tuple[int, int]) -> Tensor:
    """New images, uint8 (N, C, H, W), from `x` or else `x_test` of an .npz file; they must have the given shape."""
    arrays = _read_npz(path)
    key = "x" if "x" in arrays else "x_test"
    _require_keys(path, arrays, (key,))
    check_images(f"{path}: {key}", arrays[key])
    images = to_tensor(arrays[key])
    if images.shape[1:] != (n_channels, *image_size):
        found, wanted = tuple(images.shape[1:]), (n_channels, *image_size)
        raise UserError(f"{path}: {key} holds images of (channels, height, width) {found}; the run's are {wanted}")
    return images


def _read_npz(path: Path) -> Mapping[str, np.ndarray]:
    """All arrays of an .npz file that a trainer may ask for."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in (*ARRAYS, "x") if key in archive}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or 'not an .npz file'}") from None
    except (ValueError, EOFError, TypeError, AttributeError, NotImplementedError, zipfile.BadZipFile, zlib.error):
        raise UserError(f"{path} cannot be read: damaged, or not an .npz file of plain arrays") from None


def _require_keys(path: Path, arrays: Mapping[str, np.ndarray], keys: Sequence[str]) -> None:
    missing = [key for key in keys if key not in arrays]
    if missing:
        raise UserError(f"{path} lacks the arrays {', '.join(missing)}")
