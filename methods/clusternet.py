"""ClusterNet: semi-supervised clustering of images by an autoencoder that learns its cluster centres.

Shukla, Cheema and Anand, "Semi-Supervised Clustering with Neural Networks". Numbers of equations are the paper's.

    python -m methods.clusternet                            digits, 50 labels: no download, no GPU, about a minute
    python -m methods.clusternet --data usps --seed 1       2 % of each class labelled, the second of five choices
    python -m methods.clusternet --data npz:FILE --percent 5

The autoencoder is trained once for an image set and its settings, and kept for all labelled splits and runs.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import fastclust
from methods.common import autoencoder
from methods.common.augment import Augment, to_float
from methods.common.autoencoder import Reconstruction, reconstruction_loss
from methods.common.config import RunConfig, launch, require_above_zero, require_not_negative
from methods.common.data import HeldOut, ImageData, choose_labelled, choose_percent
from methods.common.errors import UserError
from methods.common.pretraining import Settings
from methods.common.progress import Progress, in_short
from methods.common.report import Section, classification_sections, curves, embedded, embedding, gallery, page
from methods.common.run import Run
from methods.common.sources import load
from methods.common.training import cycled, infer, pick_device, shuffled

# ============================================================================================================= settings


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Defaults are the paper's where it states them; a preset replaces some."""

    percent: float = 0.0
    """Labelled share of each class in per cent, at least two images of each; 0 goes by --labels."""
    holdout: float = 0.0
    """Share of all images to hold out afresh, every class in proportion; 0 keeps the data's own test part."""
    split_seed: int = 0
    """Fixes the held-out images and the autoencoder's training; `seed` fixes the labelled images and all else."""

    # The loss, eq. 3.
    margin: float = 2.0
    """m, in nats: the divergence up to which dissimilar pairs repel."""
    detach_target: bool = True
    """Hold the first argument of each KL fixed in the gradient ("first fixing p", 3.2)."""
    reconstruction: Literal["sum", "mean"] = "sum"
    """Squared errors of an image summed over its pixels, or their mean; the mean over images is taken of both."""
    reconstruction_weight: float = 1.0
    """Weight of L_recon."""
    pair_weight: float = 1.0
    """Weight of L_pair; 0 leaves it out."""
    cluster_weight: float = 1.0
    """Weight of L_cluster; 0 leaves it out."""
    lambda_start: int = 5
    """T1: the epoch up to which λ is 0 (eq. 17)."""
    lambda_end: int = 40
    """T2: the epoch from which λ is 1; both 0: from the start."""
    lambda_max: float = 1.0
    """Where λ rises to."""

    # Centres and assignment.
    assign: Literal["batch", "epoch"] = "batch"
    """Clusters of the unlabelled images (eq. 10): of each batch as the loss sees it, or of all before each epoch, under
    the evaluation transform."""
    least_count: int = 100
    """Images that a centre counts as seen at the start, if its labelled ones are fewer; its step is 1 / count."""

    # The network and its training.
    strides: tuple[int, int, int] = (2, 2, 2)
    """Strides of the three convolutions, "chosen appropriately for the dataset"."""
    n_features: int = 32
    """Dimensions of the latent space."""
    dropout: float = 0.1
    """Dropout after each layer but the decoder's last."""
    drop_features: bool = True
    """Whether the clustering sees the features after their dropout, or the decoder alone."""
    pretrain_epochs: int = 100
    """Epochs of the autoencoder alone."""
    pretrain_lr: float = 1e-4
    """Learning rate of Adam for the autoencoder."""
    pretrain_batch: int = 64
    """Images in a batch of the autoencoder's."""
    epochs: int = 60
    """Epochs of clustering."""
    lr: float = 1e-4
    """Learning rate of Adam for the clustering."""
    batch: int = 64
    """Unlabelled images in a batch."""
    batch_labelled: int = 256
    """All labelled images stand in each batch if they are no more than this, else so many, every class alike."""
    cache: str = ""
    """Folder of trained autoencoders; empty: `autoencoders` in --runs."""

    # Augmentation in the clustering, which the paper has none of.
    rotate: float = 0.0
    """Greatest rotation in degrees."""
    scale: float = 0.0
    """Greatest relative change of size."""
    shift: float = 0.0
    """Greatest move in pixels, with black coming in."""


PAPER = Config(preset="paper", data="usps", percent=2.0, holdout=0.1)

# Fewer and longer steps than the paper's, for a CPU.
QUICK = replace(PAPER, pretrain_epochs=40, pretrain_lr=5e-4)

PRESETS = {
    # scikit-learn's digits, 8 x 8: the paper's settings but for the length of the steps.
    "digits": replace(
        QUICK,
        preset="digits",
        data="digits",
        percent=0.0,
        labels=50,
        holdout=0.0,
        threads=1,
        strides=(2, 2, 1),
        epochs=40,
        lr=2e-4,
        lambda_start=4,
        lambda_end=27,
    ),
    # Chosen on the training part of USPS alone: a margin that does not let labelled pairs rest before they are well
    # apart; labels of the unlabelled images once an epoch (Algorithm 2, II) from plain images, while the loss sees
    # augmented ones, which is no part of the paper.
    "usps": replace(
        QUICK,
        preset="usps",
        epochs=12,
        lr=1e-3,
        lambda_start=4,
        lambda_end=12,
        margin=6.0,
        reconstruction_weight=0.05,
        drop_features=False,
        batch_labelled=40,
        assign="epoch",
        rotate=10.0,
        scale=0.1,
        shift=1.0,
    ),
    # 5.1 as far as it is told, on USPS or another set; with defaults where it is not.
    "paper": PAPER,
}
PRESETS["mnist"] = replace(PRESETS["usps"], preset="mnist", data="mnist", percent=0.5, holdout=0.0)
PRESETS["folder"] = replace(PRESETS["digits"], preset="folder", data="folder:.", labels=0, threads=0, strides=(2, 2, 2))

_IN_A_ROW = 12  # images of the report's width

# What a person wants to see of an epoch while it runs: metric -> its short name, and how it is written.
IN_SHORT = {
    "lambda": ("λ", "{:.2f}"),
    "loss": ("loss", "{:.3f}"),
    "unlabelled_acc": ("ACC unlabelled", "{:.1f} %"),
    "test_acc": ("test", "{:.1f} %"),
}

# Panels of the report: metric -> the name shown.
PANELS = {
    "ACC, %": {"unlabelled_acc": "unlabelled images", "test_acc": "test images"},
    "NMI": {"unlabelled_nmi": "unlabelled images", "test_nmi": "test images"},
    "Loss": {"loss": "all of eq. 3", "loss_recon": "L_recon"},
    "Its terms": {
        "loss_pair_labelled": "L_pair, labelled",
        "loss_pair_unlabelled": "L_pair, unlabelled",
        "loss_cluster_labelled": "L_cluster, labelled",
        "loss_cluster_unlabelled": "L_cluster, unlabelled",
    },
}

# ========================================================================================================== the trainer


def train(config: Config, resume: Path | None = None) -> Run:
    """Train, write the run's folder and print what came out; `resume` is the folder of a run to go on with."""
    device = pick_device(config.device, config.threads)
    data = load(replace(config, seed=config.split_seed))  # one split of the images for all choices of labels
    if config.holdout:
        data = data.hold_out(config.holdout, config.split_seed)
    given = choose_given(config, data)
    check(config, data, given)
    data, given = data.to(device), given.to(device)
    learner = Learner(config, data, given)

    with Run("clusternet", config, data, resume) as run:
        state = run.restore() if resume else None
        if state:
            first = learner.load_state(state)
            steps, done = learner.steps * config.epochs, learner.steps * first
        else:
            first, pretraining = 0, learner.pretraining()
            steps, done = pretraining.total_steps + learner.steps * config.epochs, pretraining.done_steps
        with Progress(steps, done) as progress:
            # ---------------------------------------------------------------------- the autoencoder, and its centres
            if not state:
                pretraining.train(progress)
                torch.manual_seed(config.seed)
                learner.start()

            # ------------------------------------------------------------------------------------------ clustering
            for epoch in range(first + 1, config.epochs + 1):
                started = time.perf_counter()
                metrics: dict[str, Any] = {"epoch": epoch, "lambda": ramp(epoch, config)}
                metrics |= learner.clustering_pass(metrics["lambda"], progress, f"epoch {epoch}") | learner.scores()
                metrics["seconds"] = time.perf_counter() - started
                run.save(metrics, epoch=epoch, **learner.state())
                progress.epoch(f"epoch {epoch:3}/{config.epochs}", in_short(metrics, IN_SHORT))

        # ------------------------------------------------------------------------------------------ what the run leaves
        write_results(run, learner)
    return run


class Learner:
    """The network with its centres, trained on eq. 3 (Algorithm 2).

    Attributes:
        steps: of the optimiser in an epoch.
        start_figures: what clustering the autoencoder's features alone gives (Table 6).
        start_features: those of the images that the report shows.
    """

    def __init__(self, config: Config, data: ImageData, given: Tensor):
        """`given`: int64 (N,), the class of each labelled training image, -1 elsewhere."""
        self.config, self.data, self.given = config, data, given
        self.labelled, self.unlabelled = torch.nonzero(given >= 0).flatten(), torch.nonzero(given < 0).flatten()
        torch.manual_seed(config.split_seed)
        self.architecture = architecture(config, data)
        self.network = autoencoder.build(**self.architecture).to(given.device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=config.lr, fused=True)
        self.augment = Augment(rotate=config.rotate, scale=config.scale, shift=config.shift)
        self.steps = math.ceil(len(self.unlabelled) / config.batch)
        self.start_figures: dict[str, float] = {}
        self.start_features = torch.empty(0)

    def pretraining(self) -> Reconstruction:
        """The training of the autoencoder alone, or what is kept of an earlier one."""
        config = self.config
        settings = Settings(
            seed=config.split_seed,
            epochs=config.pretrain_epochs,
            lr=config.pretrain_lr,
            batch=config.pretrain_batch,
        )
        folder = Path(config.cache or Path(config.runs) / "autoencoders")
        return Reconstruction(self.network, self.architecture, self.data, settings, folder)

    def start(self) -> None:
        """Put the centres on the means of the labelled features (eq. 9)."""
        z, network, config = self.features(self.data.x_train), self.network, self.config
        member = F.one_hot(self.given[self.labelled], self.data.n_classes).to(z)
        n = member.sum(dim=0)
        network.centres.copy_(member.T @ z[self.labelled] / n[:, None])
        network.counts.copy_(n.clamp(min=config.least_count))

        self.start_figures = {f"start_{name}": value for name, value in self.scores().items()}
        self.start_figures |= {f"autoencoder_{name}": value for name, value in self.kmeans_nmi().items()}
        # Algorithm 1: k-means from the same start, the labelled images held in their clusters.
        found = fastclust.kmeans(z, self.data.n_classes, labels=self.given, seed=config.seed).labels
        acc = accuracy(self.data.y_train[self.unlabelled], found[self.unlabelled])
        self.start_figures |= {"constrained_kmeans_unlabelled_acc": acc} if acc is not None else {}
        self.start_features = self.shown_features()

    # --------------------------------------------------------------------------------------------------------- training

    def clustering_pass(self, weight: float, progress: Progress, title: str) -> dict[str, float]:
        """One pass over the unlabelled images, labelled ones in each batch. Returns the mean of each loss.

        `weight` is λ.
        """
        clusters = self.given
        if self.config.assign == "epoch":
            clusters = torch.where(clusters < 0, self.probabilities(self.data.x_train).argmax(dim=1), clusters)
        self.network.train()
        total: dict[str, Tensor] = {}
        for part, rest in zip(self.labelled_batches(), shuffled(self.unlabelled, self.steps), strict=True):
            for name, value in self.step(part, rest, clusters, weight).items():
                total[name] = total.get(name, 0) + value
            progress.step(title)
        return {name: float(value) / self.steps for name, value in total.items()}

    def labelled_batches(self) -> list[Tensor]:
        """For each step all labelled images, or where those are too many as many of each class, at least two."""
        most, classes = self.config.batch_labelled, self.given[self.labelled]
        if len(self.labelled) <= most:
            return [self.labelled] * self.steps
        n_classes = self.data.n_classes
        per_class = max(most // n_classes, 2)
        drawn = [cycled(self.labelled[classes == label], self.steps, per_class) for label in range(n_classes)]
        return [torch.cat(parts) for parts in zip(*drawn, strict=True)]

    def step(self, part: Tensor, rest: Tensor, clusters: Tensor, weight: float) -> dict[str, Tensor]:
        """One step on eq. 3 for labelled images `part` and unlabelled ones `rest`. Returns its terms, not weighted.

        `clusters`: int64 (N,) of all training images; where -1, the nearest centre is taken.
        """
        config, n = self.config, len(part)
        batch = torch.cat([part, rest])
        images = self.augment(self.data.x_train[batch])
        z = self.network.features(images)
        if not z.isfinite().all():
            raise UserError("the features are no longer finite; a lower --lr may help")
        log_p = fastclust.soft_assign(z, self.network.centres)
        clusters = torch.where(clusters[batch] < 0, log_p.argmax(dim=1), clusters[batch])  # eqs. 10 and 11
        pair_l, cluster_l = self.clustering_losses(z[:n], log_p[:n], clusters[:n])
        pair_u, cluster_u = self.clustering_losses(z[n:], log_p[n:], clusters[n:])
        recon = reconstruction_loss(self.network.decode(z), images, config.reconstruction)
        loss = (
            config.pair_weight * (pair_l + weight * pair_u)
            + config.cluster_weight * (cluster_l + weight * cluster_u)
            + config.reconstruction_weight * recon
        )
        self.optimizer.zero_grad()
        loss.backward()
        self.move_centres(z.detach()[:n], clusters[:n])
        if weight:
            self.move_centres(z.detach()[n:], clusters[n:])
        self.optimizer.step()
        terms = {"loss": loss, "loss_recon": recon, "loss_pair_labelled": pair_l, "loss_pair_unlabelled": pair_u}
        terms |= {"loss_cluster_labelled": cluster_l, "loss_cluster_unlabelled": cluster_u}
        return {name: value.detach() for name, value in terms.items()}

    def clustering_losses(self, z: Tensor, log_p: Tensor, clusters: Tensor) -> tuple[Tensor, Tensor]:
        """L_pair (eqs. 6, 7) and L_cluster (eqs. 4, 5) of points in these clusters; no gradient to the centres."""
        pair = fastclust.pairwise_kl(
            log_p, clusters, margin=self.config.margin, detach_target=self.config.detach_target
        )
        return pair, (z - self.network.centres[clusters]).square().sum(dim=1).mean()

    def move_centres(self, z: Tensor, clusters: Tensor) -> None:
        centres, counts = moved_centres(self.network.centres, self.network.counts, z, clusters)
        self.network.centres.copy_(centres)
        self.network.counts.copy_(counts)

    # ------------------------------------------------------------------------------------------- results and checkpoint

    def features(self, images: Tensor) -> Tensor:
        """Features (N, D) of uint8 images."""
        self.network.eval()
        return infer(self.network.features, images)

    def probabilities(self, images: Tensor) -> Tensor:
        """Probabilities (N, K) of the clusters, which are the classes: the nearest centre's is the greatest."""
        self.network.eval()
        return infer(self.network, images).exp()

    def scores(self) -> dict[str, float]:
        """ACC by the nearest centre and NMI where classes are known. No decision of the run depends on them."""
        data, scores = self.data, {}
        for name, images, truth in (
            ("unlabelled", data.x_train[self.unlabelled], data.y_train[self.unlabelled]),
            ("test", data.x_test, data.y_test),
        ):
            if (truth >= 0).any():
                predicted = self.probabilities(images).argmax(dim=1)
                scores |= {f"{name}_acc": accuracy(truth, predicted), f"{name}_nmi": max_nmi(truth, predicted)}
        return scores

    def kmeans_nmi(self) -> dict[str, float]:
        """NMI of plain k-means on the features (Table 6), of ten starts the best."""
        data, found = self.data, {}
        for name, images, truth in (("train", data.x_train, data.y_train), ("test", data.x_test, data.y_test)):
            if (truth >= 0).any() and len(images) >= data.n_classes:
                seed = self.config.split_seed
                labels = fastclust.kmeans(self.features(images), data.n_classes, n_init=10, seed=seed).labels
                found[f"kmeans_nmi_{name}"] = max_nmi(truth, labels)
        return found

    def decoded(self, z: Tensor) -> Tensor:
        """Images, uint8 on the CPU, of features (N, D)."""
        self.network.eval()
        with torch.no_grad():
            images = self.network.decode(z.to(self.given.device))
        return (images.clamp(0, 1) * 255).round().to(torch.uint8).cpu()

    def shown_features(self) -> Tensor:
        """Features of the images that the report shows, on the CPU."""
        images = self.data.held_out(self.given).images
        return self.features(images[embedded(len(images)).to(images.device)]).cpu()

    def state(self) -> dict[str, Any]:
        return {
            "architecture": self.architecture,
            "class_names": self.data.class_names,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "start_figures": self.start_figures,
            "start_features": self.start_features,
        }

    def load_state(self, state: dict[str, Any]) -> int:
        """Take up what `state` gave. Returns the number of epochs that were finished."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.start_figures, self.start_features = state["start_figures"], state["start_features"]
        return state["epoch"]


# ============================================================================================================== helpers


def choose_given(config: Config, data: ImageData) -> Tensor:
    """int64 (N,): the classes of the training images that are labelled, -1 elsewhere."""
    if config.percent:
        labelled = choose_percent(data.y_train, config.percent, data.n_classes, config.seed, least=2)
    else:
        labelled = choose_labelled(data.y_train, config.labels, data.n_classes, config.seed)
    given = torch.full_like(data.y_train, -1)
    given[labelled] = data.y_train[labelled]
    return given


def architecture(config: Config, data: ImageData) -> dict[str, Any]:
    """What `autoencoder.build` makes the network from."""
    return {
        "name": autoencoder.NAME,
        "n_channels": data.n_channels,
        "image_size": tuple(data.image_size),
        "n_outputs": data.n_classes,
        "n_features": config.n_features,
        "strides": tuple(config.strides),
        "dropout": config.dropout,
        "drop_features": config.drop_features,
    }


def ramp(epoch: int, config: Config) -> float:
    """λ in that epoch, counted from 1 (eq. 17)."""
    if epoch < config.lambda_start:
        return 0.0
    if epoch >= config.lambda_end:
        return config.lambda_max
    return config.lambda_max * (epoch - config.lambda_start) / (config.lambda_end - config.lambda_start)


def moved_centres(centres: Tensor, counts: Tensor, z: Tensor, clusters: Tensor) -> tuple[Tensor, Tensor]:
    """Centres and counts after each point in turn moved its centre by 1 / count towards itself (eqs. 12, 13).

    The count, which each point first raises by one, is of all points that the centre ever met, as in DCN (Yang et al.
    2016, the paper's source for the rule): the paper's N_k, taken literally per point, would put the centre on its last
    one. In whatever order, n points bring the centre to (count · μ + Σ z) / (count + n).

    Args:
        centres: (K, D). counts: (K,). z: (B, D). clusters: int64 (B,).
    """
    member = F.one_hot(clusters, len(centres)).to(z)
    n = member.sum(dim=0)
    counts = counts + n
    return centres + (member.T @ z - n[:, None] * centres) / counts[:, None], counts


def accuracy(truth: Tensor, predicted: Tensor) -> float | None:
    """Per cent of right classes among the images whose class is known; None where none is."""
    known = truth >= 0
    return 100 * float((predicted == truth)[known].double().mean()) if known.any() else None


def max_nmi(truth: Tensor, predicted: Tensor) -> float:
    """NMI with the greater entropy below (eq. 18), of the images whose class is known."""
    known = truth >= 0
    return fastclust.metrics.normalized_mutual_info(truth[known], predicted[known], average_method="max")


def check(config: Config, data: ImageData, given: Tensor) -> None:
    """Refuse settings that cannot work on this data, before anything is written."""
    if (given >= 0).all():
        raise UserError(f"all {len(given)} training images are labelled; --labels or --percent must leave some without")
    counts = torch.bincount(given[given >= 0], minlength=data.n_classes)
    if counts.min() < 2:
        few = int(counts.argmin())
        raise UserError(
            f"class {data.class_names[few]} has {counts[few]} labelled images, and pairs need two of each; "
            f"raise --labels or --percent"
        )
    if not 0 <= config.dropout < 1:
        raise UserError(f"--dropout {config.dropout} must lie between 0 and 1")
    if config.lambda_end < config.lambda_start:
        raise UserError(f"--lambda-end {config.lambda_end} must not come before --lambda-start {config.lambda_start}")
    batches = ("batch", "batch_labelled", "pretrain_batch")
    require_above_zero(config, "epochs", "lr", "pretrain_lr", *batches, "n_features", "least_count")
    weights = ("reconstruction_weight", "pair_weight", "cluster_weight", "lambda_max", "margin")
    shares, views = ("percent", "holdout"), ("rotate", "scale", "shift")
    require_not_negative(config, *weights, "pretrain_epochs", "lambda_start", *shares, *views)
    if min(config.strides) < 1:
        raise UserError(f"--strides {config.strides} must be 1 or more")


def write_results(run: Run, learner: Learner) -> None:
    """Write predictions.csv, report.html and result.json, and tell what came out."""
    config, data = learner.config, learner.data.to(torch.device("cpu"))
    train, test = learner.probabilities(learner.data.x_train).cpu(), learner.probabilities(learner.data.x_test).cpu()
    run.write_predictions(data, learner.given, train, test)

    scores = learner.scores()
    seconds = sum(metrics["seconds"] for metrics in run.history)
    clusternet = {f"clusternet_{name}": value for name, value in learner.kmeans_nmi().items()}
    run.finish(scores | learner.start_figures | clusternet | {"labels": len(learner.labelled), "seconds": seconds})

    held_out = data.held_out(learner.given.cpu())
    probability = test if len(test) else train[learner.unlabelled.cpu()]
    kind = held_out.what.split()[0]  # test, unlabelled
    title = f"ClusterNet on {data.name}, {len(learner.labelled)} labels, seed {config.seed}"
    facts = {"images": f"{len(train) + len(test)}", "labels": f"{len(learner.labelled)}"}
    if f"{kind}_acc" in scores:
        facts |= {f"{kind} ACC": f"{scores[f'{kind}_acc']:.2f} %", f"{kind} NMI": f"{scores[f'{kind}_nmi']:.3f}"}
    facts |= {"epochs": f"{config.epochs}", "time of clustering": f"{seconds:.0f} s"}
    sections = [
        *training_sections(run),
        *paper_sections(learner, held_out, probability.argmax(dim=1)),
        *classification_sections(held_out, data.class_names, probability, None),
    ]
    run.write_text("report.html", page(title, facts, sections))
    outcome = ", ".join(f"{name} {value}" for name, value in facts.items() if name.startswith(kind))
    print(f"{title}: {outcome or 'done'}, {seconds:.0f} s of clustering")
    print(f"  what the run left  {run.path}/report.html, predictions.csv, metrics.jsonl")
    print(f"  predict new images python -m methods.predict {run.path} IMAGE...")


def training_sections(run: Run) -> list[Section]:
    """Fig. 5: ACC, NMI and losses over the epochs, and over λ while it rises."""
    sections = [Section("Training", "What each epoch left (Fig. 5a, c).", curves(run.history, PANELS, from_zero=False))]
    top = max(metrics["lambda"] for metrics in run.history)
    rising = [metrics for metrics in run.history if 0 < metrics["lambda"] < top]
    if rising and "unlabelled_acc" in rising[0]:
        panels = {title: PANELS[title] for title in ("ACC, %", "NMI")}
        caption = "What the epochs left in which λ, the weight of the unlabelled images, rose (Fig. 5b)."
        sections.append(Section("Effect of λ", caption, curves(rising, panels, "lambda", "λ", from_zero=False)))
    return sections


def paper_sections(learner: Learner, held_out: HeldOut, predicted: Tensor) -> list[Section]:
    """Figs. 1, 3 and 4 of held-out images: embeddings, decoded centres, reconstructions."""
    images, names = held_out.images, [name[:12] for name in learner.data.class_names]
    some = embedded(len(images))
    classes, coloured_by = (held_out.truth, "true") if held_out.known else (predicted, "predicted")
    panels = {
        "pixels": to_float(images[some]).flatten(start_dim=1),
        "autoencoder": learner.start_features,
        "ClusterNet": learner.shown_features(),
    }
    caption = f"{len(some)} {held_out.what} by t-SNE, coloured by {coloured_by} class (Fig. 1)."
    sections = [Section("Embeddings", caption, embedding(panels, classes[some], names))]

    centres = learner.decoded(learner.network.centres)
    filled = [label for label in range(len(names)) if (predicted == label).any()][:_IN_A_ROW]
    samples = images[[int(torch.nonzero(predicted == label)[0]) for label in filled]]
    body = gallery(centres[filled], [f"centre {names[label]}" for label in filled])
    body += gallery(samples, [names[label] for label in filled])
    sections.append(Section("Centres", "Decoded, with an image of each cluster below (Fig. 3).", body))

    few = images[:_IN_A_ROW]
    decoded = learner.decoded(learner.features(few.to(learner.given.device)))
    body = gallery(few, [""] * len(few)) + gallery(decoded, [""] * len(few))
    sections.append(Section("Reconstructions", f"Of {held_out.what}, below each (Fig. 4).", body))
    return sections


if __name__ == "__main__":
    sys.exit(launch("clusternet", PRESETS, train))
