"""CycleCluster's settings: the paper's, those it leaves open, and presets by the name of the data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from methods.common.config import RunConfig, require_above_zero, require_not_negative
from methods.common.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Defaults are the paper's for CIFAR-10; a preset replaces some of them."""

    baseline: Literal["none", "supervised", "graph"] = "none"
    """`supervised`: labelled images only, as many steps. `graph`: diffusion, but no clustering pass."""

    # The paper's loop.
    clusters: int = 100
    """K, the number of clusters; 0 takes the number of classes."""
    kmeans_init: Literal["k-means++", "random", "warm_start"] = "k-means++"
    """First centroids of an epoch: drawn afresh, or those of the epoch before (`warm_start`)."""
    kmeans_iter: int = 100
    """Lloyd iterations."""
    align: Literal["none", "hungarian"] = "none"
    """Cluster ids as k-means numbers them, or matched to the outputs that the network already gives their images."""
    neighbours: int = 50
    """k of the kNN graph."""
    power: float = 3.0
    """Exponent of the graph's similarities."""
    alpha: float = 0.99
    """Share of a point's scores that comes from its neighbours; μ = 1 / α - 1 in eq. 2."""
    diffusion_tol: float = 1e-6
    """Relative residual at which the diffusion is solved."""
    diffusion_iter: int = 20
    """Most iterations of the diffusion: 20 is the literature's, about 100 solve it."""
    class_logits: Literal["slice", "all"] = "slice"
    """Class probabilities from the first C outputs alone, or from the softmax over all outputs."""

    # The network and its training.
    network: str = "cnn13"
    """`cnn13` (the "13-layer" network), `cnn-small` or `resnet18`."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the network's layers: less than float32 is mixed precision, for GPUs."""
    weight_norm: bool = True
    """Weight normalisation on convolutions and head."""
    epochs: int = 400
    """Epochs of one clustering pass and one class pass each."""
    anneal_end: int = 460
    """Epoch at which the cosine of the learning rate would reach zero."""
    lr: float = 0.03
    """Learning rate at the start."""
    momentum: float = 0.9
    """Momentum of SGD."""
    nesterov: bool = True
    """Nesterov's momentum."""
    weight_decay: float = 2e-4
    """Weight decay, on every parameter."""
    batch_labelled: int = 50
    """Labelled images in a batch of the class pass."""
    batch_unlabelled: int = 50
    """Unlabelled images in a batch of the class pass; a batch of the clustering pass holds the sum of both."""
    init_epochs: int = 10
    """Passes over the labelled images before the first epoch."""
    test_every: int = 1
    """Epochs between two looks at the test images, on which no decision depends; 0 looks at the end of the run only."""

    # Augmentation.
    pad: int = 4
    """Pixels of mirrored border for the random crop."""
    flip: bool = True
    """Mirror every second image."""
    rotate: float = 0.0
    """Greatest rotation in degrees."""
    scale: float = 0.0
    """Greatest relative change of size."""
    shift: float = 0.0
    """Greatest move in pixels, with black coming in."""
    rand_augment: int = 0
    """Operations of RandAugment on every image of every pass; the paper's variant takes 1."""

    # Mean Teacher.
    mean_teacher: bool = False
    """Draw the class outputs towards those of a teacher, in the initialisation and in the class pass (+MT)."""
    teacher_decay: float = 0.97
    """The teacher's weights are a moving average of the network's over all steps."""
    consistency: float = 100.0
    """Weight of the squared difference of student's and teacher's logits, reached by a ramp."""
    consistency_ramp: float = 5.0
    """Epochs of the ramp."""


# The paper's (cifar10-short is Table IV's) take its settings for a GPU; the others are for small machines.
PRESETS = {
    # scikit-learn's digits, 8 x 8.
    "digits": Config(
        preset="digits",
        data="digits",
        labels=50,
        threads=1,  # a second one gains next to nothing on 8 x 8 pixels; so the figures are the same on any machine
        network="cnn-small",
        weight_norm=False,
        clusters=30,
        neighbours=10,  # a class has 140 images here, 5,000 in CIFAR-10
        align="hungarian",
        epochs=30,
        anneal_end=34,
        lr=0.03,
        pad=0,
        flip=False,
        rotate=10.0,
        scale=0.1,
        shift=1.0,
    ),
    "cifar10": Config(preset="cifar10", data="cifar10", labels=4000),
    "cifar10-short": Config(preset="cifar10-short", data="cifar10", labels=4000, lr=0.05, epochs=180, anneal_end=210),
    "cifar100": Config(
        preset="cifar100",
        data="cifar100",
        labels=10000,
        clusters=0,
        lr=0.05,
        epochs=180,
        anneal_end=210,
        batch_labelled=88,
        batch_unlabelled=40,
    ),
}
PRESETS["mini-imagenet"] = replace(
    PRESETS["cifar100"],
    preset="mini-imagenet",
    data="mini-imagenet",
    network="resnet18",
    weight_norm=False,
    pad=8,
    rotate=10.0,
)
PRESETS["usps"] = replace(
    PRESETS["digits"],
    preset="usps",
    data="usps",
    labels=100,
    epochs=12,
    anneal_end=14,
    init_epochs=100,  # of one step each: ten would leave the first graph a network that has learnt nothing
)
PRESETS["mnist"] = replace(PRESETS["usps"], preset="mnist", data="mnist")
PRESETS["fashion-mnist"] = replace(
    PRESETS["usps"],
    preset="fashion-mnist",
    data="fashion-mnist",
    test_every=4,
    pad=2,
    flip=True,
    rotate=0.0,
    scale=0.0,
    shift=0.0,
)
PRESETS["folder"] = replace(
    PRESETS["digits"],
    preset="folder",
    data="folder:DIR",
    labels=0,
    neighbours=20,
    init_epochs=100,
    pad=2,
    flip=True,
    shift=0.0,
)


def check(config: Config, n_images: int, n_labelled: int) -> None:
    """Refuse settings that cannot work on this data, before anything is written."""
    if n_labelled == n_images:
        raise UserError(f"all {n_images} training images are labelled; --labels must leave some without")
    if config.clusters > n_images:
        raise UserError(f"--clusters {config.clusters} is more than the {n_images} training images")
    if config.neighbours >= n_images:
        raise UserError(f"--neighbours {config.neighbours} needs more than {n_images} training images")
    if not 0 < config.alpha < 1:
        raise UserError(f"--alpha {config.alpha} must lie between 0 and 1")
    if config.anneal_end < config.epochs:
        raise UserError(f"--anneal-end {config.anneal_end} must not come before the last of {config.epochs} epochs")
    steps = ("kmeans_iter", "neighbours", "diffusion_iter")
    require_above_zero(config, "epochs", "lr", *steps, "batch_labelled", "batch_unlabelled")
    views = ("pad", "rotate", "scale", "shift", "rand_augment")
    teacher = ("consistency", "consistency_ramp")
    require_not_negative(config, "clusters", "init_epochs", "weight_decay", "test_every", *views, *teacher)
