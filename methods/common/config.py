"""Settings: one frozen dataclass per paper, presets by name, the command line made from both."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from methods.common import parallel
from methods.common.errors import UserError


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings that every paper's trainer has."""

    preset: str = "digits"
    """Where all other defaults come from. Without it: the preset named like --data, else the first one."""
    data: str = "digits"
    """Images: `digits` (nothing to download), `usps`, `mnist`, `fashion-mnist`, `cifar10`, `cifar100`, `cifar100-20`
    (its superclasses), `stl10`, `mini-imagenet`, `npz:FILE` (x_train, y_train, x_test, y_test; the last two may be
    missing, and classes -1 are unknown), or `folder:DIR` (image files of any size, and labels.csv: file,label)."""
    data_dir: str = field(default_factory=lambda: os.environ.get("FASTCLUST_DATA", "data"))
    """Folder of the sets that have a name: NAME.npz, or torchvision's files. Environment: FASTCLUST_DATA."""
    download: bool = False
    """Have torchvision download a named set that is not there."""
    image_size: int = 32
    """Side in pixels to which the images of a folder are brought; other data keep theirs."""
    subset: int = 0
    """Train on that many of the training images, every class in proportion; 0 takes all."""
    subset_test: int = 0
    """Take that many of the test images, every class in proportion; 0 takes all."""
    splits: int = 1
    """Run that many seeds, `seed` being the first, and tell mean and deviation."""
    vary: str = ""
    """Run several values of another setting, `NAME=A,B,…`, each for all seeds."""
    labels: int = 50
    """Labelled training images, spread evenly over the classes; 0 takes every label the data has."""
    seed: int = 0
    """Fixes the split, the labelled images, the network's start and every draw after it."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, …; `auto` takes CUDA where it is usable."""
    threads: int = 0
    """CPU threads of torch; 0 leaves it to torch. Sums, and so the last bits of a result, depend on it."""
    runs: str = "runs"
    """Folder in which the run makes its own."""


ConfigT = TypeVar("ConfigT", bound=RunConfig)


def parse(presets: Mapping[str, ConfigT], argv: list[str], method: str, about: str = "") -> tuple[ConfigT, Path | None]:
    """Read the command line; `about` says in its help what the method is.

    Returns the settings, and the folder of the run to go on with if `--resume FOLDER` was given. A resumed run keeps
    the settings it was started with, so no other option may stand beside `--resume`.
    """
    resume = _option(argv, "--resume")
    if resume is not None:
        if len(argv) > (1 if argv[0].startswith("--resume=") else 2):
            raise UserError("--resume goes on with the settings of that run; give it without any other option")
        folder = Path(resume)
        return load_config(folder, type(next(iter(presets.values()))), method), folder

    name = _option(argv, "--preset")
    if name is None:
        kind = (_option(argv, "--data") or "").partition(":")[0]
        name = kind if kind in presets else next(iter(presets))
    if name not in presets:
        raise UserError(f"--preset {name} is unknown; there are {', '.join(presets)}")

    import tyro

    preset = presets[name]
    description = f"{about}\n\nPresets: {', '.join(presets)}. Go on with a run cut short: --resume FOLDER."
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            config = tyro.cli(
                type(preset),
                default=preset,
                args=argv,
                prog=f"python -m methods.{method}",
                description=description,
            )
    except SystemExit as end:
        if not end.code:  # --help
            raise
        raise UserError(_first_words(said.getvalue())) from None
    return config, None


def launch(method: str, presets: Mapping[str, ConfigT], train: Callable[[ConfigT, Path | None], object]) -> int:
    """Run a trainer from the command line and return its exit code: 2 after a user's error, 130 after Ctrl-C."""
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    try:
        with parallel.joined():
            config, resume = parse(presets, sys.argv[1:], method, sys.modules[train.__module__].__doc__ or "")
            if config.splits == 1 and not config.vary:
                train(config, resume)
            else:
                from methods.common.series import run_series  # which needs RunConfig

                run_series(method, config, train, resume)
    except UserError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"{method}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def require_above_zero(config: RunConfig, *names: str) -> None:
    """Refuse settings of these names that are 0 or less."""
    for name in names:
        if getattr(config, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)} must be above 0")


def require_not_negative(config: RunConfig, *names: str) -> None:
    """Refuse settings of these names that are below 0."""
    for name in names:
        if getattr(config, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)} must not be below 0")


def save_config(config: RunConfig) -> str:
    """The settings as JSON text."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def load_config(folder: Path, config_type: type[ConfigT], method: str) -> ConfigT:
    """The settings of a run of `method`, read from its folder."""
    path = folder / "config.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{folder} is no run's folder: {path.name}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path} is not valid JSON") from None
    if stored.get("method") != method:
        raise UserError(f"{folder} holds a run of {stored.get('method')}, not of {method}")
    try:
        return config_type(**stored["settings"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} was written by another version: {error}") from None


def _first_words(box: str) -> str:
    """What stands in the frame that tyro draws around an error, up to its first rule, as one line."""
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    end = next((index for index, line in enumerate(lines) if line.startswith(("─", "╰"))), len(lines))
    return " ".join(lines[:end])


def _option(argv: list[str], name: str) -> str | None:
    """The value of an option that has to be known before the command line can be read as a whole."""
    for position, argument in enumerate(argv):
        if argument.startswith(f"{name}="):
            return argument.split("=", 1)[1]
        if argument == name and position + 1 < len(argv):
            return argv[position + 1]
    return None
