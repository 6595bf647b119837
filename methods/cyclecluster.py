"""CycleCluster: semi-supervised classification by clustering and label diffusion in turn, on one shared network.

Sellars, Aviles-Rivero and Schönlieb, "CycleCluster: Modernising Clustering Regularisation for Deep Semi-Supervised
Classification". Numbers of equations are the paper's.

    python -m methods.cyclecluster                         digits, 50 labels: no download, no GPU, about a minute
    python -m methods.cyclecluster --baseline graph        "Purely Graphical": without the clustering pass
    python -m methods.cyclecluster --baseline supervised   labelled images only
    python -m methods.cyclecluster --data usps --splits 5  five seeds, mean and deviation
    python -m methods.cyclecluster --data folder:DIR       your own images, some of them named in DIR/labels.csv
    torchrun --nproc-per-node 8 -m methods.cyclecluster --data cifar10
"""

from __future__ import annotations

import functools
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastclust
from methods.common import networks, parallel
from methods.common.augment import Augment
from methods.common.config import launch
from methods.common.data import ImageData, choose_labelled
from methods.common.progress import Progress, in_short
from methods.common.results import write_results
from methods.common.run import Run
from methods.common.sources import load
from methods.common.training import cosine, cycled, error_rate, infer, mean_loss, pick_device, shuffled
from methods.cyclecluster_settings import PRESETS, Config, check

# What a person wants to see of an epoch while it runs: metric -> its short name, and how it is written.
IN_SHORT = {
    "loss_clusters": ("L_C", "{:.3f}"),
    "loss_classes": ("L_W", "{:.3f}"),
    "pseudo_label_error": ("pseudo-label error", "{:.1f} %"),
    "test_error": ("test error", "{:.1f} %"),
}

# Panels of the report: metric -> the name shown.
PANELS = {
    "Losses": {"loss_clusters": "L_C", "loss_classes": "L_W"},
    "Errors, %": {"pseudo_label_error": "pseudo-labels of unlabelled images", "test_error": "test images"},
    "Entropy weights ω": {"weight_low": "lower decile", "entropy_weight": "mean", "weight_high": "upper decile"},
    "Pseudo-labels changed, %": {"pseudo_labels_changed": "since the epoch before"},
    "Images per cluster": {"cluster_smallest": "smallest", "cluster_typical": "typical", "cluster_largest": "largest"},
    "Clusters and classes": {"cluster_nmi": "NMI with the true classes", "cluster_class_nmi": "NMI with pseudo-labels"},
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
                    classes = learner.class_pseudo_labels(features, metrics)
                    if config.baseline == "none":
                        clusters = learner.cluster_pseudo_labels(features, classes.labels, metrics)
                    metrics["seconds_pseudo_labels"] = time.perf_counter() - started
                    if config.baseline == "none":
                        metrics["loss_clusters"] = learner.cluster_pass(clusters, f"epoch {epoch + 1}, clusters")
                    metrics["loss_classes"] = learner.class_pass(classes, f"epoch {epoch + 1}, classes")
                if config.test_every and (epoch + 1) % config.test_every == 0:
                    metrics |= learner.test_error()
                metrics["seconds"] = time.perf_counter() - started
                run.save(metrics, epoch=epoch + 1, **learner.state())
                learner.progress.epoch(f"epoch {epoch + 1:3}/{config.epochs}", in_short(metrics, IN_SHORT))

        # ------------------------------------------------------------------------------------------ what the run leaves
        kind = {"none": "CycleCluster", "graph": "diffusion alone", "supervised": "labelled images alone"}
        write_results(
            run,
            f"{kind[config.baseline]}, seed {config.seed},",
            data,
            given,
            probabilities=learner.probabilities,
            features=learner.features,
            panels=PANELS,
        )
    return run


class Learner:
    """The shared network and its optimiser, with the steps of one epoch in the paper's order.

    Attributes:
        epoch: how far the run is; the learning rate follows it through both passes.
        epochs_per_step: what each step adds to it; nothing during the supervised initialisation.
        centroids: those of the last clustering, (K, D).
        classes: the pseudo-labels of the last epoch, (N,).
        teacher: the moving average of the network, with Mean Teacher.
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
        parallel.share_batch_norm(self.network)
        self.teacher = None
        if config.mean_teacher:
            average = get_ema_multi_avg_fn(config.teacher_decay)
            self.teacher = AveragedModel(self.network, multi_avg_fn=average)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
        )
        device = given.device.type
        self.autocast = functools.partial(
            torch.autocast, device, getattr(torch, config.precision), enabled=config.precision != "float32"
        )
        self.scaler = torch.amp.GradScaler(device, enabled=config.precision == "float16")
        self.augment = Augment(config.pad, config.flip, config.rotate, config.scale, config.shift, config.rand_augment)
        self.epoch, self.epochs_per_step = 0.0, 0.0
        self.centroids: Tensor | None = None
        self.classes: Tensor | None = None

        self.batch = config.batch_labelled + config.batch_unlabelled
        self.init_steps = math.ceil(len(self.labelled) / self.batch)
        self.cluster_steps = math.ceil(len(given) / self.batch) if config.baseline == "none" else 0
        self.class_steps = math.ceil(len(self.unlabelled) / config.batch_unlabelled)

    # ---------------------------------------------------------------------------------------- pseudo-labels of an epoch

    def features(self, images: Tensor) -> Tensor:
        """Features of unit length, (N, D), under the evaluation transform."""
        self.network.eval()
        with self.autocast():
            return infer(self.network.features, images)

    def cluster_pseudo_labels(self, features: Tensor, classes: Tensor, metrics: dict[str, Any]) -> Tensor:
        """Cluster ids of all training images by k-means (III-A), int64 (N,); adds to the epoch's metrics.

        `classes`, the class pseudo-labels (N,), serve for the metrics only.
        """
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
            "cluster_typical": int(sizes.median()),
            "cluster_largest": int(sizes.max()),
            "cluster_class_nmi": float(fastclust.metrics.normalized_mutual_info(classes, found.labels)),
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
            "weight_low": float(weights.quantile(0.1)),
            "weight_high": float(weights.quantile(0.9)),
            "unreached": int((weights == 0).sum()),
            "diffusion_residual": float(pseudo.residual.max()),
            "classes_empty": int((pseudo.class_weights == 0).sum()),
        }
        truth = self.data.y_train[self.unlabelled]
        known = truth >= 0
        if known.any():
            metrics["pseudo_label_error"] = error_rate(pseudo.labels[self.unlabelled][known], truth[known])
        if self.classes is not None:
            metrics["pseudo_labels_changed"] = error_rate(pseudo.labels, self.classes)
        self.classes = pseudo.labels
        return pseudo

    # ----------------------------------------------------------------------------------------------- passes of an epoch

    def cluster_pass(self, clusters: Tensor, title: str) -> float:
        """One pass over all images on L_C, the cross-entropy to the cluster ids (eq. 1). Returns its mean."""
        self.network.train()
        total = torch.zeros((), device=clusters.device)
        for batch in shuffled(torch.arange(len(clusters), device=clusters.device), self.cluster_steps):
            logits = self.logits(self.network, batch)[:, : self.n_clusters]
            mine = parallel.share(len(batch))
            loss = F.cross_entropy(logits, clusters[batch[mine]], reduction="sum") / len(batch)
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
            n_alike = torch.cat([torch.full_like(part, len(part)), torch.full_like(rest, len(rest))])  # two means
            total += self.update(self.class_loss(batch, pseudo.labels, weights[batch] / n_alike), title)
        return mean_loss(total, self.class_steps)

    def supervised_pass(self, batches: Sequence[Tensor], title: str) -> float:
        """Batches of labelled images alone."""
        self.network.train()
        total = torch.zeros((), device=self.given.device)
        for batch in batches:
            weights = torch.full_like(batch, 1, dtype=torch.float32) / len(batch)
            total += self.update(self.class_loss(batch, self.given, weights), title)
        return mean_loss(total, len(batches))

    def class_loss(self, batch: Tensor, classes: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of the cross-entropies to the classes, and consistency with the teacher if there is one.

        Args:
            batch: (n,) indices of images.
            classes: (N,), of all training images.
            weights: (n,), of the batch.
        """
        n_outputs = self.data.n_classes if self.config.class_logits == "slice" else None
        mine = parallel.share(len(batch))
        student = self.logits(self.network, batch)[:, :n_outputs]
        loss = (weights[mine] * F.cross_entropy(student, classes[batch[mine]], reduction="none")).sum()
        if self.teacher is not None:
            with torch.no_grad():
                teacher = self.logits(self.teacher, batch)[:, :n_outputs]
            difference = F.mse_loss(student, teacher, reduction="sum") / (len(batch) * student.shape[1])
            loss = loss + self.config.consistency * ramp(self.epoch, self.config.consistency_ramp) * difference
        return loss

    def logits(self, network: nn.Module, batch: Tensor) -> Tensor:
        """Outputs for this process's share of the batch, augmented anew; all processes draw for the whole batch."""
        images = self.augment(self.data.x_train[batch])[parallel.share(len(batch))]
        with self.autocast():
            return network(images)

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
        self.scaler.scale(loss).backward()
        parallel.add_up_gradients(self.network.parameters())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.teacher is not None:
            self.teacher.update_parameters(self.network)
        self.epoch += self.epochs_per_step
        self.progress.step(title)
        return loss.detach()

    # ------------------------------------------------------------------------------------------- results and checkpoint

    def probabilities(self, images: Tensor) -> Tensor:
        """Class probabilities (N, C) under the evaluation transform, from the first C outputs."""
        self.network.eval()
        with self.autocast():
            return infer(self.network, images)[:, : self.data.n_classes].softmax(dim=1)

    def test_error(self) -> dict[str, float]:
        """Per cent of the test images whose class is known, if any."""
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
            "scaler": self.scaler.state_dict(),
            "teacher": self.teacher.state_dict() if self.teacher is not None else None,
            "centroids": self.centroids,
            "classes": self.classes,
        }

    def load_state(self, state: dict[str, Any]) -> int:
        """Take up what `state` gave. Returns the number of epochs that were finished."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.teacher is not None:
            self.teacher.load_state_dict(state["teacher"])
        for name in ("centroids", "classes"):
            if state[name] is not None:
                setattr(self, name, state[name].to(self.given.device))
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


def ramp(epoch: float, end: float) -> float:
    """Mean Teacher's sigmoid-shaped ramp exp(-5 (1 - epoch / end)²), 1 from `end` on."""
    return math.exp(-5 * max(1 - epoch / end, 0) ** 2) if end else 1.0


if __name__ == "__main__":
    sys.exit(launch("cyclecluster", PRESETS, train))
