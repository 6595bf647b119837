"""BSC-IC's settings: the paper's, those of small sets on a CPU, and presets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from methods.common.config import RunConfig, require_above_zero, require_not_negative
from methods.common.data import ImageData
from methods.common.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Defaults are the paper's where it states them; a preset replaces some. `labels` has no effect."""

    clusters: int = 0
    """K; 0 takes the number of classes that the data name."""
    network: str = ""
    """`cnn-flat`, `cnn-small`, `cnn13`, `resnet18`; empty: `cnn-flat` for grey images of up to 16 pixels, else
    `resnet18`."""

    # The total loss, eq. 8. A weight of 0 leaves its term out.
    alpha_adv: float = 1.0
    """Weight of L_adv-G, which eq. 8 has none for; 0 leaves the critic out."""
    alpha_si: float = 4.0
    """Weight of L_si."""
    alpha_mi: float = 2.0
    """Weight of L_mi."""
    alpha_clu: float = 1.0
    """Weight of L_clu."""
    kl_order: Literal["target-online", "online-target"] = "target-online"
    """L_mi (eqs. 1, 2) as KL(target ‖ online), or the other way round; the target never gets a gradient."""
    detach_si: bool = False
    """Hold the first argument of L_si (eq. 3) fixed in the gradient."""
    lambda_clu: float | None = None
    """λ_clu of eq. 7, which the paper does not give; none: 1 / (K - 1)."""

    # The critic, eqs. 4 and 5.
    xi: float = 10.0
    """ξ, weight of the gradient penalty."""
    critic_steps: int = 1
    """Its steps for each of the network's."""
    critic_width: int = 1024
    """Units of its first hidden layer, and twice those of its second."""
    critic_lr: float = 3e-4
    """Its learning rate, of Adam."""
    critic_betas: tuple[float, float] = (0.5, 0.9)
    """Its β1 and β2, of Adam."""
    critic_views: Literal["both", "first"] = "both"
    """Whose assignments it sees."""

    # Training.
    tau: float = 0.99
    """τ, how much of the target's weights a step keeps (eq. 10)."""
    lr: float = 3e-4
    """Learning rate of Adam for the online network."""
    batch: int = 64
    """N, images in a batch."""
    epochs: int = 200
    """Epochs; the paper gives no number."""
    starts: int = 1
    """Networks to begin with, each from its own random weights; the one of least loss goes on. The paper has one."""
    start_epochs: int = 5
    """Epochs of each of them before that choice, counted within `epochs`."""
    autoencoder_epochs: int = 0
    """Epochs of ClusterNet's autoencoder, k-means of whose features is told beside k-means of pixels; 0: neither."""
    settle: bool = False
    """After each epoch take batch normalisation's statistics anew, from images as they are: training leaves those of
    the views. The steps do not depend on it."""
    report: bool = True
    """Write report.html, whose pictures take some seconds."""

    # Views.
    crop: float = 0.4
    """Least share of the area that a random resized crop keeps."""
    flip: bool = True
    """Mirror left and right, every second image."""
    rotate: float = 0.0
    """Greatest rotation in degrees; the paper has none."""
    shift: float = 0.0
    """Greatest move in pixels, with black coming in; the paper has none."""
    shear: float = 0.0
    """Greatest slant, the move to the side over the move down; the paper has none."""
    zoom: float = 0.0
    """Greatest logarithm of a change of size; the paper has none."""
    stretch: float = 0.0
    """Greatest logarithm of a change of width against height; the paper has none."""
    gamma: float = 0.0
    """Greatest logarithm of a power of brightness; the paper has none."""
    light: float = 0.0
    """Greatest relative change of brightness, then of contrast, of grey images too; the paper has none."""
    jitter: float = 0.8
    """Of brightness, contrast and saturation, a quarter of it of hue; images in colour alone."""
    grey: float = 0.2
    """Share of colour images that lose their colour."""


PAPER = Config(preset="paper", data="mnist", flip=False)
DIGITS = replace(
    PAPER,
    preset="digits",
    data="digits",
    threads=1,
    alpha_adv=5.0,
    critic_width=256,
    critic_lr=1e-3,
    critic_steps=2,
    tau=0.9,
    lr=1e-3,
    batch=128,
    epochs=40,
    starts=4,
    crop=1.0,
    rotate=15.0,
    shift=0.7,
    shear=0.27,
    zoom=0.1,
    stretch=0.15,
    gamma=0.6,
)
PRESETS = {
    # Small sets on a CPU: larger steps, a critic that keeps up with them and weighs more, and views that bend strokes
    # rather than cut them off. Chosen by the classes of digits, on seeds beside those of docs/results.
    "digits": DIGITS,
    "usps": replace(DIGITS, preset="usps", data="usps", shift=1.2, gamma=0.5),
    "mnist": replace(PAPER, preset="mnist", alpha_si=2.0, alpha_mi=1.0),
    "fashion-mnist": replace(
        PAPER, preset="fashion-mnist", data="fashion-mnist", alpha_si=2.0, alpha_mi=1.0, flip=True
    ),
    "cifar10": replace(PAPER, preset="cifar10", data="cifar10", epochs=1000, flip=True),
    "cifar100-20": replace(PAPER, preset="cifar100-20", data="cifar100-20", epochs=1000, flip=True),
    # Folders of images, no sets by name: --preset imagenet-10 --data folder:DIR.
    "imagenet-10": replace(
        PAPER, preset="imagenet-10", data="folder:imagenet-10", image_size=96, epochs=1000, flip=True
    ),
    "tiny-imagenet": replace(
        PAPER, preset="tiny-imagenet", data="folder:tiny-imagenet", image_size=64, epochs=1000, flip=True
    ),
    # Your own photos: colour, no classes needed.
    "folder": replace(PAPER, preset="folder", data="folder", flip=True),
}


def check(config: Config, data: ImageData) -> None:
    """Refuse settings that cannot work on this data, before anything is written."""
    n_clusters = config.clusters or data.n_classes
    if n_clusters < 2:
        raise UserError(f"{n_clusters} clusters; without classes in the data --clusters must be 2 or more")
    if len(data.x_train) < max(n_clusters, 2):
        raise UserError(f"{len(data.x_train)} images are fewer than the {n_clusters} clusters")
    if config.batch < 2:
        raise UserError(f"--batch {config.batch} must be 2 or more")
    require_above_zero(config, "epochs", "starts", "start_epochs", "lr", "critic_lr", "critic_steps")
    weights = ("alpha_adv", "alpha_si", "alpha_mi", "alpha_clu")
    require_not_negative(
        config, *weights, "xi", "rotate", "shift", "shear", "zoom", "stretch", "gamma", "light", "jitter"
    )
    if not any(getattr(config, name) for name in weights):
        raise UserError("--alpha-adv, --alpha-si, --alpha-mi and --alpha-clu are all 0: there is no loss")
    if not 0 < config.crop <= 1:
        raise UserError(f"--crop {config.crop} must be above 0 and at most 1")
    if not 0 <= config.tau <= 1:
        raise UserError(f"--tau {config.tau} must lie between 0 and 1")
