"""How far a clustering's confidence tells its accuracy: reliability in equal bins, ECE, and their figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from methods.common.clustering import class_of_cluster
from methods.common.report import drawn, new_figure

N_BINS = 15


class Judged(NamedTuple):
    """What is known of an assignment, image by image."""

    confidence: Tensor  # (N,) float64, probability of the likeliest cluster
    right: Tensor  # (N,) bool: that cluster stands for the image's class


class Reliability(NamedTuple):
    """Images sorted by confidence into equal bins ((b - 1) / B, b / B]; each (B,) float64, 0 where a bin is empty."""

    count: Tensor
    accuracy: Tensor
    confidence: Tensor

    @property
    def error(self) -> float:
        """Expected calibration error, Σ |B_b| / n · |acc(B_b) - conf(B_b)| (RUC, eq. 20)."""
        return float((self.count * (self.accuracy - self.confidence).abs()).sum() / self.count.sum())


def judge(probabilities: Tensor, truth: Tensor) -> Judged:
    """Soft assignments (N, K) of images beside their classes (N,), clusters matched to classes one to one.

    Images whose class is unknown (-1) are left out.
    """
    known = truth >= 0
    confidence, clusters = probabilities[known].double().max(dim=1)
    stands_for = class_of_cluster(truth[known], clusters, probabilities.shape[1])
    return Judged(confidence, stands_for[clusters] == truth[known])


def reliability(judged: Judged, n_bins: int = N_BINS) -> Reliability:
    """The bins of `judged`; there must be an image in it."""
    index = ((judged.confidence * n_bins).ceil().long() - 1).clamp(0, n_bins - 1)

    def total(values: Tensor) -> Tensor:
        return torch.zeros(n_bins, dtype=torch.float64).index_add_(0, index, values.double())

    count = total(torch.ones_like(judged.confidence))
    return Reliability(count, total(judged.right) / count.clamp(min=1), total(judged.confidence) / count.clamp(min=1))


def reliability_diagram(panels: Mapping[str, Judged]) -> str:
    """Accuracy over confidence, a panel for each title; a calibrated assignment lies on the diagonal."""
    figure, axes = new_figure((4.2 * len(panels), 4.0), 1, len(panels))
    for axis, (title, judged) in zip(axes, panels.items(), strict=True):
        bins = reliability(judged)
        filled, n_bins = bins.count > 0, len(bins.count)
        centres = (torch.arange(n_bins) + 0.5) / n_bins
        axis.bar(centres[filled].numpy(), bins.accuracy[filled].numpy(), width=0.9 / n_bins)
        axis.plot(bins.confidence[filled].numpy(), bins.accuracy[filled].numpy(), "o", color="black", markersize=3)
        axis.plot([0, 1], [0, 1], "--", color="grey")
        axis.set_xlim(0, 1)
        axis.set_ylim(0, 1)
        axis.set_title(f"{title}, ECE {bins.error:.3f}")
        axis.set_xlabel("confidence")
        axis.set_ylabel("accuracy")
    return drawn(figure, "accuracy over confidence")


def confidence_histogram(panels: Mapping[str, Tensor]) -> str:
    """How many images have which confidence, (N,), a panel for each title."""
    figure, axes = new_figure((4.2 * len(panels), 3.0), 1, len(panels))
    for axis, (title, confidence) in zip(axes, panels.items(), strict=True):
        axis.hist(confidence.numpy(), bins=25, range=(0, 1))
        axis.axvline(float(confidence.mean()), color="black", linestyle="--")
        axis.set_title(title)
        axis.set_xlabel("confidence")
        axis.set_ylabel("images")
    return drawn(figure, "images by confidence")
