"""report.html: one page, nothing to load from elsewhere, that a person would rather look at than read."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from methods.common.data import HeldOut

_SHOWN, _EMBEDDED = 24, 1000  # images in a gallery, images in an embedding

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1040px; margin: 2em auto; padding: 0 1em; color: #222; }
h1 { font-size: 1.5em; margin-bottom: 0; } h2 { font-size: 1.1em; margin: 2em 0 .3em; }
p { margin: .3em 0; color: #555; } img { max-width: 100%; }
dl { display: flex; flex-wrap: wrap; gap: .5em 2.5em; } dt { color: #777; font-size: .85em; }
dd { margin: 0; font-size: 1.4em; }
.gallery { display: flex; flex-wrap: wrap; gap: 6px; } figure { margin: 0; width: 78px; text-align: center; }
figure img { width: 72px; image-rendering: pixelated; } figcaption { font-size: .72em; color: #555; line-height: 1.2;
  white-space: pre-line; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Section:
    """A part of the page: a heading, a sentence that says how to read it, and pictures as HTML."""

    heading: str
    caption: str
    body: str


def page(title: str, facts: Mapping[str, str], sections: Sequence[Section]) -> str:
    """The page as HTML text; `facts` are the few figures that stand at its head."""
    parts = [f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>']
    parts.append(f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1><dl>")
    parts += [f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in facts.items()]
    parts.append("</dl>")
    for section in sections:
        parts.append(f"<h2>{html.escape(section.heading)}</h2><p>{html.escape(section.caption)}</p>{section.body}")
    return "\n".join([*parts, "</html>\n"])


def classification_sections(
    held_out: HeldOut, class_names: Sequence[str], probability: Tensor, features: Tensor | None
) -> list[Section]:
    """What a classifier makes of images that it was given no class of, whether their truth is known or not.

    Confusion matrix and worst mistakes where it is known, else how often each class is predicted; embedding; most and
    least certain images.

    Args:
        held_out: on the CPU.
        probability: (N, C) of those images.
        features: (M, D) of the M images `embedded(N)`; None where the page shows them in another way.
    """
    what, truth, names = held_out.what, held_out.truth, [name[:12] for name in class_names]
    confidence, predicted = probability.max(dim=1)
    order = confidence.argsort(descending=True, stable=True)

    def caption_of(i: int) -> str:
        caption = f"{names[predicted[i]]} {100 * confidence[i]:.0f} %"
        if held_out.known and truth[i] != predicted[i]:
            caption += f", is {names[truth[i]]}"
        return f"{caption}\n{held_out.files[i]}" if held_out.files else caption

    def shown(indices: Tensor) -> str:
        return gallery(held_out.images[indices], [caption_of(i) for i in indices.tolist()])

    sections = [
        Section(f"Least certain {what}", "Predicted class and confidence.", shown(order.flip(0)[:_SHOWN])),
        Section(f"Most certain {what}", "Predicted class and confidence.", shown(order[:_SHOWN])),
    ]
    if features is not None:
        some = embedded(len(truth))
        classes, coloured_by = (truth, "true") if held_out.known else (predicted, "predicted")
        caption = f"{len(some)} {what} by t-SNE of the network's features, coloured by {coloured_by} class."
        sections.insert(0, Section("Features", caption, embedding({"": features}, classes[some], names)))
    if not held_out.known:
        counts = Section("Predicted classes", f"How many of the {what} got each class.", bars(predicted, names))
        return [counts, *sections]
    caption = f"{len(truth)} {what}; a row is a true class."
    sections.insert(0, Section("Confusion matrix", caption, confusion(truth, predicted, names)))
    wrong = order[(predicted != truth)[order]]
    if len(wrong):
        caption = f"The most certain of the {len(wrong)} mistakes among {what}: predicted and true class."
        sections.insert(1 if features is None else 2, Section("Worst mistakes", caption, shown(wrong[:_SHOWN])))
    return sections


def curves(
    history: Sequence[Mapping[str, Any]],
    panels: Mapping[str, Mapping[str, str]],
    over: str = "epoch",
    what: str = "",
    *,
    from_zero: bool = True,
) -> str:
    """Curves over epochs, a panel per title; each panel maps a metric's name to the name shown for it.

    `over` is the metric to draw them over, and `what` the name shown for it; `from_zero` has every axis begin at 0.
    """
    shown = {
        title: {metric: name for metric, name in lines.items() if any(metric in row for row in history)}
        for title, lines in panels.items()
    }
    shown = {title: lines for title, lines in shown.items() if lines}
    columns = min(len(shown), 3)
    rows_of_panels = -(-len(shown) // columns)
    figure, axes = new_figure((3.5 * columns, 3.0 * rows_of_panels), rows_of_panels, columns)
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    for axis, (title, lines) in zip(axes, shown.items(), strict=False):
        for metric, name in lines.items():
            rows = [row for row in history if row.get(metric) is not None]
            axis.plot([row[over] for row in rows], [row[metric] for row in rows], label=name)
        axis.set_title(title)
        axis.set_xlabel(what or over)
        if from_zero:
            axis.set_ylim(bottom=0)
        axis.legend(frameon=False)
    return drawn(figure, f"curves over {what or over}")


def confusion(truth: Tensor, predicted: Tensor, class_names: Sequence[str]) -> str:
    """Confusion matrix, rows: true classes. Counts are written in where there is room."""
    n_classes = len(class_names)
    counts = np.zeros((n_classes, n_classes), dtype=int)
    np.add.at(counts, (truth.numpy(), predicted.numpy()), 1)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, (axis,) = new_figure((5.5, 5.5))
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    if n_classes <= 20:
        axis.set_xticks(range(n_classes), class_names, rotation=90 if max(map(len, class_names)) > 2 else 0)
        axis.set_yticks(range(n_classes), class_names)
        for row, column in np.argwhere(counts):
            colour = "white" if share[row, column] > 0.5 else "black"
            axis.text(column, row, counts[row, column], ha="center", va="center", color=colour, fontsize=8)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    return drawn(figure, "confusion matrix")


def bars(classes: Tensor, class_names: Sequence[str]) -> str:
    """How many images have each class."""
    counts = torch.bincount(classes, minlength=len(class_names))
    figure, (axis,) = new_figure((min(2 + 0.45 * len(class_names), 9.0), 2.8))
    axis.bar(range(len(class_names)), counts.numpy())
    if len(class_names) <= 20:
        axis.set_xticks(range(len(class_names)), class_names, rotation=90 if max(map(len, class_names)) > 2 else 0)
    axis.set_ylabel("images")
    return drawn(figure, "images per class")


def embedded(n_images: int) -> Tensor:
    """Indices of the images that an embedding shows: all, or so many of them at even distances."""
    return torch.linspace(0, n_images - 1, min(n_images, _EMBEDDED)).long()


def embedding(features: Mapping[str, Tensor], classes: Tensor, class_names: Sequence[str]) -> str:
    """Features (N, D) laid out in two dimensions by t-SNE, coloured by class (N,); a panel for each title."""
    from sklearn.manifold import TSNE

    perplexity = min(30.0, max((len(classes) - 1) / 3, 1.0))
    figure, axes = new_figure((7.5, 6.0) if len(features) == 1 else (4.6 * len(features) + 0.8, 4.4), 1, len(features))
    for axis, (title, rows) in zip(axes, features.items(), strict=True):
        layout = TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(rows.numpy())
        points = axis.scatter(
            *layout.T, c=classes.numpy(), cmap="tab10" if len(class_names) <= 10 else "nipy_spectral", s=9
        )
        axis.set_title(title)
        axis.set_xticks([])
        axis.set_yticks([])
    if len(class_names) <= 20:
        handles, _ = points.legend_elements(num=range(len(class_names)))
        axes[-1].legend(handles, class_names, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return drawn(figure, "features in two dimensions")


def gallery(images: Tensor, titles: Sequence[str]) -> str:
    """Images uint8 (N, C, H, W) side by side, each with a title under it."""
    from PIL import Image

    parts = []
    for image, title in zip(images, titles, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()).save(buffer, format="png")
        parts.append(f"<figure>{_img(buffer, title)}<figcaption>{html.escape(title)}</figcaption></figure>")
    return f'<div class="gallery">{"".join(parts)}</div>'


def new_figure(size: tuple[float, float], rows: int = 1, columns: int = 1) -> tuple[Any, list[Any]]:
    """A figure outside pyplot, so that nothing has to be closed and no display is looked for; size in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def drawn(figure: Any, what: str) -> str:
    """The figure as an <img>."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return _img(buffer, what)


def _img(png: io.BytesIO, what: str) -> str:
    data = base64.b64encode(png.getvalue()).decode()
    return f'<img alt="{html.escape(what)}" src="data:image/png;base64,{data}">'
