"""What clusterings of images have in common: both parts merged, scores against classes, the file they leave."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import fastclust
from methods.common.config import RunConfig
from methods.common.data import HeldOut, ImageData
from methods.common.report import Section, classification_sections, embedded
from methods.common.run import write_whole
from methods.common.sources import load


def load_merged(config: RunConfig) -> tuple[ImageData, int]:
    """The images of both parts as one training part, and how many of them were training images."""
    data = load(config, need_classes=False)
    return merged(data), len(data.x_train)


def merged(data: ImageData) -> ImageData:
    """The training images, then the test images, as one training part."""
    files = data.files + tuple(f"test {i}" for i in range(len(data.x_test))) if data.files else ()
    return replace(
        data,
        x_train=torch.cat([data.x_train, data.x_test]),
        y_train=torch.cat([data.y_train, data.y_test]),
        x_test=data.x_test[:0],
        y_test=data.y_test[:0],
        files=files,
    )


def cluster_names(n_clusters: int) -> tuple[str, ...]:
    return tuple(str(k) for k in range(n_clusters))


def health(probabilities: Tensor) -> dict[str, float]:
    """What of soft assignments (N, K) tells a clustering from a collapse.

    Returns:
        clusters: K. used: clusters that are the likeliest of some image. entropy: of the mean assignment, over ln K.
        confidence: mean probability of the likeliest cluster. information: of an image about its cluster,
        H(mean p) - mean H(p), over ln K: 0 where all images get the same assignment, sharp or soft.
    """
    p, scale = probabilities.double(), math.log(probabilities.shape[1])
    entropy = float(torch.special.entr(p.mean(dim=0)).sum()) / scale
    return {
        "clusters": probabilities.shape[1],
        "used": len(p.argmax(dim=1).unique()),
        "entropy": entropy,
        "confidence": float(p.amax(dim=1).mean()),
        "information": entropy - float(torch.special.entr(p).sum(dim=1).mean()) / scale,
    }


def scores(truth: Tensor, clusters: Tensor) -> dict[str, float]:
    """ACC, NMI and ARI over the images whose class is known, if any is. No decision of a run depends on them."""
    known = truth >= 0
    if not known.any():
        return {}
    truth, clusters = truth[known], clusters[known]
    return {
        "acc": 100 * fastclust.metrics.cluster_accuracy(truth, clusters),
        "nmi": fastclust.metrics.normalized_mutual_info(truth, clusters),
        "ari": fastclust.metrics.adjusted_rand(truth, clusters),
    }


def matched(truth: Tensor, clusters: Tensor, n_clusters: int) -> Tensor:
    """int64 (K,): the cluster that stands for each class, one to one, as many images right as can be (Hungarian)."""
    from scipy.optimize import linear_sum_assignment

    counts = torch.bincount(truth * n_clusters + clusters, minlength=n_clusters**2).reshape(n_clusters, n_clusters)
    return torch.from_numpy(linear_sum_assignment(counts.numpy(), maximize=True)[1])


def class_of_cluster(truth: Tensor, clusters: Tensor, n_clusters: int) -> Tensor:
    """int64 (K,): the class that each cluster stands for, by the Hungarian method; one that no image has where none."""
    n = max(n_clusters, int(truth.max()) + 1)
    cluster_of_class = matched(truth, clusters, n)
    stands_for = torch.empty(n, dtype=torch.long)
    stands_for[cluster_of_class] = torch.arange(n)
    return stands_for[:n_clusters]


def export(path: Path, probabilities: Tensor, embeddings: Tensor, n_train: int) -> None:
    """Write an .npz file of `probabilities` (N, K) and `embeddings` (N, D), float32, `labels` and `split` (N,).

    Rows are the n_train training images, then the test images: `split`, int8, is 0 and 1. A label, int64, is the
    likeliest cluster.
    """
    arrays = {
        "probabilities": probabilities.float().numpy(),
        "embeddings": embeddings.float().numpy(),
        "labels": probabilities.argmax(dim=1).numpy(),
        "split": (np.arange(len(probabilities)) >= n_train).astype(np.int8),
    }
    write_whole(path, lambda file: np.savez_compressed(file, **arrays))


def assignment_sections(data: ImageData, probabilities: Tensor, embeddings: Tensor) -> list[Section]:
    """Confusion after matching, or sizes of clusters where classes are unknown; embedding; least certain images."""
    n_clusters, truth = probabilities.shape[1], data.y_train
    known = bool((truth >= 0).all()) and n_clusters == data.n_classes
    names = data.class_names if known else cluster_names(n_clusters)
    if known:
        probabilities = probabilities[:, matched(truth, probabilities.argmax(dim=1), n_clusters)]
    images = HeldOut("images", data.x_train, truth, known, data.files)
    return classification_sections(images, names, probabilities, embeddings[embedded(len(truth))])
