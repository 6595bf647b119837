"""A network trained before a method begins, once for an image set and its settings, and kept for all runs."""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from methods.common.data import ImageData
from methods.common.errors import UserError
from methods.common.progress import Progress
from methods.common.run import load_whole, rng_state, set_rng_state, write_whole
from methods.common.training import shuffled


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every such training has; `seed` fixes every draw."""

    seed: int
    epochs: int
    lr: float
    batch: int


class Pretraining(ABC):
    """Training on all training images without classes, kept under a hash of the images and the settings.

    It draws from its own seed, so that a run that finds a trained network is the same bit for bit as the one that
    trained it. What is begun is kept too, after each epoch, and the next run goes on with it.

    A subclass says what the `loss` of a batch is, and names what is trained, its loss and the option of its rate.

    Args:
        network: takes on the kept weights at once, if there are any.
        architecture: what the network was built from, as far as the weights depend on it.
        folder: where trained networks are kept.

    Attributes:
        epoch: how many are done.
        losses: mean loss of each.
    """

    title: ClassVar[str]
    loss_name: ClassVar[str]
    lr_option: ClassVar[str] = "--pretrain-lr"

    def __init__(
        self,
        network: nn.Module,
        architecture: dict[str, Any],
        optimizer: torch.optim.Optimizer,
        data: ImageData,
        settings: Settings,
        folder: Path,
    ):
        self.network, self.optimizer, self.images, self.settings = network, optimizer, data.x_train, settings
        self.steps = math.ceil(len(self.images) / settings.batch)
        images = hashlib.sha256(self.images.cpu().contiguous().numpy())
        depends_on = json.dumps([asdict(settings), architecture], sort_keys=True)
        key = hashlib.sha256(images.digest() + depends_on.encode()).hexdigest()[:16]
        self.finished, self.begun = folder / f"{data.name}-{key}.pt", folder / f"{data.name}-{key}.begun.pt"
        self.epoch, self.losses, self._rng = 0, [], None
        self._restore()

    @abstractmethod
    def loss(self, images: Tensor) -> Tensor:
        """The loss of a batch of uint8 images (n, C, H, W)."""

    def learning_rate(self, epoch: int) -> float:
        """The rate in that epoch, counted from 0."""
        return self.settings.lr

    @property
    def total_steps(self) -> int:
        return self.steps * self.settings.epochs

    @property
    def done_steps(self) -> int:
        return self.steps * self.epoch

    def train(self, progress: Progress) -> None:
        """Do the epochs that are left, if any."""
        if self._rng is None:
            torch.manual_seed(self.settings.seed)
        else:
            set_rng_state(self._rng)
        self.network.train()
        last = self.settings.epochs
        while self.epoch < last:
            self.losses.append(self._pass(progress))
            self.epoch += 1
            self._save(self.finished if self.epoch == last else self.begun)
            progress.epoch(f"{self.title} {self.epoch:3}/{last}", {self.loss_name: f"{self.losses[-1]:.3f}"})
        self.begun.unlink(missing_ok=True)

    def _pass(self, progress: Progress) -> float:
        """One pass over all images. Returns the mean loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.epoch)
        total = torch.zeros((), device=self.images.device)
        for batch in shuffled(torch.arange(len(self.images), device=self.images.device), self.steps):
            loss = self.loss(self.images[batch])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            total += loss.detach()
            progress.step(self.title)
        mean = float(total) / self.steps
        if not math.isfinite(mean):
            raise UserError(f"the {self.title}'s loss is no longer finite; a lower {self.lr_option} may help")
        return mean

    def _restore(self) -> None:
        state = load_whole(self.finished) or load_whole(self.begun)
        if state is not None:
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.epoch, self.losses, self._rng = state["epoch"], state["losses"], state["rng"]

    def _save(self, path: Path) -> None:
        state = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict(), "rng": rng_state()}
        state |= {"epoch": self.epoch, "losses": self.losses}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, lambda file: torch.save(state, file))
        except OSError as error:
            raise UserError(f"--cache {path.parent}: {error.strerror}") from None
