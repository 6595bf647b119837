"""A series of runs from one command: several seeds, several values of one setting, and the table of what came out."""

from __future__ import annotations

import csv
import io
import json
import statistics
import sys
import typing
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path

from methods.common import parallel
from methods.common.config import RunConfig
from methods.common.errors import UserError
from methods.common.run import start_folder, write_text

Member = tuple[str, int, RunConfig]  # value of the varied setting ("" where none is), seed, settings


def run_series(
    method: str, config: RunConfig, train: Callable[[RunConfig, Path | None], object], resume: Path | None = None
) -> Path:
    """Train every run of a series that is not finished yet, in a folder of the series.

    Returns the folder: a run's folder for each, results.csv (a row per run) and summary.txt (the printed table).
    """
    members = list(_members(config))
    folder = resume or start_folder(method, config, f"{config.data.partition(':')[0]}-series")
    try:
        results = [
            (value, seed, _finished(replace(member, runs=str(folder)), train)) for value, seed, member in members
        ]
    except KeyboardInterrupt:
        if parallel.is_first():
            print(f"or with the whole series:\n  python -m methods.{method} --resume {folder}", file=sys.stderr)
        raise
    name = config.vary.partition("=")[0]
    table = summary(f"{method} on {config.data}, {len(results)} runs", results, name)
    if parallel.is_first():
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([name or "setting", "seed", *results[0][2]])
        writer.writerows([value, seed, *figures.values()] for value, seed, figures in results)
        write_text(folder / "results.csv", text.getvalue())
        write_text(folder / "summary.txt", table)
        print(table, end="")
    return folder


def summary(title: str, results: list[tuple[str, int, dict[str, float]]], name: str) -> str:
    """Mean ± standard deviation (of a sample) of every figure, a line for each value of the varied setting."""
    lines = [title]
    for value in dict.fromkeys(value for value, _, _ in results):
        runs = [figures for other, _, figures in results if other == value]
        parts = []
        for figure in runs[0]:
            numbers = [figures[figure] for figures in runs]
            spread = f" ± {statistics.stdev(numbers):.2f}" if len(numbers) > 1 else ""
            parts.append(f"{figure} {statistics.mean(numbers):.2f}{spread}")
        lines.append(f"  {f'{name}={value}' if name else f'{len(runs)} seeds':24} {'   '.join(parts)}")
    return "\n".join(lines) + "\n"


def _members(config: RunConfig) -> Iterator[Member]:
    if config.splits < 1:
        raise UserError(f"--splits {config.splits} must be above 0")
    name, _, values = config.vary.partition("=")
    changes = {text: {name: _parsed(config, name, text)} for text in values.split(",")} if config.vary else {"": {}}
    for seed in range(config.seed, config.seed + config.splits):  # all values of a seed first: they are to be compared
        for text, changed in changes.items():
            yield text, seed, replace(config, splits=1, vary="", seed=seed, **changed)


def _parsed(config: RunConfig, name: str, text: str) -> object:
    """The value of a setting from its text on the command line."""
    allowed = {field.name for field in fields(config)} - {"seed", "splits", "vary", "runs", "preset"}
    if name not in allowed:
        raise UserError(f"--vary {config.vary}: there is no setting {name} to vary; write NAME=A,B,…")
    kind = type(getattr(config, name))
    choices = typing.get_args(typing.get_type_hints(type(config))[name]) or (("True", "False") if kind is bool else ())
    if choices and text not in choices:
        raise UserError(f"--vary {config.vary}: {name} can be {', '.join(choices)}, not {text}")
    try:
        return text == "True" if kind is bool else kind(text)
    except ValueError:
        raise UserError(f"--vary {config.vary}: {text} is no {kind.__name__}") from None


def _finished(config: RunConfig, train: Callable[[RunConfig, Path | None], object]) -> dict[str, float]:
    """The last figures of one run of the series, which is begun or gone on with where it is not over."""
    run = parallel.from_first(_find(config))
    if run is None or not (run / "result.json").exists():
        train(config, run)
        run = parallel.from_first(_find(config))
    return json.loads((run / "result.json").read_text(encoding="utf-8"))


def _find(config: RunConfig) -> Path | None:
    """The folder of the run with these settings in the folder of the series, if it was begun."""
    wanted = json.loads(json.dumps(asdict(config)))
    for path in sorted(Path(config.runs).glob("*/config.json")):
        if json.loads(path.read_text(encoding="utf-8"))["settings"] | {"runs": config.runs} == wanted:
            return path.parent
    return None
