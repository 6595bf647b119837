"""BSC-IC: clustering of images without any labels by two views, a critic and the correlation of clusters.

"Bootstrap Your Own Latent: Self-Supervised Clustering with Instance-Level and Cluster-Level Discriminations" (BSC-IC).
Numbers of equations and tables are the paper's.

    python -m methods.bsc_ic                             digits: no download, no GPU, a minute or two on one core
    python -m methods.bsc_ic --data usps --seed 1
    python -m methods.bsc_ic --data npz:FILE --clusters 12   no classes needed; those there are serve to report

Training and test images are clustered together. No class is ever read but for the figures that are reported.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastclust
from methods.bsc_ic_settings import PRESETS, Config, check
from methods.common import autoencoder, networks
from methods.common.autoencoder import Reconstruction
from methods.common.clustering import assignment_sections, cluster_names, export, health, load_merged, scores
from methods.common.config import launch
from methods.common.data import ImageData
from methods.common.errors import UserError
from methods.common.pretraining import Settings
from methods.common.progress import Progress, in_short
from methods.common.report import Section, curves, page
from methods.common.run import Run
from methods.common.training import infer, pick_device, settle_statistics, shuffled
from methods.common.views import Views

# What a person wants to see of an epoch while it runs: metric -> its short name, and how it is written.
IN_SHORT = {
    "score": ("score", "{:.3f}"),
    "used": ("clusters used", "{}"),
    "information": ("information", "{:.2f}"),
    "agreement": ("agreement", "{:.2f}"),
    "acc": ("ACC", "{:.1f} %"),
}

# Panels of the report: metric -> the name shown.
PANELS = {
    "Against the classes": {"acc": "ACC", "nmi": "NMI", "ari": "ARI"},
    "Health": {
        "entropy": "entropy of the mean assignment / ln K",
        "information": "information / ln K",
        "agreement": "views that agree",
    },
    "Clusters used": {"used": "of K"},
    "Ties between views": {"loss_mi": "L_mi", "loss_si": "L_si"},
    "Discriminations": {"loss_clu": "L_clu", "loss_adv": "L_adv-G"},
    "Critic": {"loss_critic": "L_adv-D", "penalty": "gradient penalty"},
}

# ========================================================================================================== the trainer


def train(config: Config, resume: Path | None = None) -> Run:
    """Train, write the run's folder and print what came out; `resume` is the folder of a run to go on with."""
    device = pick_device(config.device, config.threads)
    data, n_train = load_merged(config)
    check(config, data)
    data = data.to(device)
    torch.manual_seed(config.seed)
    learner = Learner(config, data)
    with Run("bsc_ic", config, data, resume) as run:
        state = run.restore() if resume else None
        first = learner.load_state(state) if state else 0
        others = 0 if state else (config.starts - 1) * min(config.start_epochs, config.epochs)
        warned = any(collapsed(metrics, config) for metrics in run.history)
        with Progress(learner.steps * (config.epochs + others), learner.steps * first) as progress:
            if not state and config.starts > 1:
                learner, begun = best_start(learner, progress)
                first = len(begun)
                for metrics in begun:
                    run.save(metrics, epoch=first, **learner.state())
            for epoch in range(first + 1, config.epochs + 1):
                metrics = learner.epoch(epoch, progress)
                run.save(metrics, epoch=epoch, **learner.state())
                progress.epoch(f"epoch {epoch:3}/{config.epochs}", in_short(metrics, IN_SHORT))
                if not warned and collapsed(metrics, config):
                    warned = True
                    print(f"bsc_ic: warning: epoch {epoch}: {cause(metrics, config)}", file=sys.stderr, flush=True)
        write_results(run, learner, n_train)
    return run


def best_start(learner: Learner, progress: Progress) -> tuple[Learner, list[dict[str, Any]]]:
    """Begin several times over, from other random weights; give the start of least `score`, and its epochs so far.

    No class is looked at: the score is made of the terms of the loss alone.
    """
    config, kept, spent = learner.config, None, 0.0
    last = min(config.start_epochs, config.epochs)
    for start in range(1, config.starts + 1):
        learner = learner if start == 1 else Learner(config, learner.data)
        begun = [learner.epoch(epoch, progress) | {"start": start} for epoch in range(1, last + 1)]
        progress.epoch(f"start {start:3}/{config.starts}", in_short(begun[-1], IN_SHORT))
        spent += sum(metrics["seconds"] for metrics in begun)
        if kept is None or begun[-1]["score"] < kept[1][-1]["score"]:
            kept = learner, begun
    kept[1][-1]["seconds"] += spent - sum(metrics["seconds"] for metrics in kept[1])  # of the starts that end here
    return kept


class Learner:
    """Online network, EMA target and critic, trained on eq. 8 and eq. 5 in turn (Algorithm 1).

    Attributes:
        n_clusters: K.
        steps: of the optimiser in an epoch.
    """

    def __init__(self, config: Config, data: ImageData):
        self.config, self.images = config, data.x_train
        self.data, self.n_clusters = data, config.clusters or data.n_classes
        small = data.n_channels == 1 and max(data.image_size) <= 16
        self.architecture = {
            "name": config.network or ("cnn-flat" if small else "resnet18"),
            "n_channels": data.n_channels,
            "image_size": tuple(data.image_size),
            "n_outputs": self.n_clusters,
            "weight_norm": False,
            "unit_length": False,
        }
        self.online = networks.build(**self.architecture)
        self.online.standardise.set(*data.pixel_statistics())
        self.online.to(self.images.device)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.critic = Critic(self.n_clusters, config.critic_width).to(self.images.device)
        self.optimizer = torch.optim.Adam(self.online.parameters(), lr=config.lr, fused=True)
        self.critic_optimizer = torch.optim.Adam(
            self.critic.parameters(), lr=config.critic_lr, betas=tuple(config.critic_betas), fused=True
        )
        self.views = make_views(config)
        self.steps = max(round(len(self.images) / config.batch), 1)

    def epoch(self, number: int, progress: Progress) -> dict[str, Any]:
        """All images once. Returns what is logged of it."""
        started = time.perf_counter()
        metrics: dict[str, Any] = {"epoch": number} | self.training_pass(progress, f"epoch {number}")
        if self.config.settle:
            settle_statistics(self.online, self.images, self.config.batch)
        probabilities = self.probabilities()
        metrics |= health(probabilities) | scores(self.data.y_train.cpu(), probabilities.argmax(dim=1).cpu())
        return metrics | {"seconds": time.perf_counter() - started}

    def training_pass(self, progress: Progress, title: str) -> dict[str, float]:
        """Algorithm 1 over all images once. Returns the mean of each term, and how often the views agreed."""
        self.online.train()
        self.target.train()
        totals: dict[str, Tensor] = {}
        for batch in shuffled(torch.arange(len(self.images), device=self.images.device), self.steps):
            for name, value in self.step(self.images[batch]).items():
                totals[name] = totals.get(name, 0) + value
            progress.step(title)
        means = {name: float(total) / self.steps for name, total in totals.items()}
        if not all(map(math.isfinite, means.values())):
            raise UserError("the loss is no longer finite; a lower --lr or --critic-lr may help")
        return means | {"score": score(means, self.config)}

    def step(self, images: Tensor) -> dict[str, Tensor]:
        """One step of online network, target and critic on a batch. Returns the terms, not weighted."""
        config, n = self.config, len(images)
        views = torch.cat([self.views(images), self.views(images)])
        log_a, log_b = self.online(views).log_softmax(dim=1).split(n)
        with torch.no_grad():
            target_a, target_b = self.target(views).log_softmax(dim=1).split(n)
        z = log_a.exp() if config.critic_views == "first" else torch.cat([log_a, log_b]).exp()

        terms = {}
        if config.alpha_mi:
            terms["mi"] = mutual_improvement((log_a, log_b), (target_a, target_b), config.kl_order)
        if config.alpha_si:
            terms["si"] = kl(log_a.detach() if config.detach_si else log_a, log_b)
        if config.alpha_clu:
            terms["clu"] = cluster_discrimination(log_a.exp(), log_b.exp(), config.lambda_clu)
        if config.alpha_adv:
            terms["adv"] = -self.critic(z).mean()  # eq. 4
        loss = sum(getattr(config, f"alpha_{name}") * term for name, term in terms.items())  # eq. 8
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        move_average(self.target, self.online, config.tau)

        found = {"loss": loss.detach()} | {f"loss_{name}": term.detach() for name, term in terms.items()}
        if config.alpha_adv:
            for _ in range(config.critic_steps):
                found |= self.critic_step(z.detach())
        return found | {"agreement": (log_a.argmax(dim=1) == log_b.argmax(dim=1)).float().mean()}

    def critic_step(self, z: Tensor) -> dict[str, Tensor]:
        """One step of the critic on assignments (M, K) and as many draws of the prior (eq. 5)."""
        corners = torch.eye(self.n_clusters, device=z.device)
        drawn = torch.randint(self.n_clusters, (len(z),), device=z.device)
        between = torch.rand(len(z), 1, device=z.device)
        penalty = gradient_penalty(self.critic, between * corners[drawn] + (1 - between) * z)
        # The prior has K different draws only, each of which the critic has to see but once.
        share = torch.bincount(drawn, minlength=self.n_clusters) / len(z)
        loss = self.critic(z).mean() - self.critic(corners) @ share + self.config.xi * penalty
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()
        return {"loss_critic": loss.detach(), "penalty": penalty.detach()}

    # ------------------------------------------------------------------------------------------- results and checkpoint

    def probabilities(self) -> Tensor:
        """Soft assignments (N, K) of all images, not augmented."""
        self.online.eval()
        return infer(lambda images: self.online(images).softmax(dim=1), self.images)

    def embeddings(self) -> Tensor:
        """Features (N, D) of all images, not augmented."""
        self.online.eval()
        return infer(self.online.features, self.images)

    def state(self) -> dict[str, Any]:
        return {
            "architecture": self.architecture,
            "class_names": cluster_names(self.n_clusters),
            "network": self.online.state_dict(),
            "target": self.target.state_dict(),
            "critic": self.critic.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "critic_optimizer": self.critic_optimizer.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> int:
        """Take up what `state` gave. Returns the number of epochs that were finished."""
        self.online.load_state_dict(state["network"])
        for name in ("target", "critic", "optimizer", "critic_optimizer"):
            getattr(self, name).load_state_dict(state[name])
        return state["epoch"]


class Critic(nn.Sequential):
    """D of eqs. 4 and 5: K - 1024 - 512 - 1, LeakyReLU, no normalisation. Gives (N,) of assignments (N, K)."""

    def __init__(self, n_clusters: int, width: int = 1024):
        super().__init__(
            nn.Linear(n_clusters, width),
            nn.LeakyReLU(0.2),
            nn.Linear(width, width // 2),
            nn.LeakyReLU(0.2),
            nn.Linear(width // 2, 1),
            nn.Flatten(start_dim=0),
        )


# =============================================================================================================== losses


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) of log-probabilities (N, K), the mean over rows."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=1).mean()


def mutual_improvement(
    online: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor], order: str = "target-online"
) -> Tensor:
    """L_mi (eqs. 1, 2): the target's assignment of one view against the online network's of the other, both ways.

    Args:
        online, target: log-probabilities (N, K) of the views a and b.
        order: which of the two stands first in the divergence.
    """
    pairs = ((target[1], online[0]), (target[0], online[1]))
    return sum(kl(t, o) if order == "target-online" else kl(o, t) for t, o in pairs)


def cluster_discrimination(z_a: Tensor, z_b: Tensor, off_weight: float | None = None) -> Tensor:
    """L_clu (eqs. 6, 7): columns of the same cluster in both views alike, those of different ones orthogonal.

    Args:
        z_a, z_b: assignments (N, K).
        off_weight: λ_clu; None: 1 / (K - 1).
    """
    n_clusters = z_a.shape[1]
    cosine = F.normalize(z_a, dim=0).T @ F.normalize(z_b, dim=0)
    same = cosine.diagonal()
    different = cosine.square().sum() - same.square().sum()
    return (same - 1).square().sum() + (1 / (n_clusters - 1) if off_weight is None else off_weight) * different


def gradient_penalty(critic: nn.Module, between: Tensor) -> Tensor:
    """Mean of (‖∇D(r)‖ - 1)² over points r, (M, K), without the weight ξ (eq. 5)."""
    between = between.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return (gradient.norm(dim=1) - 1).square().mean()


@torch.no_grad()
def move_average(target: nn.Module, online: nn.Module, tau: float) -> None:
    """Target weights θ ← τθ + (1 - τ)φ (eq. 10). Statistics of BatchNorm stay each network's own."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 1 - tau)


def score(means: dict[str, float], config: Config) -> float:
    """Eq. 8 with the critic's distance of the assignments from the prior in place of L_adv-G.

    D is known but for a constant, so that L_adv-G of two critics cannot be compared; their distances can.
    """
    weighted = sum(getattr(config, f"alpha_{name}") * means.get(f"loss_{name}", 0.0) for name in ("mi", "si", "clu"))
    if not config.alpha_adv:
        return weighted
    return weighted + config.alpha_adv * (config.xi * means["penalty"] - means["loss_critic"])


# =============================================================================================================== health


def collapsed(metrics: dict[str, Any], config: Config) -> bool:
    """Whether an epoch of the second half left the same assignment to all images, or half of the clusters empty."""
    if metrics["epoch"] <= config.epochs / 2:
        return False
    return metrics["information"] < 0.1 or metrics["used"] < metrics["clusters"] / 2


def cause(metrics: dict[str, Any], config: Config) -> str:
    """Why the clustering collapsed, as far as the settings and the figures of an epoch tell, and what to do."""
    state = (
        f"the clustering has collapsed ({metrics['used']} of {metrics['clusters']} clusters used, the mean assignment "
        f"at {100 * metrics['entropy']:.0f} % of the greatest entropy, confidence {100 * metrics['confidence']:.0f} %)"
    )
    if not config.alpha_adv and not config.alpha_clu:
        return (
            f"{state}: --alpha-adv and --alpha-clu are 0, and the same assignment for all images is least of the rest"
        )
    if metrics["agreement"] < 0.5:
        weak = "--alpha-mi, --alpha-si" if not (config.alpha_mi or config.alpha_si) else "--crop, --jitter"
        return f"{state}: the two views of an image agree in {100 * metrics['agreement']:.0f} % only; see {weak}"
    if metrics["entropy"] < 0.5:
        return f"{state}: few clusters take all images; a higher --alpha-clu or --alpha-adv holds them apart"
    return f"{state}: all images get much the same soft assignment; a higher --alpha-adv or more --epochs sharpen it"


# ============================================================================================================== helpers


def make_views(config: Config) -> Views:
    """The random changes of images that the settings ask for."""
    return Views(**{field.name: getattr(config, field.name) for field in fields(Views)})


# ==================================================================================================== what a run leaves


def baselines(learner: Learner) -> dict[str, Tensor]:
    """What k-means clusters for comparison, each (N, D): the pixels, and if asked for an autoencoder's features."""
    config, data = learner.config, learner.data
    found = {"kmeans": data.x_train.flatten(start_dim=1).float()}
    if config.autoencoder_epochs:
        torch.manual_seed(config.seed)
        architecture = {
            "name": autoencoder.NAME,
            "n_channels": data.n_channels,
            "image_size": tuple(data.image_size),
            "n_outputs": learner.n_clusters,
            "n_features": 32,
            "strides": (2, 2, 1 if min(data.image_size) <= 8 else 2),
            "dropout": 0.1,
            "drop_features": False,
        }
        network = autoencoder.build(**architecture).to(data.x_train.device)
        settings = Settings(seed=config.seed, epochs=config.autoencoder_epochs, lr=5e-4, batch=64)
        pretraining = Reconstruction(network, architecture, data, settings, Path(config.runs) / "autoencoders")
        with Progress(pretraining.total_steps, pretraining.done_steps) as progress:
            pretraining.train(progress)
        network.eval()
        found["kmeans_autoencoder"] = infer(network.features, data.x_train)
    return found


def write_results(run: Run, learner: Learner, n_train: int) -> None:
    """Write assignments.npz, predictions.csv, report.html and result.json, and tell what came out."""
    config, data = learner.config, learner.data.to(torch.device("cpu"))
    probabilities, embeddings = learner.probabilities().cpu(), learner.embeddings().cpu()
    clusters, truth = probabilities.argmax(dim=1), data.y_train
    export(run.path / "assignments.npz", probabilities, embeddings, n_train)
    named = replace(data, class_names=cluster_names(learner.n_clusters))
    run.write_predictions(named, torch.full_like(truth, -1), probabilities, probabilities[:0])

    figures = scores(truth, clusters)
    if figures and n_train < len(truth):
        for part, rows in (("train", slice(None, n_train)), ("test", slice(n_train, None))):
            figures |= {f"{part}_{name}": value for name, value in scores(truth[rows], clusters[rows]).items()}
    if figures:
        for name, features in baselines(learner).items():
            labels = fastclust.kmeans(features, learner.n_clusters, n_init=10, seed=config.seed).labels.cpu()
            figures |= {f"{name}_{key}": value for key, value in scores(truth, labels).items()}
    state = health(probabilities)
    seconds = sum(metrics["seconds"] for metrics in run.history)

    title = f"BSC-IC on {data.name}, seed {config.seed}"
    facts = {"images": f"{len(truth)}", "clusters used": f"{state['used']} of {learner.n_clusters}"}
    if figures:
        facts |= {"ACC": f"{figures['acc']:.2f} %", "NMI": f"{figures['nmi']:.3f}", "ARI": f"{figures['ari']:.3f}"}
        facts["ACC of k-means on pixels"] = f"{figures['kmeans_acc']:.2f} %"
    if config.autoencoder_epochs and figures:
        facts["… on an autoencoder"] = f"{figures['kmeans_autoencoder_acc']:.2f} %"
    facts |= {"epochs": f"{config.epochs}", "time": f"{seconds:.0f} s"}
    if config.report:
        sections = [
            Section("Training", "What each epoch left.", curves(run.history, PANELS, from_zero=False)),
            *assignment_sections(data, probabilities, embeddings),
        ]
        run.write_text("report.html", page(title, facts, sections))
    run.finish(figures | state | {"epochs": len(run.history), "seconds": seconds})
    outcome = ", ".join(f"{name} {facts[name]}" for name in ("ACC", "NMI", "ARI", "clusters used") if name in facts)
    print(f"{title}: {outcome}, {seconds:.0f} s")
    last = run.history[-1]
    if collapsed(last, config):
        print(f"  warning: {cause(last, config)}")
    pages = "report.html, " if config.report else ""
    print(f"  what the run left  {run.path}/{pages}assignments.npz, predictions.csv, metrics.jsonl")
    print(f"  assign new images  python -m methods.predict {run.path} IMAGE...")


if __name__ == "__main__":
    sys.exit(launch("bsc_ic", PRESETS, train))
