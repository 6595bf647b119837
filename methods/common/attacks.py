"""Adversarial images: FGSM (Goodfellow et al. 2015) and BIM (Kurakin et al. 2017), in pixels of [0, 1]."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.common.augment import to_float
from methods.common.report import drawn, new_figure

# Takes images (N, C, H, W) in [0, 1], gives logits (N, K).
Network = Callable[[Tensor], Tensor]


def fgsm(network: Network, images: Tensor, truth: Tensor, epsilon: float) -> Tensor:
    """One step of ε along the sign of the loss's gradient (RUC, eq. 22); `truth`: the right outputs, (N,)."""
    return (images + epsilon * ascent(network, images, truth)).clamp(0, 1)


def bim(network: Network, images: Tensor, truth: Tensor, epsilon: float, steps: int = 5) -> Tensor:
    """As many equal steps of ε / steps, held within ε of the image after each (RUC, eqs. 23, 24)."""
    changed = images
    for _ in range(steps):
        changed = changed + epsilon / steps * ascent(network, changed, truth)
        changed = torch.clamp(changed, images - epsilon, images + epsilon).clamp(0, 1)
    return changed


def ascent(network: Network, images: Tensor, truth: Tensor) -> Tensor:
    """Sign of the gradient of the cross-entropy in the pixels.

    The gradient in an image's logits, softmax - one-hot, is scaled to a greatest part of 1, which no sign depends on: a
    network that is sure enough would else round it to 0, and seem safe.
    """
    images = images.detach().requires_grad_()
    with torch.enable_grad():
        logits = network(images)
    right = F.one_hot(truth, logits.shape[1]).bool()
    others = logits.detach().double().softmax(dim=1).masked_fill(right, 0)
    slope = torch.where(right, -others.sum(dim=1, keepdim=True), others)
    slope = slope / slope.abs().amax(dim=1, keepdim=True).clamp(min=1e-300)
    (gradient,) = torch.autograd.grad(logits, images, slope.to(logits))
    return gradient.sign()


def under_attack(
    network: Network, images: Tensor, truth: Tensor, epsilons: Sequence[float], batch: int = 250
) -> dict[str, list[float]]:
    """Per cent of uint8 images still right under each attack, at each ε; `truth` as in `fgsm`."""
    right = {name: [0] * len(epsilons) for name in ("fgsm", "bim")}
    for part, classes in zip(images.split(batch), truth.split(batch), strict=True):
        for place, epsilon in enumerate(epsilons):
            for name, attack in (("fgsm", fgsm), ("bim", bim)):
                with torch.no_grad():
                    found = network(attack(network, to_float(part), classes, epsilon)).argmax(dim=1)
                right[name][place] += int((found == classes).sum())
    return {name: [100 * n / len(images) for n in counts] for name, counts in right.items()}


def attack_curves(epsilons: Sequence[float], found: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Accuracy over ε, a panel for each attack, a curve for each network: name -> what `under_attack` gave."""
    figure, axes = new_figure((8.0, 3.4), 1, 2)
    for axis, attack in zip(axes, ("fgsm", "bim"), strict=True):
        for name, accuracy in found.items():
            axis.plot(epsilons, accuracy[attack], marker="o", label=name)
        axis.set_title(attack.upper())
        axis.set_xlabel("ε, pixels in [0, 1]")
        axis.set_ylabel("accuracy, %")
        axis.set_ylim(0, 100)
        axis.legend(frameon=False)
    return drawn(figure, "accuracy under attack")
