"""What a run of RUC is judged by, and what it leaves: figures beside the base's, report.html, assignments.npz."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from methods.common.attacks import attack_curves, under_attack
from methods.common.bases import Base
from methods.common.calibration import confidence_histogram, judge, reliability, reliability_diagram
from methods.common.clustering import class_of_cluster, cluster_names, export, matched, merged, scores
from methods.common.data import HeldOut, ImageData
from methods.common.report import Section, classification_sections, confusion, curves, embedded, embedding, page
from methods.common.run import Run
from methods.ruc_settings import Config

if TYPE_CHECKING:
    from methods.ruc import Learner

# Panels of the report: metric -> the name shown.
PANELS = {
    "Against the classes": {"acc": "ACC, %"},
    "Calibration": {"ece": "ECE", "confidence": "mean confidence"},
    "Losses": {"loss_strong": "L_Xs", "loss_clean": "L_X̂"},
    "Unclean images": {"loss_unclean": "L_Û"},
    "Clean set": {"clean": "images"},
}
CLEAN_PANELS = {
    "Precision, %": {"clean_precision": "clean set"},
    "Recall, %": {"clean_recall": "clean set"},
    "F1, %": {"clean_f1": "clean set"},
}


class Answer(NamedTuple):
    """What one clustering says of all images that it knows, in the order of the merged data."""

    name: str
    probabilities: Tensor  # (M, C)
    network: nn.Module | None


# ============================================================================================================== figures


def judged(probabilities: Tensor, truth: Tensor) -> dict[str, float]:
    """ACC, NMI, ARI and ECE of soft assignments (N, C), where classes are known."""
    figures = scores(truth, probabilities.argmax(dim=1))
    return figures | {"ece": reliability(judge(probabilities, truth)).error} if figures else {}


def judged_by_part(probabilities: Tensor, truth: Tensor, n_train: int) -> dict[str, float]:
    """The figures of all images, and of either part if there are two; of the first alone for a base that knows no more.

    Args:
        probabilities: (M, C) of the first M images. truth: (N,) of all, the training images first.
    """
    if n_train == len(truth):
        return judged(probabilities, truth)
    figures = {f"train_{name}": value for name, value in judged(probabilities[:n_train], truth[:n_train]).items()}
    if len(probabilities) == len(truth):
        figures |= judged(probabilities, truth)
        figures |= {f"test_{name}": value for name, value in judged(probabilities[n_train:], truth[n_train:]).items()}
    return figures


def quality(clean: Tensor, labels: Tensor, truth: Tensor, base: Base) -> dict[str, float]:
    """Precision, recall and F1 of a clean set (Table 3, Fig. 4), in per cent, where classes are known.

    A label is right if its cluster stands for the image's class, by the matching of the base's clusters; recall is the
    share of right labels that is clean.
    """
    known = truth >= 0
    if not known.any():
        return {}
    stands_for = class_of_cluster(truth[known], base.probabilities.argmax(dim=1)[known], base.probabilities.shape[1])
    right, clean = (stands_for[labels] == truth)[known], clean[known]
    both = float((right & clean).sum())
    precision, recall = both / max(int(clean.sum()), 1), both / max(int(right.sum()), 1)
    f1 = 2 * precision * recall / max(precision + recall, 1e-12)
    return {"clean_precision": 100 * precision, "clean_recall": 100 * recall, "clean_f1": 100 * f1}


def attacked(config: Config, data: ImageData, answers: list[Answer]) -> dict[str, dict[str, list[float]]]:
    """Accuracy of each network under FGSM and BIM (Fig. 9): on test images if there are any that it did not see.

    `data`: the images that were trained on, and the test images apart. Each network's clusters are matched to classes
    once, by what it says of images as they are; that takes as many clusters as classes, all of them known.
    """
    whole = merged(data)
    n = answers[0].probabilities.shape[1]
    if not config.attacked or n != data.n_classes or not (whole.y_train >= 0).all():
        return {}
    first = len(data.x_train) if len(data.x_test) else 0
    rows = first + torch.linspace(0, len(whole.x_train) - first - 1, min(config.attacked, len(whole.x_train) - first))
    rows = rows.long()
    found = {}
    for answer in answers:
        if answer.network is not None:
            clusters = answer.probabilities.argmax(dim=1)
            cluster_of_class = matched(whole.y_train[: len(clusters)], clusters, n)
            device = next(answer.network.parameters()).device
            images, right = whole.x_train[rows].to(device), cluster_of_class[whole.y_train[rows]].to(device)
            found[answer.name] = under_attack(answer.network, images, right, config.attacks)
    return found


def all_figures(
    run: Run,
    config: Config,
    data: ImageData,
    n_train: int,
    base: Base,
    clean: Tensor,
    answers: list[Answer],
    found: Mapping[str, Mapping[str, list[float]]],
) -> dict[str, float]:
    """What result.json holds: RUC's figures by name, the base's under base_…, the first clean set's under start_…"""
    truth, figures = torch.cat([data.y_train, data.y_test]), {}
    for answer, prefix in zip(answers, ("base_", ""), strict=True):
        figures |= {prefix + name: v for name, v in judged_by_part(answer.probabilities, truth, n_train).items()}
        for attack, accuracies in found.get(answer.name, {}).items():
            pairs = zip(config.attacks, accuracies, strict=True)
            figures |= {f"{prefix}{attack}_{epsilon:g}": accuracy for epsilon, accuracy in pairs}
    if "acc" in run.history[-1]:
        figures["best_acc"] = max(metrics["acc"] for metrics in run.history)
    first = quality(clean, base.probabilities.argmax(dim=1), data.y_train, base)
    figures |= {f"start_{name}": value for name, value in first.items()} | {"start_clean": int(clean.sum())}
    return figures | {name: value for name, value in run.history[-1].items() if name.startswith("clean")}


# ==================================================================================================== what a run leaves


def write_results(
    run: Run, config: Config, data: ImageData, n_train: int, base: Base, clean: Tensor, learner: Learner
) -> None:
    """Write assignments.npz, predictions.csv, report.html and result.json, and tell what came out.

    `data`: the images that were trained on, and the test images apart; `n_train`: how many training images the data
    has. `clean`: the clean set at the start.
    """
    device, whole = learner.images.device, merged(data)
    held_out = data.x_test.to(device)

    def with_test(known: Tensor, of_images: Callable[[Tensor], Tensor] | None) -> Tensor:
        return known if of_images is None or not len(held_out) else torch.cat([known, of_images(held_out).cpu()])

    ours = learner.together()
    theirs = None if base.network is None else base.network.to(device)
    by_base = with_test(base.probabilities, None if theirs is None else lambda x: learner.predict(theirs, x))
    answers = [
        Answer("base", by_base, theirs),
        Answer("RUC", with_test(learner.assignments(), lambda x: learner.predict(ours, x)), ours),
    ]
    probabilities = answers[1].probabilities
    export(run.path / "assignments.npz", probabilities, with_test(learner.features(), learner.features), n_train)
    named = replace(data, class_names=cluster_names(learner.n_clusters))
    n = len(data.x_train)
    run.write_predictions(named, torch.full((n,), -1), probabilities[:n], probabilities[n:])

    found = attacked(config, data, answers)
    figures = all_figures(run, config, data, n_train, base, clean, answers, found)
    seconds = sum(metrics["seconds"] for metrics in run.history)

    title = f"RUC on {data.name}, base {config.base}, seed {config.seed}"
    if config.report:
        facts = in_brief(figures) | {"images": f"{n}", "epochs": f"{config.epochs}", "time": f"{seconds:.0f} s"}
        sections = [
            Section("Training", "What each epoch left.", curves(run.history, PANELS, from_zero=False)),
            *clean_sections(run, clean),
            *judged_sections(whole, answers, clean),
            *attack_sections(config, found),
            features_section(data, base, learner),
            *image_sections(data, base, learner.assignments()),
        ]
        run.write_text("report.html", page(title, facts, sections))
    run.finish(figures | {"epochs": len(run.history), "seconds": seconds})
    outcome = ", ".join(f"{name} {value}" for name, value in in_brief(figures).items())
    print(f"{title}: {outcome + ', ' if outcome else ''}{seconds:.0f} s")
    report = "report.html, " if config.report else ""
    print(f"  what the run left  {run.path}/{report}assignments.npz, predictions.csv, metrics.jsonl")
    print(f"  assign new images  python -m methods.predict {run.path} IMAGE...")


def in_brief(figures: Mapping[str, float]) -> dict[str, str]:
    """The base's figures and ours beside each other, of all images, or of the training images if it knows no others."""
    part = "" if "base_acc" in figures else "train_"
    if f"base_{part}acc" not in figures:
        return {}
    of_what = " of training images" * bool(part)
    pairs = {f"ACC{of_what}": ("acc", "{:.2f} %"), "NMI": ("nmi", "{:.3f}"), "ECE": ("ece", "{:.3f}")}
    return {
        name: f"{form.format(figures[f'base_{part}{key}'])} → {form.format(figures[part + key])}"
        for name, (key, form) in pairs.items()
    }


# ============================================================================================================= sections


def clean_sections(run: Run, clean: Tensor) -> list[Section]:
    """Fig. 4: quality of the clean set over the epochs."""
    if "clean_f1" not in run.history[-1]:
        return []
    caption = f"{int(clean.sum())} of {len(clean)} images at the start; quality after each epoch (Fig. 4)."
    return [Section("Clean set", caption, curves(run.history, CLEAN_PANELS, from_zero=False))]


def judged_sections(whole: ImageData, answers: list[Answer], clean: Tensor) -> list[Section]:
    """Confidence of the images that were not clean at the start (Fig. 5), and how far it tells the accuracy."""
    unclean = torch.nonzero(~clean).flatten()
    sections = []
    if len(unclean):
        panels = {answer.name: answer.probabilities[unclean].amax(dim=1) for answer in answers}
        caption = f"Of the {len(unclean)} images that were not clean at the start; dashed: the mean (Fig. 5)."
        sections.append(Section("Confidence", caption, confidence_histogram(panels)))
    if (whole.y_train >= 0).any():
        diagrams = {a.name: judge(a.probabilities, whole.y_train[: len(a.probabilities)]) for a in answers}
        caption = "Accuracy over confidence, 15 equal bins; on the diagonal both are the same."
        sections.append(Section("Calibration", caption, reliability_diagram(diagrams)))
    return sections


def attack_sections(config: Config, found: Mapping[str, Mapping[str, list[float]]]) -> list[Section]:
    """Fig. 9."""
    if not found:
        return []
    caption = "Accuracy under FGSM and BIM (Fig. 9)." + (
        "" if "base" in found else " The base has no network to attack."
    )
    return [Section("Under attack", caption, attack_curves(config.attacks, found))]


def features_section(data: ImageData, base: Base, learner: Learner) -> Section:
    """Fig. 6: the base's embedding, and the networks' features at a quarter, at half and at the end of the run."""
    shown = embedded(len(data.x_train))
    panels = {} if base.embeddings is None else {"base": base.embeddings[shown]}
    panels |= {f"epoch {epoch}": features for epoch, features in learner.snapshots.items()}
    panels["end"] = learner.shown_features()
    known = bool((data.y_train >= 0).all())
    classes = data.y_train[shown] if known else learner.assignments().argmax(dim=1)[shown]
    names = data.class_names if known else cluster_names(learner.n_clusters)
    caption = f"{len(shown)} images by t-SNE, coloured by {'true class' if known else 'cluster'} (Fig. 6)."
    return Section("Features", caption, embedding(panels, classes, [name[:12] for name in names]))


def image_sections(data: ImageData, base: Base, probabilities: Tensor) -> list[Section]:
    """Fig. 7: confusion matrices of base and RUC where classes are known; the surest and the least sure images."""
    truth, n_clusters = data.y_train, probabilities.shape[1]
    known = bool((truth >= 0).all()) and n_clusters == data.n_classes
    names = data.class_names if known else cluster_names(n_clusters)
    sections = []
    if known:
        before = base.probabilities.argmax(dim=1)
        body = confusion(truth, class_of_cluster(truth, before, n_clusters)[before], [name[:12] for name in names])
        sections.append(Section("Confusion matrix of the base", "A row is a true class (Fig. 7).", body))
        probabilities = probabilities[:, matched(truth, probabilities.argmax(dim=1), n_clusters)]
    images = HeldOut("images", data.x_train, truth, known, data.files)
    return sections + classification_sections(images, names, probabilities, None)
