"""RUC: mends any clustering of images by robust learning from its own labels.

Park et al., "Improving Unsupervised Image Clustering With Robust Learning". Numbers of equations, tables and figures
are the paper's.

    python -m methods.ruc                                        digits: no download, no GPU, two minutes on one core
    python -m methods.ruc --data usps --base runs/scan-usps-…    mends a run of scan or bsc_ic, from its network on
    python -m methods.ruc --data npz:FILE --base CLUSTERS.npz    `probabilities` (N, C), perhaps `embeddings` (N, D)

No class is ever read but for the figures that are reported: what trains is never given one.
"""

from __future__ import annotations

import copy
import functools
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastclust
from methods.common import bases, networks
from methods.common.augment import Augment, cut_out
from methods.common.bases import Base
from methods.common.clustering import cluster_names, merged
from methods.common.config import launch
from methods.common.data import ImageData
from methods.common.errors import UserError
from methods.common.progress import Progress, in_short
from methods.common.randaugment import RUC_OPERATIONS, rand_augment
from methods.common.report import embedded
from methods.common.run import Run
from methods.common.sources import load
from methods.common.training import cosine, cycled, infer, pick_device, settle_statistics
from methods.common.views import Views
from methods.ruc_report import judged, quality, write_results
from methods.ruc_settings import PRESETS, Config, as_released, check

# What a person wants to see of an epoch while it runs: metric -> its short name, and how it is written.
IN_SHORT = {
    "loss": ("loss", "{:.3f}"),
    "clean": ("clean", "{}"),
    "confidence": ("confidence", "{:.2f}"),
    "acc": ("ACC", "{:.1f} %"),
    "ece": ("ECE", "{:.3f}"),
}

# ========================================================================================================== the trainer


def train(config: Config, resume: Path | None = None) -> Run:
    """Train, write the run's folder and print what came out; `resume` is the folder of a run to go on with."""
    asked, config = config, as_released(config) if config.compat == "released" else config
    check(config)
    device = pick_device(config.device, config.threads)
    data, base, n_train = load_with_base(config)
    clean = clean_set(config, base, device)
    learner = Learner(config, data.to(device).x_train, data.pixel_statistics(), base, clean)

    with Run("ruc", asked, data, resume) as run:
        state = run.restore() if resume else None
        first = learner.load_state(state) if state else 0
        steps = learner.steps * len(learner.networks)
        with Progress(steps * config.epochs, steps * first) as progress:
            for epoch in range(first + 1, config.epochs + 1):
                started = time.perf_counter()
                metrics: dict[str, Any] = {"epoch": epoch} | learner.epoch(epoch, progress)
                metrics["confidence"] = float(learner.assignments().amax(dim=1).mean())
                metrics |= judged(learner.assignments(), data.y_train)
                metrics |= quality(learner.clean.cpu(), learner.labels.cpu(), data.y_train, base)
                metrics["seconds"] = time.perf_counter() - started
                run.save(metrics, epoch=epoch, **learner.state())
                progress.epoch(f"epoch {epoch:3}/{config.epochs}", in_short(metrics, IN_SHORT))
        write_results(run, config, data, n_train, base, clean, learner)
    return run


def load_with_base(config: Config) -> tuple[ImageData, Base, int]:
    """The images to train on and their base clustering, and how many training images the data has.

    The test images stand behind these if they are trained on too, else they are kept apart.
    """
    if config.base == "kmeans":
        data = load(config, need_classes=False)
        n_train = len(data.x_train)
        data = merged(data) if config.part == "all" else data
        return data, bases.kmeans(data, config.clusters or data.n_classes, config.seed), n_train
    source = bases.find(config.base)
    data = load(bases.same_images(config, source), need_classes=False)
    base, n_train = bases.read(source, data), len(data.x_train)
    if config.part == "train":
        return data, bases.first(base, n_train, config.base), n_train
    if len(base.probabilities) == n_train and len(data.x_test):
        raise UserError(f"--part all: --base {config.base} knows the {n_train} training images only")
    return merged(data), base, n_train


class Learner:
    """Two networks that retrain on a clean set and teach each other (Algorithm 1). It never sees a class.

    Attributes:
        networks: the two, or the one without co-training.
        labels: int64 (N,), the label of each image: its cluster in the base, or the one it was given when it became
            clean. clean: bool (N,), the set X.
        steps: of each network in an epoch.
    """

    def __init__(
        self,
        config: Config,
        images: Tensor,
        statistics: tuple[Tensor, Tensor],
        base: Base,
        clean: Tensor,
    ):
        """`images`: uint8 (N, C, H, W). `statistics`: mean and deviation per channel, for a fresh backbone."""
        self.config, self.images, self.n_clusters = config, images, base.probabilities.shape[1]
        labels = base.probabilities.argmax(dim=1)
        self.labels, self.clean = labels.to(images.device), clean.to(images.device)
        self.co_training = config.variant in ("full", "no-label-smoothing")
        self.strong_loss = config.variant in ("full", "no-co-training")
        self.steps = math.ceil(len(images) / config.batch)
        torch.manual_seed(config.seed)
        self.architecture, start = self._start(base)
        self.networks = [self._fresh(start, statistics) for _ in range(2 if self.co_training else 1)]
        self.optimizers = [
            torch.optim.SGD(
                network.parameters(),
                lr=config.lr,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
                nesterov=config.momentum > 0,
            )
            for network in self.networks
        ]
        self.augment = Augment(config.pad, config.flip, config.rotate, config.scale, config.shift)
        self.predictions = [self.predict(network) for network in self.networks]
        self.snapshots: dict[int, Tensor] = {}

    def _start(self, base: Base) -> tuple[dict[str, Any], nn.Module | None]:
        """What to build the networks from, and the network whose backbone they take, if there is one."""
        if self.config.start == "base" and isinstance(base.network, networks.Classifier):
            # Features of unit length leave a fresh layer's logits near 0.
            fitting = {} if self.config.head == "base" else {"unit_length": False}
            return (base.architecture or {}) | fitting, base.network
        channels, size = self.images.shape[1], tuple(self.images.shape[2:])
        small = channels == 1 and max(size) <= 28
        architecture = {
            "name": self.config.network or ("cnn-small" if small else "resnet18"),
            "n_channels": channels,
            "image_size": size,
            "n_outputs": self.n_clusters,
            "weight_norm": False,
            "unit_length": False,
        }
        return architecture, None

    def _fresh(self, start: nn.Module | None, statistics: tuple[Tensor, Tensor]) -> networks.Classifier:
        """A network with the backbone of `start`, or random weights; its final layer is random (A.2) unless asked."""
        network = networks.build(**self.architecture)
        if start is not None:
            network.standardise, network.body = copy.deepcopy(start.standardise), copy.deepcopy(start.body)
            if self.config.head == "base":
                network.head = copy.deepcopy(start.head)
        else:
            network.standardise.set(*(value.cpu() for value in statistics))
        return network.requires_grad_().to(self.images.device)

    # --------------------------------------------------------------------------------------------------------- training

    def epoch(self, epoch: int, progress: Progress) -> dict[str, float]:
        """Each network over its batches, then co-refurbishing. Returns mean losses, and what became clean."""
        config, before = self.config, int(self.clean.sum())
        threshold = tau2(config, epoch)
        totals: dict[str, Tensor] = {}
        for k in range(len(self.networks)):
            for name, value in self.training_pass(k, epoch, threshold, progress).items():
                totals[name] = totals.get(name, 0) + value
            if config.settle:
                settle_statistics(self.networks[k], self.images, config.batch)
            self.predictions[k] = self.predict(self.networks[k])
        if config.refurbish == "epoch":
            self.labels, self.clean = co_refurbish(self.labels, self.clean, self.predictions, threshold)
        if config.report and epoch in {max(config.epochs // 4, 1), max(config.epochs // 2, 1)}:
            self.snapshots[epoch] = self.shown_features()
        means = {name: float(total) / (self.steps * len(self.networks)) for name, total in totals.items()}
        if not all(map(math.isfinite, means.values())):
            raise UserError("the loss is no longer finite; a lower --lr may help")
        now = int(self.clean.sum())
        return means | {"tau2": threshold, "clean": now, "refurbished": now - before}

    def training_pass(self, k: int, epoch: int, threshold: float, progress: Progress) -> dict[str, Tensor]:
        """One pass of network k; `threshold` is τ2. Returns the sum of each loss over the steps."""
        config = self.config
        refined = self.refined_labels(k)
        clean, unclean = torch.nonzero(self.clean).flatten(), torch.nonzero(~self.clean).flatten()
        draw = functools.partial(evenly, labels=self.labels) if config.balance else cycled
        batches = draw(clean, self.steps, min(config.batch, len(clean)))
        rest = cycled(unclean, self.steps, min(config.batch, len(unclean))) if len(unclean) else [unclean] * self.steps
        totals: dict[str, Tensor] = {}
        for step, (x, u) in enumerate(zip(batches, rest, strict=True)):
            done = epoch - 1 + step / self.steps
            self.optimizers[k].param_groups[0]["lr"] = cosine(config.lr, done, config.epochs)
            weight = config.lambda_u * ramp(done / config.epochs, config.ramp_floor)
            for name, value in self.step(k, x, u, refined[x], weight, threshold).items():
                totals[name] = totals.get(name, 0) + value
            progress.step(f"epoch {epoch}, network {k + 1}")
        return totals

    def step(self, k: int, x: Tensor, u: Tensor, refined: Tensor, weight: float, threshold: float) -> dict[str, Tensor]:
        """One step of network k on eq. 10 for clean images `x` and unclean ones `u`, indices. Returns its terms.

        `refined`: ȳ of the clean images (B, C). `weight`: λ_U as far as it has risen.
        """
        config, network = self.config, self.networks[k]
        weak_x, views_u = self.weak(x), [self.weak(u) for _ in range(config.views)] if len(u) else []
        own, guess = self.guess(k, views_u)
        if config.refurbish == "batch" and len(u):
            self.refurbish_batch(u, own, threshold)
        mixed, targets = mixmatch(
            torch.cat([weak_x, *views_u[:1]]), torch.cat([refined, *([guess] if len(u) else [])]), config.alpha
        )
        network.train()
        terms = {}
        if self.strong_loss:
            smooth = smoothed(F.one_hot(self.labels[x], self.n_clusters).float(), self.noise(len(x)))
            terms["strong"] = cross_entropy(smooth, network(self.strong(x)))  # eq. 9
        logits = network(mixed)
        terms["clean"] = cross_entropy(targets[: len(x)], logits[: len(x)])  # eq. 6
        if len(u):
            terms["unclean"] = squared_error(targets[len(x) :], logits[len(x) :], config.square)  # eq. 7
        loss = sum(weight * term if name == "unclean" else term for name, term in terms.items())  # eq. 10
        self.optimizers[k].zero_grad()
        loss.backward()
        self.optimizers[k].step()
        return {"loss": loss.detach()} | {f"loss_{name}": term.detach() for name, term in terms.items()}

    def refined_labels(self, k: int) -> Tensor:
        """ȳ of all images (N, C) for network k by its counter network, which rests meanwhile (eqs. 11, 12)."""
        y = F.one_hot(self.labels, self.n_clusters).float()
        if not self.co_training:
            return y
        return co_refined(y, self.predictions[1 - k], self.config.temperature)

    @torch.no_grad()
    def guess(self, k: int, views: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """Network k's own mean prediction for unclean images, and their label q̄ from all networks (eqs. 13, 14)."""
        if not views:
            return None, None
        for network in self.networks:
            network.eval()
        seen = torch.cat(views)
        answers = [network(seen).softmax(dim=1).unflatten(0, (len(views), -1)) for network in self.networks]
        own = answers[k].mean(dim=0)
        return own, sharpened(torch.cat(answers).mean(dim=0), self.config.temperature)

    def refurbish_batch(self, u: Tensor, own: Tensor, threshold: float) -> None:
        """Let images of which network k is sure become clean; they count as such from the next pass on (`released`)."""
        confidence, label = own.max(dim=1)
        sure = confidence > threshold
        self.labels[u[sure]], self.clean[u[sure]] = label[sure], True

    # ------------------------------------------------------------------------------------------------------------ views

    def weak(self, indices: Tensor) -> Tensor:
        """φ_a: a weak view of the images of these indices."""
        if self.config.crop < 1:
            config = self.config
            return Views(config.crop, config.flip, config.rotate, config.shift)(self.images[indices])
        return self.augment(self.images[indices])

    def strong(self, indices: Tensor) -> Tensor:
        """φ_A: a weak view with RandAugment on top of it."""
        config = self.config
        views = rand_augment(self.weak(indices), config.strong_ops, RUC_OPERATIONS, config.strong_magnitude)
        return cut_out(views, config.cutout) if config.cutout else views

    def noise(self, n: int) -> Tensor:
        """ε of n images (n, 1)."""
        if self.config.draw_epsilon:
            return torch.rand(n, 1, device=self.images.device)
        return torch.full((n, 1), self.config.epsilon, device=self.images.device)

    # ---------------------------------------------------------------------------------------------- results, checkpoint

    def predict(self, network: nn.Module, images: Tensor | None = None) -> Tensor:
        """Soft assignments (N, C) of all images, or of these, not augmented."""
        network.eval()
        return infer(lambda x: network(x).softmax(dim=1), self.images if images is None else images)

    def assignments(self) -> Tensor:
        """What the networks say of all images together: the mean of their probabilities (N, C), on the CPU."""
        return torch.stack(self.predictions).mean(dim=0).cpu()

    def together(self) -> nn.Module:
        """Both networks as one, in evaluation mode."""
        whole = networks.Ensemble(self.networks) if self.co_training else self.networks[0]
        return whole.eval()

    def features(self, images: Tensor | None = None) -> Tensor:
        """Features (N, D) of all images, or of these, not augmented; both networks' side by side, on the CPU."""
        return infer(self.together().features, self.images if images is None else images).cpu()

    def shown_features(self) -> Tensor:
        """Features of the images that the report shows."""
        return self.features(self.images[embedded(len(self.images))])

    def state(self) -> dict[str, Any]:
        return {
            "architecture": self.architecture | ({"members": 2} if self.co_training else {}),
            "class_names": cluster_names(self.n_clusters),
            "network": self.together().state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "labels": self.labels,
            "clean": self.clean,
            "snapshots": self.snapshots,
        }

    def load_state(self, state: dict[str, Any]) -> int:
        """Take up what `state` gave. Returns the number of epochs that were finished."""
        self.together().load_state_dict(state["network"])
        for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        self.labels, self.clean = (state[name].to(self.images.device) for name in ("labels", "clean"))
        self.snapshots = state["snapshots"]
        self.predictions = [self.predict(network) for network in self.networks]
        return state["epoch"]


# ======================================================================================================== the clean set


def clean_set(config: Config, base: Base, device: torch.device) -> Tensor:
    """bool (N,): the images whose pseudo-label is credible (3.1); every cluster must have some."""
    confidence, labels = base.probabilities.max(dim=1)
    n_clusters = base.probabilities.shape[1]
    signs = {"confidence": confidence > config.tau1}
    if config.strategy != "confidence":
        if base.embeddings is None:
            raise UserError(
                f"--strategy {config.strategy} needs `embeddings` in --base {config.base}; without them take "
                f"--strategy confidence"
            )
        if config.neighbours >= len(labels):
            raise UserError(f"--neighbours {config.neighbours} must be lower than the number of images, {len(labels)}")
        found = majority(base.embeddings.to(device), labels.to(device), config.neighbours, n_clusters)
        signs["metric"] = found.cpu() == labels
        signs["hybrid"] = signs["confidence"] & signs["metric"]
    clean = signs[config.strategy]
    missed = missed_clusters(labels, clean, n_clusters)
    if missed:
        others = [name for name, other in signs.items() if not missed_clusters(labels, other, n_clusters)]
        instead = f"take --strategy {others[0]}, or " if others else ""
        lower = {"confidence": "--tau1", "metric": "--neighbours", "hybrid": "--tau1 or --neighbours"}[config.strategy]
        what = "the clean set is empty" if not clean.any() else f"the clean set has no image of the clusters {missed}"
        seen = confidence[torch.isin(labels, torch.tensor(missed))].max()
        threshold = f" (τ1 {config.tau1:g}, greatest confidence there {seen:.3f})" * (config.strategy != "metric")
        raise UserError(f"{what}: {instead}lower {lower}{threshold}")
    return clean


def missed_clusters(labels: Tensor, clean: Tensor, n_clusters: int) -> list[int]:
    """The clusters that no image of the clean set, bool (N,), has as its label (N,)."""
    return (torch.bincount(labels[clean], minlength=n_clusters) == 0).nonzero().flatten().tolist()


def majority(embeddings: Tensor, labels: Tensor, k: int, n_clusters: int) -> Tensor:
    """int64 (N,): the commonest label among the k nearest other images by cosine; of equals the lowest."""
    neighbours = fastclust.knn(embeddings, k).indices
    return F.one_hot(labels[neighbours], n_clusters).sum(dim=1).argmax(dim=1)


# =========================================================================================================== the pieces


def sharpened(p: Tensor, temperature: float) -> Tensor:
    """Rows of (N, C) raised to 1 / T and brought to sum 1."""
    powers = p ** (1 / temperature)
    return powers / powers.sum(dim=1, keepdim=True)


def smoothed(y: Tensor, epsilon: Tensor | float) -> Tensor:
    """ỹ of one-hot rows (N, C): 1 - ε where y is 1, ε / (C - 1) elsewhere (eq. 8)."""
    return (1 - epsilon) * y + epsilon / (y.shape[1] - 1) * (1 - y)


def co_refined(y: Tensor, counter: Tensor, temperature: float) -> Tensor:
    """ȳ of one-hot rows (N, C) with the counter network's predictions (N, C) of all N images (eqs. 11, 12).

    w, the counter network's confidence, is scaled to 0 … 1 over the images.
    """
    confidence = counter.amax(dim=1, keepdim=True)
    low, high = confidence.min(), confidence.max()
    w = (confidence - low) / (high - low).clamp(min=1e-12)
    return sharpened((1 - w) * y + w * counter, temperature)


def mixmatch(images: Tensor, targets: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Each image (N, C', H, W) and target (N, C) mixed with another of the batch, itself outweighing (eqs. 1 to 5)."""
    shape = torch.full((len(images),), alpha, device=images.device)
    share = torch.distributions.Beta(shape, shape).sample()
    share = torch.maximum(share, 1 - share)
    other = torch.randperm(len(images), device=images.device)
    return (
        mixed(images, images[other], share[:, None, None, None]),
        mixed(targets, targets[other], share[:, None]),
    )


def mixed(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """λ' first + (1 - λ') second (eqs. 3, 4)."""
    return share * first + (1 - share) * second


def cross_entropy(targets: Tensor, logits: Tensor) -> Tensor:
    """H(target, softmax), the mean over rows (N, C) (eqs. 6, 9)."""
    return -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean()


def squared_error(targets: Tensor, logits: Tensor, over_classes: str) -> Tensor:
    """‖target - softmax‖² of rows (N, C), the mean over rows and the mean or the sum over classes (eq. 7)."""
    squares = (targets - logits.softmax(dim=1)).square()
    return squares.mean() if over_classes == "mean" else squares.sum(dim=1).mean()


def evenly(indices: Tensor, n_batches: int, batch: int, labels: Tensor) -> tuple[Tensor, ...]:
    """Batches of these images drawn with replacement, each of their labels (N,) as likely as any other."""
    of_each = labels[indices]
    weights = 1 / torch.bincount(of_each)[of_each]
    return indices[torch.multinomial(weights, n_batches * batch, replacement=True)].split(batch)


def ramp(share: float, floor: float) -> float:
    """How much of λ_U counts after this share of the run: it rises evenly, from the floor on."""
    return max(share, floor)


def tau2(config: Config, epoch: int) -> float:
    """τ2 in this epoch, the first being 1."""
    return min(config.tau2 + config.tau2_rise * ((epoch - 1) // config.tau2_every), 1.0)


def co_refurbish(labels: Tensor, clean: Tensor, predictions: list[Tensor], threshold: float) -> tuple[Tensor, Tensor]:
    """Labels (N,) and clean set (N,) with the unclean images of which a network is surer than τ2 (eqs. 18, 19).

    `predictions`: of each network, (N, C); the surer one gives the label.
    """
    confidence, answer = torch.stack(predictions).max(dim=2)  # (networks, N)
    surer = confidence.argmax(dim=0, keepdim=True)
    confidence, answer = confidence.gather(0, surer)[0], answer.gather(0, surer)[0]
    found = ~clean & (confidence > threshold)
    return torch.where(found, answer, labels), clean | found


if __name__ == "__main__":
    sys.exit(launch("ruc", PRESETS, train))
