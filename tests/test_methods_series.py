"""A series of runs: every value and seed once, gone on with where it stopped, and the table of what came out."""

from __future__ import annotations

import csv
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch

from methods.common.config import RunConfig
from methods.common.data import ImageData
from methods.common.errors import UserError
from methods.common.run import Run
from methods.common.series import run_series


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    kind: Literal["plain", "better"] = "plain"
    size: int = 3
    fast: bool = False


class Trainer:
    """Trains nothing; its error follows from the settings. Stops as by Ctrl-C where `stop_at` says."""

    def __init__(self) -> None:
        self.trained: list[tuple[str, int]] = []
        self.stop_at: tuple[str, int] | None = None

    def __call__(self, config: Config, resume: Path | None) -> None:
        x = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
        data = ImageData("set", x, torch.tensor([0, 1]), x, torch.tensor([0, 1]), ("a", "b"))
        with Run("paper", config, data, resume) as run:
            if (config.kind, config.seed) == self.stop_at:
                raise KeyboardInterrupt
            self.trained.append((config.kind, config.seed))
            run.finish({"test_error": config.seed + (10.0 if config.kind == "plain" else 0.0), "seconds": 1.0})


def test_every_value_and_seed_is_run_and_summed_up(tmp_path: Path, capsys) -> None:
    trainer = Trainer()
    config = Config(runs=str(tmp_path), seed=4, splits=3, vary="kind=better,plain")
    folder = run_series("paper", config, trainer)
    assert trainer.trained == [(kind, seed) for seed in (4, 5, 6) for kind in ("better", "plain")]
    said = capsys.readouterr().out
    assert said == (folder / "summary.txt").read_text()
    assert "kind=better" in said
    assert f"test_error 5.00 ± {statistics.stdev([4, 5, 6]):.2f}" in said
    assert "test_error 15.00 ± 1.00" in said
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert [(row["kind"], row["seed"], float(row["test_error"])) for row in rows][1] == ("plain", "4", 14.0)


def test_a_series_cut_short_runs_only_what_is_missing(tmp_path: Path, capsys) -> None:
    trainer = Trainer()
    trainer.stop_at = ("plain", 2)
    config = Config(runs=str(tmp_path / "runs"), splits=4)
    with pytest.raises(KeyboardInterrupt):
        run_series("paper", config, trainer)
    (folder,) = (tmp_path / "runs").iterdir()
    assert f"python -m methods.paper --resume {folder}" in capsys.readouterr().err
    trainer.stop_at = None
    moved = folder.rename(tmp_path / "moved")
    run_series("paper", config, trainer, moved)
    assert trainer.trained == [("plain", seed) for seed in range(4)]
    assert sum(path.is_dir() for path in moved.iterdir()) == 4, "the run that had begun was begun again"


def test_one_seed_has_no_deviation(tmp_path: Path, capsys) -> None:
    run_series("paper", Config(runs=str(tmp_path), vary="fast=False,True"), Trainer())
    said = capsys.readouterr().out
    assert "fast=True" in said
    assert "±" not in said


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"splits": 0}, "--splits 0 must be above 0"),
        ({"vary": "colour=red"}, "there is no setting colour"),
        ({"vary": "seed=1,2"}, "there is no setting seed to vary"),
        ({"vary": "size=3,big"}, "big is no int"),
        ({"vary": "kind=plain,best"}, "kind can be plain, better, not best"),
        ({"vary": "fast=yes"}, "fast can be True, False, not yes"),
    ],
)
def test_a_series_that_cannot_be(settings: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        run_series("paper", Config(runs=str(tmp_path / "runs"), **settings), Trainer())
    assert not (tmp_path / "runs").exists()
