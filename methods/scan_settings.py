"""SCAN's settings: the paper's, those of the embedding and the clustering under it, and presets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from methods.common.config import RunConfig, require_above_zero, require_not_negative
from methods.common.data import ImageData
from methods.common.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Defaults are the paper's for CIFAR-10; a preset replaces some. `labels` has no effect."""

    clusters: int = 0
    """K; 0 takes the number of classes that the data name."""
    network: str = ""
    """`cnn-small`, `cnn-flat`, `cnn13`, `resnet18`; empty: cnn-small for grey images of up to 28 pixels, else
    resnet18."""
    clustering: Literal["scan", "kmeans"] = "scan"
    """Clusters by SCAN's loss and self-labelling, or by spherical k-means on SimCLR's features."""

    # SimCLR, and the neighbours in its embedding.
    pretrain_epochs: int = 500
    """Epochs."""
    pretrain_batch: int = 512
    """Images in a batch, two views of each."""
    pretrain_lr: float = 0.4
    """Learning rate of SGD, which falls along a cosine."""
    pretrain_momentum: float = 0.9
    """Momentum of SGD."""
    pretrain_decay: float = 1e-4
    """Weight decay of SGD."""
    temperature: float = 0.1
    """τ of NT-Xent."""
    projected: int = 128
    """Dimensions of the projection that the views are compared on."""
    cache: str = ""
    """Folder of trained embeddings; empty: `simclr` in --runs."""
    neighbours: int = 20
    """k: neighbours of a training image by cosine, itself excluded."""
    mine: Literal["features", "projection"] = "features"
    """Whether neighbours are those of the backbone's features or of their projection."""

    # Views of SimCLR.
    crop: float = 0.2
    """Least share of the area that a random resized crop keeps."""
    flip: bool = True
    """Mirror left and right, every second image; in every stage."""
    rotate: float = 0.0
    """Greatest rotation in degrees; SimCLR has none."""
    shear: float = 0.0
    """Greatest slant, the move to the side over the move down; SimCLR has none."""
    shift: float = 0.0
    """Greatest move in pixels, with black coming in; SimCLR has none."""
    jitter: float = 0.4
    """Of brightness, contrast and saturation, a quarter of it of hue; images in colour alone."""
    light: float = 0.0
    """Of brightness and contrast, for grey images, which `jitter` leaves alone."""
    grey: float = 0.2
    """Share of colour images that lose their colour."""

    # SCAN's loss.
    entropy_weight: float = 5.0
    """λ, weight of the entropy of the mean assignment."""
    epochs: int = 50
    """Epochs of clustering."""
    batch: int = 128
    """Images in a batch, each with one of its neighbours."""
    lr: float = 1e-4
    """Learning rate of Adam."""
    decay: float = 1e-4
    """Weight decay of Adam, in self-labelling too."""
    heads: int = 1
    """Linear heads trained at once; the one with the lowest validation loss is kept."""
    scan_views: Literal["simclr", "strong"] = "strong"
    """What the loss sees: SimCLR's views or strong ones."""
    validation: Literal["test", "train"] = "test"
    """Images whose loss, without classes, chooses the epoch and the head; the training images where no others are."""
    validation_neighbours: int = 5
    """Their neighbours among themselves."""

    # Self-labelling, and the strong views.
    self_epochs: int = 200
    """Epochs; 0 leaves self-labelling out."""
    self_batch: int = 1000
    """Images in a batch."""
    self_lr: float = 1e-4
    """Learning rate of Adam."""
    self_views: Literal["simclr", "strong"] = "strong"
    """What the loss sees; its labels come from images not augmented."""
    confidence: float = 0.99
    """Least confidence of an image, not augmented, that labels itself."""
    pad: int = 4
    """Pixels by which a strong view is moved at most, the border mirrored."""
    strong: int = 4
    """Operations of RandAugment in a strong view."""
    cutout: int = 16
    """Side in pixels of the square that a strong view loses; 0: none."""

    # k-means on the embedding.
    kmeans_starts: int = 20
    """Starts of k-means; the least inertia is kept."""
    kmeans_temperature: float = 0.1
    """Soft assignments are the softmax of the cosine to each centre over this."""


PAPER = Config(preset="paper", data="cifar10")
# Grey images, a small network and a CPU: fewer and longer steps, a higher temperature, and one kind of views for all
# stages. Chosen on seed 10, of digits and (light, crop) of Fashion-MNIST.
QUICK = replace(
    PAPER,
    pretrain_epochs=30,
    pretrain_batch=128,
    pretrain_lr=0.2,
    temperature=0.5,
    crop=0.7,
    scan_views="simclr",
    self_views="simclr",
    heads=5,
    epochs=30,
    lr=1e-3,
    self_epochs=10,
    self_batch=128,
)
DIGITS = replace(QUICK, flip=False, rotate=15.0, shear=0.3)
PRESETS = {
    "digits": replace(DIGITS, preset="digits", data="digits", threads=1),
    "usps": replace(DIGITS, preset="usps", data="usps"),
    "mnist": replace(DIGITS, preset="mnist", data="mnist"),
    # Brightness alone tells these images apart, unless the views change it. cnn-flat does better than cnn-small in a
    # third of the time (docs/results/scan.md).
    "fashion-mnist": replace(
        QUICK, preset="fashion-mnist", data="fashion-mnist", network="cnn-flat", crop=0.6, light=0.6
    ),
    "cifar10": replace(PAPER, preset="cifar10"),
    "cifar100-20": replace(PAPER, preset="cifar100-20", data="cifar100-20", epochs=100, batch=512),
    "stl10": replace(PAPER, preset="stl10", data="stl10", epochs=100, scan_views="simclr", pad=12, cutout=32),
    # Your own photos: colour, no classes needed.
    "folder": replace(PAPER, preset="folder", data="folder"),
}


def check(config: Config, data: ImageData) -> None:
    """Refuse settings that cannot work on this data, before anything is written."""
    n_clusters, n_images = config.clusters or data.n_classes, len(data.x_train)
    if n_clusters < 2:
        raise UserError(f"{n_clusters} clusters; without classes in the data --clusters must be 2 or more")
    if n_images < max(n_clusters, 3):
        raise UserError(f"{n_images} training images are too few for {n_clusters} clusters and their neighbours")
    for name in ("batch", "self_batch", "pretrain_batch"):
        if getattr(config, name) < 2:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)} must be 2 or more")
    counts = ("epochs", "heads", "neighbours", "validation_neighbours", "projected", "kmeans_starts")
    require_above_zero(config, *counts, "lr", "self_lr", "pretrain_lr", "temperature", "kmeans_temperature")
    shapes = ("rotate", "shear", "shift", "jitter", "light", "pad", "strong", "cutout")
    decays = ("decay", "pretrain_decay", "pretrain_momentum")
    require_not_negative(config, "pretrain_epochs", "self_epochs", "entropy_weight", *decays, *shapes)
    if config.neighbours >= n_images:
        raise UserError(f"--neighbours {config.neighbours} must be below the {n_images} training images")
    if not 0 < config.crop <= 1:
        raise UserError(f"--crop {config.crop} must be above 0 and at most 1")
    if not 0 <= config.confidence < 1:
        raise UserError(f"--confidence {config.confidence} must be at least 0 and below 1")
    for name in ("grey", "pretrain_momentum"):
        if getattr(config, name) > 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)} must be at most 1")
    if config.pad >= min(data.image_size):
        raise UserError(f"--pad {config.pad} must be below the side of the images, {min(data.image_size)} pixels")
