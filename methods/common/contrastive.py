"""SimCLR (Chen et al., ICML 2020): an embedding of images learnt without classes, from two views of each.

The network is trained once for an image set, its settings and its architecture, and kept for all runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.common import networks, pretraining
from methods.common.data import ImageData
from methods.common.errors import UserError
from methods.common.training import cosine, infer
from methods.common.views import Views


@dataclass(frozen=True, kw_only=True)
class Settings(pretraining.Settings):
    """Of SGD on NT-Xent.

    Attributes:
        momentum, weight_decay: of SGD.
        temperature: τ of NT-Xent.
        views: what the two views of an image may differ in.
    """

    momentum: float
    weight_decay: float
    temperature: float
    views: Views


class Embedder(nn.Module):
    """A backbone, and the projection on which the views are compared: two linear layers with a ReLU between.

    Args:
        architecture: of the backbone, for `networks.build`; its own linear head is not used.
        n_projected: dimensions of the projection.
    """

    def __init__(self, architecture: dict[str, Any], n_projected: int):
        super().__init__()
        self.backbone = networks.build(**architecture)
        n_features = self.backbone.head.in_features
        self.backbone.head = nn.Identity()
        self.projection = nn.Sequential(
            nn.Linear(n_features, n_features), nn.ReLU(), nn.Linear(n_features, n_projected)
        )

    def features(self, images: Tensor) -> Tensor:
        """Features of the backbone, (N, D), of images (N, C, H, W) in [0, 1]."""
        return self.backbone.features(images)

    def forward(self, images: Tensor) -> Tensor:
        """Projections of unit length, (N, n_projected), of images (N, C, H, W) in [0, 1]."""
        return F.normalize(self.projection(self.features(images)), dim=1)


def nt_xent(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross-entropy: each view is to find the other one among all 2N - 1 others.

    Args:
        a, b: (N, D), two views of N images, of unit length.

    Source: SimCLR, eq. 1, the mean over all 2N views.
    """
    z = torch.cat([a, b])
    similarity = (z @ z.T / temperature).fill_diagonal_(float("-inf"))
    other = torch.arange(len(z), device=z.device).roll(len(a))
    return F.cross_entropy(similarity, other)


class SimCLR(pretraining.Pretraining):
    """The training of an `Embedder`, or what is kept of an earlier one.

    Args:
        architecture: of the backbone, for `networks.build`; its `n_outputs` has no effect.
        data: of which the training images alone are used, without their classes.
        folder: where trained networks are kept.

    The start is drawn from the seed of the settings too: it depends on nothing else that a run may have drawn.
    """

    title, loss_name = "SimCLR", "NT-Xent"

    def __init__(
        self, architecture: dict[str, Any], data: ImageData, settings: Settings, folder: Path, n_projected: int = 128
    ):
        if settings.batch < 2 or len(data.x_train) < 2:
            raise UserError("SimCLR tells images of a batch apart; two is the least of images and of --pretrain-batch")
        shape = {name: value for name, value in architecture.items() if name != "n_outputs"}
        torch.manual_seed(settings.seed)
        network = Embedder(shape | {"n_outputs": 1}, n_projected)
        network.backbone.standardise.set(*data.pixel_statistics())
        network.to(data.x_train.device)
        optimizer = torch.optim.SGD(
            network.parameters(), lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
        super().__init__(network, shape | {"n_projected": n_projected}, optimizer, data, settings, folder)

    def loss(self, images: Tensor) -> Tensor:
        views = torch.cat([self.settings.views(images), self.settings.views(images)])
        return nt_xent(*self.network(views).split(len(images)), self.settings.temperature)

    def learning_rate(self, epoch: int) -> float:
        return cosine(self.settings.lr, epoch, self.settings.epochs)

    def embeddings(self, images: Tensor, *, projected: bool = False) -> Tensor:
        """Features of the backbone (N, D), or their projections (N, n_projected), of uint8 images, not augmented."""
        self.network.eval()
        return infer(self.network if projected else self.network.features, images)

    def start(self, architecture: dict[str, Any]) -> networks.Classifier:
        """A classifier of that architecture with the trained backbone under a head drawn afresh."""
        classifier = networks.build(**architecture).to(self.images.device)
        classifier.load_state_dict(classifier.state_dict() | self.network.backbone.state_dict())
        return classifier
