"""RUC's settings: the paper's, those it leaves open, the authors' released behaviour, and presets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from methods.common.config import RunConfig, require_above_zero, require_not_negative
from methods.common.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Defaults are the paper's for CIFAR-10; a preset replaces some. `labels` has no effect."""

    base: str = "kmeans"
    """The clustering to mend: a run's folder (of scan, bsc_ic), a file with `probabilities` (N, C) and, for the
    metric strategy, `embeddings` (N, D), or `kmeans` of the pixels. Rows are the training images, or these and then the
    test images."""
    clusters: int = 0
    """Clusters of the base `kmeans`; 0 takes the number of classes that the data name."""
    part: Literal["train", "all"] = "train"
    """Images to train on: the training images, or the test images too, if the base knows them."""
    compat: Literal["paper", "released"] = "paper"
    """`released`: the authors' published code where it departs from the paper, over the settings it concerns."""

    # The clean set, 3.1.
    strategy: Literal["confidence", "metric", "hybrid"] = "hybrid"
    """Clean are the confident pseudo-labels, those that agree with the neighbours' majority, or those that are both."""
    tau1: float = 0.99
    """τ1: the confidence above which a pseudo-label is clean."""
    neighbours: int = 100
    """k: neighbours in the embedding, by cosine, the image itself not counted."""

    # Retraining, 3.2.
    variant: Literal["full", "no-co-training", "no-label-smoothing", "mixmatch"] = "full"
    """Table 2: without the second network, without L_Xs (eqs. 8, 9), without both."""
    epsilon: float = 0.5
    """ε of the label smoothing (eq. 8)."""
    draw_epsilon: bool = False
    """Draw ε evenly from 0 … 1 for each image, as the text of eq. 8 has it, instead."""
    temperature: float = 0.5
    """T of all sharpening."""
    views: int = 2
    """M: weak views of an unclean image that are averaged to guess its label."""
    alpha: float = 4.0
    """α of MixMatch's Beta distribution (eq. 1)."""
    lambda_u: float = 25.0
    """λ_U, weight of the unclean images: 25 for CIFAR-10, 50 for STL-10, 100 for CIFAR-20."""
    square: Literal["mean", "sum"] = "mean"
    """Squared errors of eq. 7 averaged over the classes, or summed."""
    ramp_floor: float = 0.0
    """The least share of λ_U while it rises evenly over the run."""
    tau2: float = 0.9
    """τ2: the confidence above which an unclean image becomes clean, with the network's label."""
    tau2_rise: float = 0.02
    """How much it rises …"""
    tau2_every: int = 40
    """… every so many epochs."""
    refurbish: Literal["epoch", "batch"] = "epoch"
    """At the end of an epoch by the surer of both networks, or in each batch by the one that learns."""

    # The networks and their training.
    start: Literal["base", "random"] = "base"
    """The networks' backbone: the base's network, if it left one, or random weights."""
    head: Literal["fresh", "base"] = "fresh"
    """Their final layer: random (A.2), or the base's where the backbone is: in a run of few steps a fresh one moves
    images between clusters by not being learnt yet."""
    network: str = ""
    """`cnn-small`, `cnn13`, `resnet18`, for random weights; empty: cnn-small for grey images of up to 28 pixels, else
    resnet18."""
    epochs: int = 200
    """Epochs: in each, each network sees as many batches as a pass over all images takes."""
    balance: bool = False
    """Draw a batch's clean images evenly over their labels, not as they come: else clusters with many of them are
    learnt as the likelier ones, and take in their small neighbours. Not in the paper."""
    batch: int = 200
    """Clean images in a batch, and as many unclean ones: 200 for CIFAR, 100 for STL-10."""
    lr: float = 0.01
    """Learning rate of SGD at the start of its cosine."""
    momentum: float = 0.9
    """Momentum (Nesterov's)."""
    weight_decay: float = 5e-4
    """Weight decay."""
    settle: bool = False
    """Take batch normalisation's statistics anew after each pass, from images as they are: where passes are short."""

    # The weak view ...
    pad: int = 4
    """Pixels of mirrored border for the random crop."""
    flip: bool = True
    """Mirror every second image."""
    crop: float = 1.0
    """Least share of the area that a random resized crop keeps, instead of the crop above; 1: none."""
    rotate: float = 0.0
    """Greatest rotation in degrees."""
    scale: float = 0.0
    """Greatest relative change of size."""
    shift: float = 0.0
    """Greatest move in pixels, with black coming in."""
    # ... and what the strong one does on top of it.
    strong_ops: int = 2
    """n: operations of RandAugment, of Table 4."""
    strong_magnitude: float = 2.0
    """m: how far each goes, of 10; 0 draws it evenly."""
    cutout: int = 0
    """Side in pixels of a square that is blacked out; 0: none."""

    # What is reported.
    attacks: tuple[float, ...] = (0.01, 0.02, 0.03, 0.05, 0.1)
    """ε of FGSM and BIM, pixels being 0 … 1."""
    attacked: int = 500
    """Images to attack, where the base has a network to compare with or not; 0: none."""
    report: bool = True
    """Draw report.html; t-SNE takes as long as some epochs."""


PAPER = Config(preset="paper", data="cifar10")

# For small machines: grey images, weak views without a mirror, fewer and smaller batches, a schedule of the same shape.
SMALL = replace(
    PAPER,
    threads=1,
    epsilon=0.3,  # 0.5 leaves networks this small less sure than they are right
    epochs=12,
    tau2_every=3,
    batch=50,
    neighbours=20,
    pad=0,
    flip=False,
    rotate=10.0,
    scale=0.1,
    shift=1.0,
)

PRESETS = {
    "digits": replace(SMALL, preset="digits", data="digits"),
    # Small networks are seldom sure to 0.99, k-means on an embedding never.
    "usps": replace(SMALL, preset="usps", data="usps", tau1=0.8),
    "mnist": replace(SMALL, preset="mnist", data="mnist", tau1=0.8),
    "fashion-mnist": replace(SMALL, preset="fashion-mnist", data="fashion-mnist", tau1=0.8, flip=True, rotate=0.0),
    "cifar10": replace(PAPER, preset="cifar10"),
    "cifar20": replace(PAPER, preset="cifar20", data="cifar100-20", lambda_u=100.0),
    "stl10": replace(PAPER, preset="stl10", data="stl10", lambda_u=50.0, batch=100),
    "folder": replace(PAPER, preset="folder", data="folder:DIR"),
}
PRESETS["cifar100-20"] = PRESETS["cifar20"]


def as_released(config: Config) -> Config:
    """The authors' published code, where it is known to depart from the paper."""
    released = replace(config, batch=250, refurbish="batch", ramp_floor=0.1, crop=0.2, cutout=16)
    return replace(released, tau2=0.99, tau2_rise=0.0) if config.data == "cifar10" else released


def check(config: Config) -> None:
    """Refuse settings that cannot work, before anything is written."""
    require_above_zero(config, "neighbours", "temperature", "views", "alpha", "tau2_every", "epochs", "batch", "lr")
    weights = ("lambda_u", "tau2_rise", "momentum", "weight_decay", "clusters", "attacked", "cutout")
    require_not_negative(config, *weights, "pad", "rotate", "scale", "shift", "strong_ops", "strong_magnitude")
    for name in ("tau1", "tau2", "epsilon", "ramp_floor"):
        if not 0 <= getattr(config, name) <= 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)} must lie between 0 and 1")
    if not 0 < config.crop <= 1:
        raise UserError(f"--crop {config.crop} must be above 0 and at most 1")
    if config.strong_magnitude > 10:
        raise UserError(f"--strong-magnitude {config.strong_magnitude} must be at most 10")
    if config.batch < 2:
        raise UserError(f"--batch {config.batch} must be 2 or more")
    if any(epsilon < 0 for epsilon in config.attacks):
        raise UserError(f"--attacks {config.attacks} must not be below 0")
