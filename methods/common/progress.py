"""A progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from methods.common import parallel


class Progress:
    """Counts the optimiser's steps of a run on stderr.

    On a terminal it is one bar over the whole run; elsewhere (a file, a pipe, a notebook's log) one line per epoch.

    Args:
        total: steps of the whole run.
        done: steps of it that an earlier process has made.
    """

    def __init__(self, total: int, done: int = 0):
        self._total, self._first, self._done, self._started = total, done, done, time.monotonic()
        self._bar = None
        if sys.stderr.isatty() and parallel.is_first():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)

    def step(self, what: str) -> None:
        """One more step, as part of `what`."""
        self._done += 1
        if self._bar is not None:
            self._bar.set_description(what, refresh=False)
            self._bar.update()

    def epoch(self, title: str, figures: dict[str, str]) -> None:
        """An epoch is over; `figures` are what a person wants to see of it."""
        if self._bar is not None:
            self._bar.set_postfix(figures)
        if self._bar is not None or not parallel.is_first():
            return
        text = "  ".join(f"{name} {value}" for name, value in figures.items())
        elapsed = time.monotonic() - self._started
        share = (self._done - self._first) / max(self._total - self._first, 1)
        left = elapsed / share - elapsed if share > 0 else 0.0
        print(f"{title}  {text}  ({_clock(elapsed)}, {_clock(left)} left)", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def in_short(metrics: Mapping[str, Any], formats: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """What `Progress.epoch` shows; `formats` maps a metric to its short name and to how its value is written."""
    return {name: form.format(metrics[key]) for key, (name, form) in formats.items() if key in metrics}


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
