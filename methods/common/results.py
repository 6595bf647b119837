"""What a classifier's run leaves at its end: predictions.csv, report.html, result.json, some lines on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from methods.common.data import ImageData
from methods.common.report import Section, classification_sections, curves, embedded, page
from methods.common.run import Run
from methods.common.training import error_rate


def write_results(
    run: Run,
    what: str,
    data: ImageData,
    given: Tensor,
    *,
    probabilities: Callable[[Tensor], Tensor],
    features: Callable[[Tensor], Tensor],
    panels: Mapping[str, Mapping[str, str]],
) -> None:
    """Judge a trained classifier by the images that it was given no class of, and write all that the run leaves.

    Args:
        what: the trainer's name and the circumstances, for the title.
        given: int64 (N,), the classes that the trainer was given for the training images, -1 where none.
        probabilities: class probabilities (n, C) of uint8 images (n, C', H, W).
        features: features (n, D) of them.
        panels: the report's curves, title -> metric -> the name shown.
    """
    train, test = probabilities(data.x_train).cpu(), probabilities(data.x_test).cpu()
    device, data, given = given.device, data.to(torch.device("cpu")), given.cpu()
    run.write_predictions(data, given, train, test)

    held_out = data.held_out(given)
    judged = test if len(test) else train[given < 0]
    some = features(held_out.images[embedded(len(judged))].to(device)).cpu()
    n_labelled = int((given >= 0).sum())
    seconds = sum(metrics["seconds"] for metrics in run.history)
    figures, facts, outcome = (
        {"seconds": seconds},
        {"images": f"{len(train) + len(test)}", "labels": f"{n_labelled}"},
        "",
    )
    if held_out.known:
        kind = held_out.what.split()[0]  # test, unlabelled
        error = error_rate(judged.argmax(dim=1), held_out.truth)
        figures = {f"{kind}_error": error, **figures}
        facts[f"{kind} error"] = f"{error:.2f} %"
        outcome = f"{kind} error {error:.2f} %, "
    facts |= {
        "mean confidence": f"{100 * judged.amax(dim=1).mean():.1f} %",
        "epochs": f"{len(run.history)}",
        "time": f"{seconds:.0f} s",
    }
    title = f"{what} on {data.name}, {n_labelled} labels"
    sections = [
        Section("Training", "What each epoch left; errors in per cent.", curves(run.history, panels)),
        *classification_sections(held_out, data.class_names, judged, some),
    ]
    run.write_text("report.html", page(title, facts, sections))
    run.finish(figures)  # last: a run with result.json is over
    print(f"{title}: {outcome}{seconds:.0f} s")
    print(f"  what the run left  {run.path}/report.html, predictions.csv, metrics.jsonl")
    print(f"  predict new images python -m methods.predict {run.path} IMAGE...")
