"""SCAN: clustering of images without any labels, from the neighbours in an embedding learnt beforehand.

Van Gansbeke et al., "SCAN: Learning to Classify Images without Labels" (ECCV 2020), on SimCLR (Chen et al., ICML 2020).

    python -m methods.scan                               digits: no download, no GPU, about a minute on one core
    python -m methods.scan --data usps --seed 1
    python -m methods.scan --clustering kmeans           k-means on SimCLR's embedding instead of SCAN's loss
    python -m methods.scan --data npz:FILE --clusters 12     no classes needed; those there are serve to report

The embedding is trained once for the images, its settings and the seed, and kept for all runs. Training sees the
training images alone; the test images, where there are any, choose among epochs and heads by the loss without classes.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastclust
from methods.common import contrastive, networks
from methods.common.augment import Augment, to_float
from methods.common.clustering import assignment_sections, cluster_names, export, health, merged, scores
from methods.common.config import launch
from methods.common.contrastive import SimCLR
from methods.common.data import ImageData
from methods.common.progress import Progress, in_short
from methods.common.report import Section, curves, page
from methods.common.run import Run
from methods.common.sources import load
from methods.common.training import infer, mean_loss, pick_device, shuffled
from methods.common.views import Views
from methods.scan_settings import PRESETS, Config, check

# What a person wants to see of an epoch while it runs: metric -> its short name, and how it is written.
IN_SHORT = {
    "loss": ("loss", "{:.3f}"),
    "validation_loss": ("validation", "{:.3f}"),
    "confident": ("confident", "{:.2f}"),
    "used": ("clusters used", "{}"),
    "acc": ("ACC", "{:.1f} %"),
}

# Panels of the report: metric -> the name shown.
PANELS = {
    "Against the classes": {"acc": "ACC", "nmi": "NMI", "ari": "ARI"},
    "SCAN's loss": {"loss_scan": "training", "validation_loss": "validation"},
    "Its terms": {"loss_consistency": "-log ⟨p, p of a neighbour⟩", "loss_entropy": "-H(mean p)"},
    "Self-labelling": {"loss_self": "cross-entropy", "confident": "share that labels itself"},
    "Health": {
        "entropy": "entropy of the mean assignment / ln K",
        "information": "information / ln K",
        "confidence": "mean confidence",
    },
    "Clusters used": {"used": "of K"},
}

# ========================================================================================================== the trainer


def train(config: Config, resume: Path | None = None) -> Run:
    """Train, write the run's folder and print what came out; `resume` is the folder of a run to go on with."""
    device = pick_device(config.device, config.threads)
    data = load(config, need_classes=False)
    check(config, data)
    data = data.to(device)
    simclr = embedder(config, data)
    with Run("scan", config, data, resume) as run:
        # ------------------------------------------------------------------------------ the embedding, and neighbours
        with Progress(simclr.total_steps, simclr.done_steps) as progress:
            simclr.train(progress)
        torch.manual_seed(config.seed)
        learner = Learner(config, data, simclr)
        state = run.restore() if resume else None
        first = learner.load_state(state) if state else 0

        # ---------------------------------------------------------------------------- SCAN's loss, then self-labelling
        if config.clustering == "scan":
            last = config.epochs + config.self_epochs
            with Progress(learner.steps_until(last), learner.steps_until(first)) as progress:
                for epoch in range(first + 1, last + 1):
                    started = time.perf_counter()
                    metrics: dict[str, Any] = {"epoch": epoch} | learner.epoch(epoch, progress)
                    metrics["seconds"] = time.perf_counter() - started
                    run.save(metrics, epoch=epoch, **learner.state())
                    progress.epoch(f"{learner.stage(epoch)} {epoch:3}/{last}", in_short(metrics, IN_SHORT))
        elif not state:
            started = time.perf_counter()
            metrics = {"epoch": 1} | learner.kmeans()
            metrics["seconds"] = time.perf_counter() - started
            run.save(metrics, epoch=1, **learner.state())
        write_results(run, learner)
    return run


def architecture(config: Config, data: ImageData) -> dict[str, Any]:
    """What `networks.build` makes the network from; only k-means has its features at unit length."""
    small = data.n_channels == 1 and max(data.image_size) <= 28
    return {
        "name": config.network or ("cnn-small" if small else "resnet18"),
        "n_channels": data.n_channels,
        "image_size": tuple(data.image_size),
        "n_outputs": config.clusters or data.n_classes,
        "weight_norm": False,
        "unit_length": config.clustering == "kmeans",
    }


def views(config: Config) -> Views:
    """Of SimCLR."""
    changes = ("crop", "flip", "rotate", "shear", "shift", "light", "jitter", "grey")
    return Views(**{name: getattr(config, name) for name in changes})


def embedder(config: Config, data: ImageData) -> SimCLR:
    """SimCLR's training, or what is kept of an earlier one."""
    settings = contrastive.Settings(
        seed=config.seed,
        epochs=config.pretrain_epochs,
        lr=config.pretrain_lr,
        batch=config.pretrain_batch,
        momentum=config.pretrain_momentum,
        weight_decay=config.pretrain_decay,
        temperature=config.temperature,
        views=views(config),
    )
    folder = Path(config.cache or Path(config.runs) / "simclr")
    shape = architecture(config, data) | {"unit_length": False}
    return SimCLR(shape, data, settings, folder, config.projected)


class Learner:
    """A network that starts from SimCLR's backbone, trained on SCAN's loss, then on its own confident labels.

    Attributes:
        neighbours: int64 (N, k), of each training image, nearest first, itself excluded.
        network: the one that counts: the best so far of clustering, later the one that labels itself.
    """

    def __init__(self, config: Config, data: ImageData, simclr: SimCLR):
        self.config, self.data, self.simclr = config, data, simclr
        self.architecture = architecture(config, data)
        self.n_clusters = self.architecture["n_outputs"]
        projected = config.mine == "projection"
        embedding = simclr.embeddings(data.x_train, projected=projected)
        self.neighbours = fastclust.knn(embedding, config.neighbours).indices
        self.validated = data.x_train
        if config.validation == "test" and len(data.x_test) > 1:
            self.validated = data.x_test
            embedding = simclr.embeddings(data.x_test, projected=projected)
        k = min(config.validation_neighbours, len(embedding) - 1)
        self.validation_neighbours = fastclust.knn(embedding, k).indices

        # All heads as one wide one.
        self.wide = simclr.start(self.architecture | {"n_outputs": self.n_clusters * config.heads})
        self.network = simclr.start(self.architecture)
        self.best_loss, self.best_epoch = float("inf"), 0
        self.optimizer = self.adam(self.wide, config.lr)
        strong = Augment(config.pad, config.flip, rand_augment=config.strong, cutout=config.cutout)
        self.scan_views = views(config) if config.scan_views == "simclr" else strong
        self.self_views = views(config) if config.self_views == "simclr" else strong

    def adam(self, network: networks.Classifier, lr: float) -> torch.optim.Adam:
        return torch.optim.Adam(network.parameters(), lr=lr, weight_decay=self.config.decay, fused=True)

    def stage(self, epoch: int) -> str:
        return "clustering" if epoch <= self.config.epochs else "self-labelling"

    def steps_until(self, epoch: int) -> int:
        """Of the optimiser in the epochs up to this one."""
        config, clustering = self.config, min(epoch, self.config.epochs)
        return clustering * self.n_steps(config.batch) + (epoch - clustering) * self.n_steps(config.self_batch)

    def n_steps(self, batch: int) -> int:
        return max(round(len(self.data.x_train) / batch), 1)

    def epoch(self, epoch: int, progress: Progress) -> dict[str, Any]:
        """Epoch 1, 2, … of clustering, then of self-labelling. Returns its metrics."""
        if epoch <= self.config.epochs:
            metrics = self.clustering_pass(progress) | self.choose(epoch)
        else:
            if epoch == self.config.epochs + 1:
                self.optimizer = self.adam(self.network, self.config.self_lr)
            metrics = self.self_labelling_pass(progress)
        probabilities = self.probabilities(self.validated)
        truth = self.data.y_test if self.validated is self.data.x_test else self.data.y_train
        return metrics | health(probabilities) | scores(truth.cpu(), probabilities.argmax(dim=1).cpu())

    # ------------------------------------------------------------------------------------------------------ the loss

    def clustering_pass(self, progress: Progress) -> dict[str, float]:
        """Each training image once, with one of its neighbours drawn at random. Returns the mean of each term."""
        self.wide.train()
        images, device = self.data.x_train, self.data.x_train.device
        n_steps = self.n_steps(self.config.batch)
        totals = torch.zeros(2, device=device)
        for batch in shuffled(torch.arange(len(images), device=device), n_steps):
            drawn = torch.randint(self.neighbours.shape[1], (len(batch),), device=device)
            pair = torch.cat([self.scan_views(images[batch]), self.scan_views(images[self.neighbours[batch, drawn]])])
            log_p, log_q = self.per_head(self.wide(pair)).split(len(batch), dim=1)
            consistency, entropy = scan_terms(log_p, log_q)
            loss = (consistency - self.config.entropy_weight * entropy).sum()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            totals += torch.stack([consistency.detach().mean(), -entropy.detach().mean()])
            progress.step("clustering")
        consistency, entropy = (mean_loss(total, n_steps) for total in totals)
        loss = consistency + self.config.entropy_weight * entropy
        return {"loss": loss, "loss_scan": loss, "loss_consistency": consistency, "loss_entropy": entropy}

    def per_head(self, logits: Tensor) -> Tensor:
        """Log-probabilities (H, N, K) of the wide network's logits (N, H K)."""
        return logits.unflatten(1, (self.config.heads, self.n_clusters)).transpose(0, 1).log_softmax(dim=2)

    def choose(self, epoch: int) -> dict[str, float]:
        """Keep the head with the lowest validation loss if none was lower before."""
        self.wide.eval()
        log_p = self.per_head(infer(self.wide, self.validated))
        consistency, entropy = scan_terms(*with_neighbours(log_p, self.validation_neighbours))
        loss, head = (consistency - self.config.entropy_weight * entropy).min(dim=0)
        if float(loss) < self.best_loss:
            self.best_loss, self.best_epoch = float(loss), epoch
            rows = slice(int(head) * self.n_clusters, (int(head) + 1) * self.n_clusters)
            state = self.wide.state_dict()
            self.network.load_state_dict(state | {name: state[name][rows] for name in ("head.weight", "head.bias")})
        return {"validation_loss": float(loss), "best_epoch": self.best_epoch}

    # --------------------------------------------------------------------------------------------------- self-labelling

    def self_labelling_pass(self, progress: Progress) -> dict[str, float]:
        """Each training image once; its own label where it is confident of it. Returns the loss and their share."""
        images, device = self.data.x_train, self.data.x_train.device
        n_steps = self.n_steps(self.config.self_batch)
        totals = torch.zeros(2, device=device)
        for batch in shuffled(torch.arange(len(images), device=device), n_steps):
            self.network.eval()
            with torch.no_grad():
                targets = self.network(to_float(images[batch])).softmax(dim=1)
            confident = targets.amax(dim=1) > self.config.confidence
            if confident.any():  # else the loss is 0, and a step would be weight decay alone
                self.network.train()
                loss = self_label_loss(self.network(self.self_views(images[batch])), targets, self.config.confidence)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                totals += torch.stack([loss.detach(), confident.float().mean()])
            progress.step("self-labelling")
        loss, confident = (mean_loss(total, n_steps) for total in totals)
        return {"loss": loss, "loss_self": loss, "confident": confident}

    # ----------------------------------------------------------------------------------------------- k-means instead

    def kmeans(self) -> dict[str, Any]:
        """Make the centres of spherical k-means on SimCLR's features the network's head."""
        features, config = F.normalize(self.simclr.embeddings(self.data.x_train), dim=1), self.config
        found = fastclust.kmeans(
            features, self.n_clusters, n_init=config.kmeans_starts, spherical=True, seed=config.seed
        )
        with torch.no_grad():
            self.network.head.weight.copy_(found.centroids / config.kmeans_temperature)
            self.network.head.bias.zero_()
        probabilities = self.probabilities(self.data.x_train)
        clusters = probabilities.argmax(dim=1).cpu()
        return {"inertia": float(found.inertia)} | health(probabilities) | scores(self.data.y_train.cpu(), clusters)

    # ------------------------------------------------------------------------------------------- results and checkpoint

    def probabilities(self, images: Tensor) -> Tensor:
        """Soft assignments (N, K) of uint8 images, not augmented."""
        self.network.eval()
        return infer(lambda part: self.network(part).softmax(dim=1), images)

    def parts(self) -> list[Tensor]:
        """The training images, and the test images if there are any."""
        return [images for images in (self.data.x_train, self.data.x_test) if len(images)]

    def state(self) -> dict[str, Any]:
        return {
            "architecture": self.architecture,
            "class_names": cluster_names(self.n_clusters),
            "network": self.network.state_dict(),
            "wide": self.wide.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": (self.best_loss, self.best_epoch),
        }

    def load_state(self, state: dict[str, Any]) -> int:
        """Take up what `state` gave. Returns the number of epochs that were finished."""
        self.network.load_state_dict(state["network"])
        self.wide.load_state_dict(state["wide"])
        if state["epoch"] > self.config.epochs:
            self.optimizer = self.adam(self.network, self.config.self_lr)
        self.optimizer.load_state_dict(state["optimizer"])
        self.best_loss, self.best_epoch = state["best"]
        return state["epoch"]


# =============================================================================================================== losses


def scan_terms(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """The terms of SCAN's loss (eq. 2): -mean log ⟨p, q⟩ and H(mean p), each (…,).

    Args:
        log_p: log-probabilities (…, N, K) of images. log_q: of a neighbour of each.
    """
    consistency = -(log_p + log_q).logsumexp(dim=-1).mean(dim=-1)
    return consistency, torch.special.entr(log_p.exp().mean(dim=-2)).sum(dim=-1)


def with_neighbours(log_p: Tensor, neighbours: Tensor) -> tuple[Tensor, Tensor]:
    """Each image as often as it has neighbours, and these: (H, N k, K) both, of (H, N, K) and int64 (N, k)."""
    return log_p.repeat_interleave(neighbours.shape[1], dim=1), log_p[:, neighbours.flatten()]


def self_label_loss(logits: Tensor, targets: Tensor, confidence: float) -> Tensor:
    """Cross-entropy on the labels of confident images, each class weighted by the inverse of its share of them.

    Args:
        logits: (N, K) of strong views. targets: probabilities (N, K) of the same images, not augmented.

    Returns:
        The weighted mean; 0 where no image is confident.
    """
    chosen = targets.amax(dim=1) > confidence
    labels = targets.argmax(dim=1)[chosen]
    if not len(labels):
        return logits.sum() * 0
    counts = torch.bincount(labels, minlength=logits.shape[1])
    return F.cross_entropy(logits[chosen], labels, weight=len(labels) / counts.clamp(min=1).to(logits))


# ==================================================================================================== what a run leaves


def write_results(run: Run, learner: Learner) -> None:
    """Write assignments.npz, predictions.csv, report.html and result.json, and tell what came out."""
    config, data = learner.config, learner.data.to(torch.device("cpu"))
    both = [(learner.probabilities(x).cpu(), learner.simclr.embeddings(x).cpu()) for x in learner.parts()]
    probabilities, embeddings = (torch.cat(arrays) for arrays in zip(*both, strict=True))
    n_train = len(data.x_train)
    export(run.path / "assignments.npz", probabilities, embeddings, n_train)
    named = replace(data, class_names=cluster_names(learner.n_clusters))
    unlabelled = torch.full_like(data.y_train, -1)
    run.write_predictions(named, unlabelled, probabilities[:n_train], probabilities[n_train:])

    together = merged(data)
    truth, clusters = together.y_train, probabilities.argmax(dim=1)
    figures = scores(truth, clusters)
    for part, rows in (("train", slice(None, n_train)), ("test", slice(n_train, None))):
        if n_train < len(truth):
            figures |= {f"{part}_{name}": value for name, value in scores(truth[rows], clusters[rows]).items()}
    figures |= neighbour_purity(data.y_train, learner.neighbours.cpu())
    state = health(probabilities)
    seconds = sum(metrics["seconds"] for metrics in run.history)

    what = "SCAN" if config.clustering == "scan" else "k-means on SimCLR"
    title = f"{what} on {data.name}, seed {config.seed}"
    facts = {"images": f"{len(truth)}", "clusters used": f"{state['used']} of {learner.n_clusters}"}
    if "acc" in figures:
        facts |= {"ACC": f"{figures['acc']:.2f} %", "NMI": f"{figures['nmi']:.3f}", "ARI": f"{figures['ari']:.3f}"}
    if "test_acc" in figures:
        facts["test ACC"] = f"{figures['test_acc']:.2f} %"
    facts |= {"time after SimCLR": f"{seconds:.0f} s"}
    sections = [*training_sections(run, learner), *assignment_sections(together, probabilities, embeddings)]
    run.write_text("report.html", page(title, facts, sections))
    run.finish(figures | state | {"best_epoch": learner.best_epoch, "seconds": seconds})
    shown = ("ACC", "NMI", "ARI", "test ACC", "clusters used")
    print(f"{title}: {', '.join(f'{name} {facts[name]}' for name in shown if name in facts)}, {seconds:.0f} s")
    if state["used"] < learner.n_clusters:
        print(f"  warning: {learner.n_clusters - state['used']} clusters are empty; see --entropy-weight, --clusters")
    print(f"  what the run left  {run.path}/report.html, assignments.npz, predictions.csv, metrics.jsonl")
    print(f"  assign new images  python -m methods.predict {run.path} IMAGE...")


def training_sections(run: Run, learner: Learner) -> list[Section]:
    """Curves over SimCLR's epochs, and over those after it, of which k-means has none."""
    sections, losses = [], learner.simclr.losses
    if losses:
        pretext = [{"epoch": epoch, "loss": loss} for epoch, loss in enumerate(losses, start=1)]
        sections.append(Section("SimCLR", "What each epoch left.", curves(pretext, {"NT-Xent": {"loss": "mean"}})))
    if learner.config.clustering == "scan":
        caption = f"What each epoch left; of clustering, epoch {learner.best_epoch} had the lowest validation loss."
        sections.append(Section("Training", caption, curves(run.history, PANELS, from_zero=False)))
    return sections


def neighbour_purity(truth: Tensor, neighbours: Tensor) -> dict[str, float]:
    """Share of the neighbours that are of the image's own class, where all classes are known."""
    if not len(truth) or (truth < 0).any():
        return {}
    return {"neighbour_purity": float((truth[neighbours] == truth[:, None]).double().mean())}


if __name__ == "__main__":
    sys.exit(launch("scan", PRESETS, train))
