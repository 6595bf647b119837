"""CycleCluster: semi-supervised classification by clustering and label diffusion in turn, on one shared network.

Sellars, Aviles-Rivero and Schönlieb, "CycleCluster: Modernising Clustering Regularisation for Deep Semi-Supervised
Classification". Numbers of equations are the paper's.

    python -m methods.cyclecluster                         digits, 50 labels: no download, no GPU, about a minute
    python -m methods.cyclecluster --baseline graph        "Purely Graphical": without the clustering pass
    python -m methods.cyclecluster --baseline supervised   labelled images only
    python -m methods.cyclecluster --data npz:FILE --labels 100
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import fastclust
from methods.common import networks
from methods.common.augment import Augment
from methods.common.config import RunConfig, launch
from methods.common.data import ImageData, choose_labelled
from methods.common.errors import UserError
from methods.common.progress import Progress
from methods.common.report import Section, classification_sections, curves, page
from methods.common.run import Run
from methods.common.sources import load
from methods.common.training import cosine, cycled, infer, pick_device, shuffled

# ============================================================================================================= settings


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
    """`cnn13` (the "13-layer" network) or `cnn-small`."""
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
}
PRESETS["usps"] = replace(PRESETS["digits"], preset="usps", data="usps", labels=100, epochs=20, anneal_end=22)
PRESETS["mnist"] = replace(PRESETS["usps"], preset="mnist", data="mnist")
PRESETS["folder"] = replace(
    PRESETS["digits"], preset="folder", data="folder:.", labels=0, neighbours=20, pad=2, flip=True, shift=0.0
)

# Panels of the report: metric -> the name shown.
PANELS = {
    "Losses": {"loss_clusters": "L_C", "loss_classes": "L_W"},
    "Errors, %": {"pseudo_label_error": "pseudo-labels of unlabelled images", "test_error": "test images"},
    "Pseudo-labels": {"entropy_weight": "mean entropy weight ω", "cluster_nmi": "NMI of clusters and classes"},
}

# ========================================================================================================== the trainer


def train(config: Config, resume: Path | None = None) -> Run:
    """Train, write the run's folder and print what came out; `resume` is the folder of a run to go on with."""
    # ------------------------------------------------------------------------------------------------ images and labels
    torch.manual_seed(config.seed)
    device = pick_device(config.device, config.threads)
    data = load(config)
    labelled = choose_labelled(data.y_train, config.labels, data.n_classes, config.seed)
    check(config, n_images=len(data.x_train), n_labelled=len(labelled))
    data = data.to(device)
    given = torch.full_like(data.y_train, -1)
    given[labelled] = data.y_train[labelled]
    learner = Learner(config, data, given)

    with Run("cyclecluster", config, data, resume) as run:
        state = run.restore() if resume else None
        first = learner.load_state(state) if state else 0
        done = learner.total_steps(first) if first else 0
        with Progress(learner.total_steps(config.epochs), done) as learner.progress:
            # -------------------------------------------------------------------------------- supervised initialisation
            if first == 0:
                for _ in range(config.init_epochs):
                    learner.supervised_pass(shuffled(learner.labelled, learner.init_steps), "first labels")

            # ------------------------------------------------------------------------------------------------ the cycle
            for epoch in range(first, config.epochs):
                started = time.perf_counter()
                learner.start_epoch(epoch)
                metrics: dict[str, Any] = {"epoch": epoch + 1, "lr": learner.lr}
                if config.baseline == "supervised":
                    batches = cycled(learner.labelled, learner.class_steps, learner.batch)
                    metrics["loss_classes"] = learner.supervised_pass(batches, f"epoch {epoch + 1}")
                else:
                    features = learner.features(data.x_train)
                    clusters = learner.cluster_pseudo_labels(features, metrics) if config.baseline == "none" else None
                    classes = learner.class_pseudo_labels(features, metrics)
                    metrics["seconds_pseudo_labels"] = time.perf_counter() - started
                    if clusters is not None:
                        metrics["loss_clusters"] = learner.cluster_pass(clusters, f"epoch {epoch + 1}, clusters")
                    metrics["loss_classes"] = learner.class_pass(classes, f"epoch {epoch + 1}, classes")
                metrics |= learner.test_error() | {"seconds": time.perf_counter() - started}
                run.save(metrics, epoch=epoch + 1, **learner.state())
                learner.progress.epoch(f"epoch {epoch + 1:3}/{config.epochs}", in_short(metrics))

        # ------------------------------------------------------------------------------------------ what the run leaves
        write_results(run, learner)
    return run


class Learner:
    """The shared network and its optimiser, with the steps of one epoch in the paper's order.

    Attributes:
        epoch: how far the run is; the learning rate follows it through both passes.
        epochs_per_step: what each step adds to it; nothing during the supervised initialisation.
        centroids: those of the last clustering, (K, D).
        progress: told of each step of the optimiser.
    """

    progress: Progress

    def __init__(self, config: Config, data: ImageData, given: Tensor):
        """`given`: int64 (N,), the class of each labelled training image, -1 elsewhere."""
        self.config, self.data, self.given = config, data, given
        self.labelled, self.unlabelled = torch.nonzero(given >= 0).flatten(), torch.nonzero(given < 0).flatten()
        self.n_clusters = config.clusters or data.n_classes
        self.architecture = {
            "name": config.network,
            "n_channels": data.n_channels,
            "image_size": data.image_size,
            "n_outputs": max(self.n_clusters, data.n_classes),  # one head for clusters and classes (Fig. 1)
            "weight_norm": config.weight_norm,
        }
        self.network = networks.build(**self.architecture)
        self.network.standardise.set(*data.pixel_statistics())
        self.network.to(given.device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
        )
        self.augment = Augment(config.pad, config.flip, config.rotate, config.scale, config.shift)
        self.epoch, self.epochs_per_step = 0.0, 0.0
        self.centroids: Tensor | None = None

        self.batch = config.batch_labelled + config.batch_unlabelled
        self.init_steps = math.ceil(len(self.labelled) / self.batch)
        self.cluster_steps = math.ceil(len(given) / self.batch) if config.baseline == "none" else 0
        self.class_steps = math.ceil(len(self.unlabelled) / config.batch_unlabelled)

    # ---------------------------------------------------------------------------------------- pseudo-labels of an epoch

    def features(self, images: Tensor) -> Tensor:
        """Features of unit length, (N, D), under the evaluation transform."""
        self.network.eval()
        return infer(self.network.features, images)

    def cluster_pseudo_labels(self, features: Tensor, metrics: dict[str, Any]) -> Tensor:
        """Cluster ids of all training images by k-means (III-A), int64 (N,); adds to the epoch's metrics."""
        config, n_clusters = self.config, self.n_clusters
        init = "k-means++" if config.kmeans_init == "warm_start" else config.kmeans_init
        if config.kmeans_init == "warm_start" and self.centroids is not None:
            init = self.centroids
        seed = int(torch.randint(2**31, ()))
        found = fastclust.kmeans(features, n_clusters, init=init, max_iter=config.kmeans_iter, seed=seed)
        self.centroids = found.centroids
        sizes = torch.bincount(found.labels, minlength=n_clusters)
        metrics |= {
            "cluster_smallest": int(sizes.min()),
            "cluster_largest": int(sizes.max()),
            "kmeans_iterations": int(found.n_iter),
            "kmeans_inertia": float(found.inertia),
        }
        if (self.data.y_train >= 0).all():
            metrics["cluster_nmi"] = float(fastclust.metrics.normalized_mutual_info(self.data.y_train, found.labels))
        if config.align == "none":
            return found.labels
        with torch.no_grad():
            probability = self.network.head(features)[:, :n_clusters].softmax(dim=1)
        return match_ids(found.labels, probability)

    def class_pseudo_labels(self, features: Tensor, metrics: dict[str, Any]) -> fastclust.PseudoLabels:
        """Classes by diffusion over the kNN graph (eq. 2), entropy weights ω, class weights ζ; adds to the metrics."""
        config = self.config
        graph = fastclust.knn_graph(features, config.neighbours, power=config.power)
        pseudo = fastclust.propagate_labels(
            graph,
            self.given,
            n_classes=self.data.n_classes,
            alpha=config.alpha,
            tol=config.diffusion_tol,
            max_iter=config.diffusion_iter,
        )
        weights = pseudo.weights[self.unlabelled]
        metrics |= {
            "entropy_weight": float(weights.mean()),
            "unreached": int((weights == 0).sum()),
            "diffusion_residual": float(pseudo.residual.max()),
            "classes_empty": int((pseudo.class_weights == 0).sum()),
        }
        truth = self.data.y_train[self.unlabelled]
        known = truth >= 0
        if known.any():
            metrics["pseudo_label_error"] = error_rate(pseudo.labels[self.unlabelled][known], truth[known])
        return pseudo

    # ----------------------------------------------------------------------------------------------- passes of an epoch

    def cluster_pass(self, clusters: Tensor, title: str) -> float:
        """One pass over all images on L_C, the cross-entropy to the cluster ids (eq. 1). Returns its mean."""
        self.network.train()
        total = torch.zeros((), device=clusters.device)
        for batch in shuffled(torch.arange(len(clusters), device=clusters.device), self.cluster_steps):
            logits = self.network(self.augment(self.data.x_train[batch]))
            loss = F.cross_entropy(logits[:, : self.n_clusters], clusters[batch])
            total += self.update(loss, title)
        return mean_loss(total, self.cluster_steps)

    def class_pass(self, pseudo: fastclust.PseudoLabels, title: str) -> float:
        """One pass over the unlabelled images on L_W, labelled ones beside them in each batch (eq. 6)."""
        self.network.train()
        weights = pseudo.class_weights[pseudo.labels] * pseudo.weights  # ζ ω; ω = 1 where the label was given
        total = torch.zeros((), device=weights.device)
        labelled = cycled(self.labelled, self.class_steps, self.config.batch_labelled)
        for part, rest in zip(labelled, shuffled(self.unlabelled, self.class_steps), strict=True):
            batch = torch.cat([part, rest])
            loss = weights[batch] * self.class_loss(batch, pseudo.labels)
            total += self.update(loss[: len(part)].mean() + loss[len(part) :].mean(), title)
        return mean_loss(total, self.class_steps)

    def supervised_pass(self, batches: Sequence[Tensor], title: str) -> float:
        """Batches of labelled images alone."""
        self.network.train()
        total = torch.zeros((), device=self.given.device)
        for batch in batches:
            total += self.update(self.class_loss(batch, self.given).mean(), title)
        return mean_loss(total, len(batches))

    def class_loss(self, batch: Tensor, classes: Tensor) -> Tensor:
        """Cross-entropy to the classes, per augmented image of the batch."""
        logits = self.network(self.augment(self.data.x_train[batch]))
        if self.config.class_logits == "slice":
            logits = logits[:, : self.data.n_classes]
        return F.cross_entropy(logits, classes[batch], reduction="none")

    # -------------------------------------------------------------------------------------------------------- optimiser

    @property
    def lr(self) -> float:
        return cosine(self.config.lr, self.epoch, self.config.anneal_end)

    def start_epoch(self, epoch: int) -> None:
        self.epoch, self.epochs_per_step = float(epoch), 1 / (self.cluster_steps + self.class_steps)

    def total_steps(self, epochs: int) -> int:
        """Steps of the optimiser up to the end of that many epochs."""
        return self.config.init_epochs * self.init_steps + epochs * (self.cluster_steps + self.class_steps)

    def update(self, loss: Tensor, title: str) -> Tensor:
        """One step of SGD. Returns the loss without its graph."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.epoch += self.epochs_per_step
        self.progress.step(title)
        return loss.detach()

    # ------------------------------------------------------------------------------------------- results and checkpoint

    def probabilities(self, images: Tensor) -> Tensor:
        """Class probabilities (N, C) under the evaluation transform, from the first C outputs."""
        self.network.eval()
        return infer(self.network, images)[:, : self.data.n_classes].softmax(dim=1)

    def test_error(self) -> dict[str, float]:
        """Per cent of the test images whose class is known, if any; no decision of the run depends on it."""
        known = self.data.y_test >= 0
        if not known.any():
            return {}
        predicted = self.probabilities(self.data.x_test).argmax(dim=1)
        return {"test_error": error_rate(predicted[known], self.data.y_test[known])}

    def state(self) -> dict[str, Any]:
        return {
            "architecture": self.architecture,
            "class_names": self.data.class_names,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "centroids": self.centroids,
        }

    def load_state(self, state: dict[str, Any]) -> int:
        """Take up what `state` gave. Returns the number of epochs that were finished."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["centroids"] is not None:
            self.centroids = state["centroids"].to(self.given.device)
        return state["epoch"]


# ============================================================================================================== helpers


def match_ids(clusters: Tensor, probability: Tensor) -> Tensor:
    """Number the clusters like the outputs that the network already gives their images.

    Fresh ids would have the shared head unlearn in each clustering pass what it knows of the classes. The numbering is
    the one-to-one matching (Hungarian method) with the greatest sum of probabilities.

    Args:
        clusters: int64 (N,), in 0 … K - 1.
        probability: (N, K), the network's for the first K outputs.

    Returns:
        int64 (N,).
    """
    from scipy.optimize import linear_sum_assignment

    agreement = F.one_hot(clusters, probability.shape[1]).double().T @ probability.double()
    _, output = linear_sum_assignment(agreement.cpu().numpy(), maximize=True)
    return torch.from_numpy(output).to(clusters)[clusters]


def mean_loss(total: Tensor, n_steps: int) -> float:
    """The mean of a pass's losses, which must be finite."""
    mean = float(total) / n_steps
    if not math.isfinite(mean):
        raise UserError("the loss is no longer finite; a lower --lr may help")
    return mean


def error_rate(predicted: Tensor, truth: Tensor) -> float:
    """Per cent of wrong classes."""
    return 100 * float((predicted != truth).double().mean())


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
    for name in ("epochs", "lr", "kmeans_iter", "neighbours", "diffusion_iter", "batch_labelled", "batch_unlabelled"):
        if getattr(config, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)} must be above 0")
    for name in ("clusters", "init_epochs", "pad", "rotate", "scale", "shift", "weight_decay"):
        if getattr(config, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)} must not be below 0")


def in_short(metrics: dict[str, Any]) -> dict[str, str]:
    """What a person wants to see of an epoch while it runs."""
    formats = {
        "loss_clusters": ("L_C", "{:.3f}"),
        "loss_classes": ("L_W", "{:.3f}"),
        "pseudo_label_error": ("pseudo-label error", "{:.1f} %"),
        "test_error": ("test error", "{:.1f} %"),
    }
    return {name: form.format(metrics[key]) for key, (name, form) in formats.items() if key in metrics}


def write_results(run: Run, learner: Learner) -> None:
    """Write predictions.csv, report.html and result.json, and tell what came out."""
    config, data = learner.config, learner.data.to(torch.device("cpu"))
    train, test = learner.probabilities(learner.data.x_train).cpu(), learner.probabilities(learner.data.x_test).cpu()
    run.write_predictions(data, learner.given, train, test)

    held_out = data.held_out(learner.given.cpu())
    probability = test if len(test) else train[learner.unlabelled.cpu()]
    figures = {"seconds": sum(metrics["seconds"] for metrics in run.history)}
    if held_out.known:
        error = error_rate(probability.argmax(dim=1), held_out.truth)
        kind = held_out.what.split()[0]  # test, unlabelled
        figures = {f"{kind}_error": error} | figures
    run.finish(figures)

    what = {"none": "CycleCluster", "graph": "diffusion alone", "supervised": "labelled images alone"}[config.baseline]
    title = f"{what} on {data.name}, {len(learner.labelled)} labels, seed {config.seed}"
    facts = {"images": f"{len(train) + len(test)}", "labels": f"{len(learner.labelled)}"}
    if held_out.known:
        facts[f"{kind} error"] = f"{error:.2f} %"
    facts |= {"mean confidence": f"{100 * probability.amax(dim=1).mean():.1f} %"}
    facts |= {"epochs": f"{config.epochs}", "time": f"{figures['seconds']:.0f} s"}
    features = learner.features(held_out.images.to(learner.given.device)).cpu()
    sections = [
        Section("Training", "What each epoch left; errors in per cent.", curves(run.history, PANELS)),
        *classification_sections(held_out, data.class_names, probability, features),
    ]
    run.write_text("report.html", page(title, facts, sections))
    outcome = f"{kind} error {error:.2f} %, " if held_out.known else ""
    print(f"{title}: {outcome}{figures['seconds']:.0f} s")
    print(f"  what the run left  {run.path}/report.html, predictions.csv, metrics.jsonl")
    print(f"  predict new images python -m methods.predict {run.path} IMAGE...")


if __name__ == "__main__":
    sys.exit(launch("cyclecluster", PRESETS, train))
