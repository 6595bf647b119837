"""The folder a run leaves behind: settings, metrics, checkpoint, TensorBoard events, predictions."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from methods.common import parallel
from methods.common.config import RunConfig
from methods.common.data import ImageData
from methods.common.errors import UserError


class Run:
    """One run's folder, as a context: Ctrl-C inside it tells how to go on.

    Everything is written whole or not at all. The checkpoint holds the history of metrics too, so that what a resumed
    run has logged and what it has learnt can never disagree.

    Attributes:
        path: the folder.
        history: one dict of metrics per finished epoch.
    """

    def __init__(self, method: str, config: RunConfig, data: ImageData, resume: Path | None = None):
        self.method, self._fingerprint = method, data.fingerprint()
        self.history: list[dict[str, Any]] = []
        self._events = None
        if resume is not None:
            self.path = resume
            if parallel.is_first():
                remove_parts(resume)
            return
        self.path = start_folder(method, config, data.name)
        if data.left_out:
            self.write_table("left_out.csv", ["file", "reason"], data.left_out)

    # ---------------------------------------------------------------------------------------------- metrics, checkpoint

    def save(self, metrics: dict[str, Any], **state: Any) -> None:
        """End an epoch: keep its metrics, and the state to go on from (tensors, numbers, plain containers of them)."""
        self.history.append(metrics)
        if not parallel.is_first():
            return
        checkpoint = {"state": state, "history": self.history, "data": self._fingerprint, "rng": rng_state()}
        write_whole(self.path / "checkpoint.pt", lambda file: torch.save(checkpoint, file))
        self._write_history()
        self._add_events(metrics)

    def restore(self) -> dict[str, Any] | None:
        """The state last saved, with the random number generators set back to it; None where nothing was saved yet."""
        checkpoint = load_checkpoint(self.path)
        if checkpoint is None:
            return None
        if checkpoint["data"] != self._fingerprint:
            raise UserError(f"{self.path} was trained on other data than is there now")
        self.history = checkpoint["history"]
        set_rng_state(checkpoint["rng"])
        self._write_history()
        return checkpoint["state"]

    def _write_history(self) -> None:
        self.write_text("metrics.jsonl", "".join(json.dumps(metrics) + "\n" for metrics in self.history))

    def _add_events(self, metrics: dict[str, Any]) -> None:
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter

            # Events of an epoch that a killed process did not finish are hidden by purge_step.
            self._events = SummaryWriter(str(self.path), purge_step=metrics["epoch"])
        for name, value in metrics.items():
            if isinstance(value, int | float) and name != "epoch":
                self._events.add_scalar(name, value, metrics["epoch"])

    # ------------------------------------------------------------------------------------------------------ other files

    def write_text(self, name: str, text: str) -> Path:
        path = self.path / name
        return write_text(path, text) if parallel.is_first() else path

    def write_predictions(self, data: ImageData, given: Tensor, train: Tensor, test: Tensor) -> Path:
        """Write predictions.csv: a row for each image, called by its file or by its place in the set.

        Args:
            given: int64 (N,), classes the trainer was given for the training images, -1 where none.
            train, test: class probabilities of the training images (N, C) and of the test images.
        """
        table = []
        for split, probability, classes in (("train", train, given), ("test", test, torch.full((len(test),), -1))):
            names = data.files if data.files and split == "train" else range(len(probability))
            confidence, label = probability.max(dim=1)
            rows = zip(names, label.tolist(), confidence.tolist(), classes.tolist(), strict=True)
            for name, predicted, certain, known in rows:
                known_name = data.class_names[known] if known >= 0 else ""
                table.append([split, name, data.class_names[predicted], f"{certain:.4f}", known_name])
        return self.write_table("predictions.csv", ["split", "image", "label", "confidence", "given_label"], table)

    def write_table(self, name: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
        """Write a CSV file."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([header, *rows])
        return self.write_text(name, text.getvalue())

    def finish(self, figures: dict[str, float]) -> None:
        """The run is over: write result.json, its last figures by name (`test_error`, `seconds`, …)."""
        self.write_text("result.json", json.dumps(figures, indent=2) + "\n")

    # ---------------------------------------------------------------------------------------------------------- context

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._events is not None:
            self._events.close()
        if kind is KeyboardInterrupt and parallel.is_first():
            kept = f"{len(self.history)} epochs are saved" if self.history else "no epoch was finished yet"
            print(
                f"\nstopped; {kept}. Go on with:\n  python -m methods.{self.method} --resume {self.path}",
                file=sys.stderr,
            )


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """A run's checkpoint, tensors on the CPU; None where there is none."""
    return load_whole(folder / "checkpoint.pt")


def load_whole(path: Path) -> dict[str, Any] | None:
    """What `torch.save` wrote there, tensors on the CPU; None where there is nothing."""
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> Path:
    """Write a file so that a kill at any moment leaves the old one or the new one, beside it at most a hidden part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
    return path


def remove_parts(folder: Path) -> None:
    """Remove what `write_whole` had not finished when its process was killed."""
    for part in folder.glob(".*.[0-9]*"):
        part.unlink(missing_ok=True)


def rng_state() -> dict[str, Any]:
    """The state of every random number generator a trainer may draw from."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        "python": random.getstate(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Set all generators back to what `rng_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    random.setstate(state["python"])


def write_text(path: Path, text: str) -> Path:
    return write_whole(path, lambda file: file.write(text.encode()))


def start_folder(method: str, config: RunConfig, name: str) -> Path:
    """Make a folder of its own for a run, or a series of runs, with config.json in it."""
    if not parallel.is_first():
        return parallel.from_first(None)
    path = _new_folder(Path(config.runs), f"{method}-{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    settings = {"method": method, "settings": asdict(config), "torch": torch.__version__, "argv": sys.argv[1:]}
    write_text(path / "config.json", json.dumps(settings, indent=2) + "\n")
    return parallel.from_first(path)


def _new_folder(parent: Path, name: str) -> Path:
    for attempt in range(1, 1000):
        path = parent / (name if attempt == 1 else f"{name}-{attempt}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"--runs {parent}: {error.strerror}") from None
        return path
    raise UserError(f"--runs {parent}: there are a thousand runs called {name}")
