"""A finished clustering as the start of another method: a run's folder, an .npz file, k-means of pixels."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

import fastclust
from methods.common import networks
from methods.common.config import RunConfig
from methods.common.data import ImageData
from methods.common.errors import UserError
from methods.common.run import load_checkpoint

ConfigT = TypeVar("ConfigT", bound=RunConfig)

_TOLERANCE = 1e-3  # of a row's sum: float16 files round


class Base(NamedTuple):
    """Soft assignments of N images, and what made them where that is known."""

    probabilities: Tensor  # (N, C) float32, rows sum to 1
    embeddings: Tensor | None = None  # (N, D) float32
    network: nn.Module | None = None  # in evaluation mode; gives logits (n, C)
    architecture: dict[str, Any] | None = None  # what it was built from


@dataclass(frozen=True)
class Source:
    """Where a base is to be found: `settings` are those of the run that left it, empty for a file."""

    name: str
    path: Path
    settings: dict[str, Any]


def find(name: str) -> Source:
    """The base called `name`, a run's folder or an .npz file, by its settings; arrays are not read yet."""
    path = Path(name)
    if not path.exists():
        raise UserError(f"--base {name}: no such file or folder")
    if not path.is_dir():
        return Source(name, path, {})
    if not (path / "assignments.npz").exists():
        raise UserError(
            f"--base {name} holds no assignments.npz: is it the folder of a finished run of scan or bsc_ic?"
        )
    try:
        settings = json.loads((path / "config.json").read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"--base {name} holds no config.json that can be read") from None
    return Source(name, path, settings)


def same_images(config: ConfigT, source: Source) -> ConfigT:
    """The settings with the base's own choice of images: its subset, its size of images, the seed of its split."""
    if not source.settings:
        return config
    if source.settings["data"] != config.data:
        raise UserError(f"--base {source.name} is of --data {source.settings['data']}, not {config.data}")
    settings = {"subset_test": 0} | source.settings  # which older runs do not know
    for name in ("subset", "subset_test"):
        if getattr(config, name) not in (0, settings[name]):
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"--base {source.name} is of {option} {settings[name]}, not {getattr(config, name)}")
    return replace(config, **{name: settings[name] for name in ("subset", "subset_test", "image_size", "seed")})


def read(source: Source, data: ImageData) -> Base:
    """The base's arrays, checked against the images, and its network if it left one."""
    n_train, n_all = len(data.x_train), len(data.x_train) + len(data.x_test)
    path = source.path / "assignments.npz" if source.settings else source.path
    arrays = _arrays(path)
    if "probabilities" not in arrays:
        raise UserError(f"--base {path} lacks the array probabilities, (N, C)")
    probabilities = _checked(path, "probabilities", arrays["probabilities"])
    if len(probabilities) not in (n_train, n_all):
        raise UserError(
            f"--base {path} holds {len(probabilities)} rows, the data {n_train} training images ({n_all} with the test "
            f"images): give it the images it was made of (--data, --subset, --subset-test, --seed)"
        )
    check_distribution(path, probabilities)
    embeddings = None
    if "embeddings" in arrays:
        embeddings = _checked(path, "embeddings", arrays["embeddings"])
        if len(embeddings) != len(probabilities):
            raise UserError(
                f"--base {path}: embeddings holds {len(embeddings)} rows, probabilities {len(probabilities)}"
            )
    return Base(probabilities, embeddings, *_network(source, probabilities.shape[1]))


def check_distribution(path: Path, probabilities: Tensor) -> None:
    """Refuse rows that are no distribution, and clusters that are nobody's likeliest."""
    if (probabilities < 0).any() or ((probabilities.sum(dim=1) - 1).abs() > _TOLERANCE).any():
        bad = ((probabilities < 0).any(dim=1) | ((probabilities.sum(dim=1) - 1).abs() > _TOLERANCE)).nonzero()
        raise UserError(
            f"--base {path}: probabilities must be 0 or more and sum to 1 in each row; {len(bad)} rows do not, first "
            f"{int(bad[0])}; logits need a softmax first"
        )
    check_clusters(str(path), probabilities)


def check_clusters(name: str, probabilities: Tensor) -> None:
    """Refuse a clustering with fewer than two clusters, or an empty one."""
    n_clusters = probabilities.shape[1]
    if n_clusters < 2:
        raise UserError(f"--base {name} has {n_clusters} clusters; two is the least")
    empty = (torch.bincount(probabilities.argmax(dim=1), minlength=n_clusters) == 0).nonzero().flatten().tolist()
    if empty:
        which = ", ".join(map(str, empty[:8])) + (", …" if len(empty) > 8 else "")
        raise UserError(
            f"--base {name}: {len(empty)} of {n_clusters} clusters are empty ({which}), no image's likeliest: drop "
            f"their columns, or cluster again with fewer"
        )


def first(base: Base, n: int, name: str) -> Base:
    """The base of the first n images alone."""
    embeddings = None if base.embeddings is None else base.embeddings[:n]
    base = base._replace(probabilities=base.probabilities[:n], embeddings=embeddings)
    check_clusters(name, base.probabilities)
    return base


def kmeans(data: ImageData, n_clusters: int, seed: int) -> Base:
    """k-means of the training images' pixels, soft as the Gaussian mixture is that it fits.

    All clusters have one variance in all directions, the mean squared distance to the centroids over the dimensions.
    """
    if not 2 <= n_clusters <= len(data.x_train):
        raise UserError(
            f"--base kmeans: {n_clusters} clusters of {len(data.x_train)} images; without classes in the data "
            f"--clusters must be 2 or more, and no more than the images"
        )
    pixels = data.x_train.flatten(start_dim=1).float() / 255
    found = fastclust.kmeans(pixels, n_clusters, n_init=10, seed=seed)
    scale = (2 * found.inertia / pixels.numel()).clamp(min=1e-12).rsqrt().to(pixels)
    probabilities = fastclust.soft_assign(pixels * scale, found.centroids * scale).exp().cpu()
    check_clusters("kmeans", probabilities)
    return Base(probabilities, pixels.cpu())


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in ("probabilities", "embeddings") if key in archive}
    except (OSError, ValueError, EOFError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"--base {path} cannot be read as an .npz file: {str(error).splitlines()[0]}") from None


def _checked(path: Path, name: str, array: np.ndarray) -> Tensor:
    """A float array of two dimensions whose values are finite, as float32."""
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.floating):
        raise UserError(f"--base {path}: {name} must be floats (N, …), is {array.dtype} {array.shape}")
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if len(bad):
        raise UserError(f"--base {path}: {name} holds {len(bad)} rows that are not finite, first at {bad[0]}")
    return torch.from_numpy(array.astype(np.float32))


def _network(source: Source, n_clusters: int) -> tuple[nn.Module | None, dict[str, Any] | None]:
    """The network of a base's run, if it left one that gives these clusters."""
    checkpoint = load_checkpoint(source.path) if source.settings else None
    state = checkpoint["state"] if checkpoint else {}
    architecture = state.get("architecture", {})
    if architecture.get("name") not in networks.NAMES or architecture["n_outputs"] != n_clusters:
        return None, None
    network = networks.build(**architecture)
    network.load_state_dict(state["network"])
    return network.eval(), architecture
