"""Image sets as uint8 tensors, and the choice of labelled images."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from methods.common.errors import UserError

ARRAYS = ("x_train", "y_train", "x_test", "y_test")


@dataclass(frozen=True)
class ImageData:
    """A set of images. Images are uint8 (N, C, H, W); classes are int64 (N,), -1 where unknown.

    Unknown classes are the normal case: a trainer is given some of `y_train`, and whatever else is known of `y_train`
    and `y_test` serves as truth for metrics and report alone. The test part may be empty.

    Attributes:
        files: names of the training images where they are files, else empty.
        left_out: image files that could not be read, each with the reason.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    class_names: tuple[str, ...]
    files: tuple[str, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()

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
        return replace(self, **{key: getattr(self, key).to(device) for key in ARRAYS})

    def held_out(self, given: Tensor) -> HeldOut:
        """The images to judge a trainer by that was given the classes `given`, int64 (N,), -1 where none."""
        if len(self.x_test):
            return HeldOut("test images", self.x_test, self.y_test, self._class_known(self.y_test))
        rest = given < 0
        truth = self.y_train[rest]
        files = tuple(self.files[index] for index in torch.nonzero(rest).flatten().tolist()) if self.files else ()
        return HeldOut("unlabelled images", self.x_train[rest], truth, self._class_known(truth), files)

    @staticmethod
    def _class_known(truth: Tensor) -> bool:
        return bool(len(truth)) and bool((truth >= 0).all())

    def subset(self, n_images: int, seed: int, part: Literal["train", "test"] = "train") -> ImageData:
        """A part of the training or test images with every class in proportion, drawn by the seed; the rest stays."""
        option, what = ("--subset", "training") if part == "train" else ("--subset-test", "test")
        images, truth = getattr(self, f"x_{part}"), getattr(self, f"y_{part}")
        if n_images > len(images):
            raise UserError(f"{option} {n_images} is more than the {len(images)} {what} images")
        if n_images < self.n_classes:
            raise UserError(f"{option} {n_images} is fewer than one for each of the {self.n_classes} classes")
        classes = truth.numpy()
        order = np.random.default_rng(seed).permutation(len(classes))
        place = np.empty(len(classes))  # of an image among those of its class, from 0 to 1
        for label in np.unique(classes):
            members = order[classes[order] == label]
            place[members] = np.arange(len(members)) / len(members)
        chosen = np.sort(np.argsort(place, kind="stable")[:n_images])
        fewer = {f"x_{part}": images[chosen], f"y_{part}": truth[chosen]}
        if part == "train" and self.files:
            fewer["files"] = tuple(self.files[index] for index in chosen)
        return replace(self, **fewer)

    def hold_out(self, share: float, seed: int) -> ImageData:
        """The images of both parts split afresh: a test part of that share, every class in proportion."""
        from sklearn.model_selection import train_test_split

        images, classes = torch.cat([self.x_train, self.x_test]), torch.cat([self.y_train, self.y_test])
        try:
            parts = train_test_split(np.arange(len(images)), test_size=share, stratify=classes, random_state=seed)
        except ValueError as error:
            raise UserError(f"--holdout {share}: {error}") from None
        train, test = (np.sort(part) for part in parts)
        names = tuple(self.files[i] if i < len(self.files) else f"test {i}" for i in train) if self.files else ()
        return replace(
            self, x_train=images[train], y_train=classes[train], x_test=images[test], y_test=classes[test], files=names
        )

    def fingerprint(self) -> int:
        """Checksum of all images and classes: a resumed run must meet the data it was started with."""
        checksum = zlib.crc32(repr((self.class_names, self.files)).encode())
        for key in ARRAYS:
            array = getattr(self, key).cpu().contiguous().numpy()
            checksum = zlib.crc32(array, zlib.crc32(repr(array.shape).encode(), checksum))
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


@dataclass(frozen=True)
class HeldOut:
    """Images that a trainer was given no class of: the test images, or where there are none the unlabelled ones.

    Attributes:
        what: their name for a report.
        images: uint8 (N, C, H, W).
        truth: int64 (N,), -1 where unknown.
        known: whether all of the truth is known.
        files: names of the images where they are files, else empty.
    """

    what: str
    images: Tensor
    truth: Tensor
    known: bool
    files: tuple[str, ...] = ()


def assemble(
    name: str,
    x_train: np.ndarray,
    y_train: np.ndarray,
    x_test: np.ndarray | None = None,
    y_test: np.ndarray | None = None,
    class_names: tuple[str, ...] = (),
    *,
    need_classes: bool = True,
) -> ImageData:
    """Check arrays, number the classes 0 … C - 1 and turn the images into tensors.

    Args:
        x_train, x_test: uint8 (N, H, W), (N, H, W, 1) or (N, H, W, 3).
        y_train, y_test: integers (N,); a class below 0 is unknown. The classes are the distinct values of y_train.
        class_names: names of the classes 0, 1, …; without them a class is called by its number.
        need_classes: refuse y_train that names fewer than two.
    """
    if x_test is None:
        x_test = np.empty((0, *x_train.shape[1:]), np.uint8)
    if y_test is None:
        y_test = np.full(len(x_test), -1)
    for part, images, classes in (("train", x_train, y_train), ("test", x_test, y_test)):
        check_images(f"{name}: x_{part}", images)
        _check_classes(f"{name}: y_{part}", classes, len(images))
    if len(x_train) == 0:
        raise UserError(f"{name}: x_train holds no image")
    if x_train.shape[1:] != x_test.shape[1:]:
        raise UserError(
            f"{name}: images of x_train and x_test differ in shape: {x_train.shape[1:]} and {x_test.shape[1:]}"
        )
    values = np.unique(y_train[y_train >= 0])
    if need_classes and len(values) < 2:
        raise UserError(f"{name}: y_train names {len(values)} classes; two is the least")
    strangers = np.setdiff1d(y_test[y_test >= 0], values)
    if len(strangers):
        raise UserError(f"{name}: y_test holds class {strangers[0]}, which y_train does not")

    def numbered(classes: np.ndarray) -> Tensor:
        index = np.searchsorted(values, classes)
        return torch.from_numpy(np.where(classes >= 0, index, -1).astype(np.int64))

    names = tuple(class_names[value] if value < len(class_names) else str(value) for value in values)
    return ImageData(name, to_tensor(x_train), numbered(y_train), to_tensor(x_test), numbered(y_test), names)


def to_tensor(images: np.ndarray) -> Tensor:
    """(N, H, W) or (N, H, W, C) as a (N, C, H, W) tensor."""
    images = images[..., None] if images.ndim == 3 else images
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def check_images(name: str, images: np.ndarray) -> None:
    if images.dtype != np.uint8:
        raise UserError(f"{name} must be uint8, is {images.dtype}")
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)):
        raise UserError(f"{name} must be (N, H, W) or (N, H, W, 3), is {images.shape}")
    if min(images.shape[1:3]) < 4:
        raise UserError(f"{name} holds images of {images.shape[1]} x {images.shape[2]}; 4 x 4 is the least")


def _check_classes(name: str, classes: np.ndarray, n_images: int) -> None:
    if classes.shape != (n_images,):
        raise UserError(f"{name} must be ({n_images},), one class per image, is {classes.shape}")
    if not np.issubdtype(classes.dtype, np.integer):
        raise UserError(f"{name} must hold integers, is {classes.dtype}")


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


def choose_percent(classes: Tensor, percent: float, n_classes: int, seed: int, least: int = 1) -> Tensor:
    """Choose which training images keep their label: that share of each class, and no fewer than `least` of it.

    Args:
        classes: int64 (N,), -1 where the class is unknown.

    Returns:
        int64, ascending indices of the labelled images.
    """
    rng = np.random.default_rng(seed)
    chosen = []
    for label in range(n_classes):
        members = np.flatnonzero(classes.cpu().numpy() == label)
        share = max(round(len(members) * percent / 100), least)
        chosen.append(rng.choice(members, min(share, len(members)), replace=False))
    return torch.from_numpy(np.sort(np.concatenate(chosen)))
