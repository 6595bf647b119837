"""A file that a long run goes on from."""

from __future__ import annotations

import os
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Checkpoint:
    """The state of a run, written whole or not at all.

    Args:
        op: the public function, for messages.
        path: of the file; None: nothing is kept.
        settings: names and values that a run must share with the one it goes on from.
    """

    def __init__(self, op: str, path: str | os.PathLike[str] | None, settings: dict[str, Any]):
        self._op, self._settings = op, settings
        self._path = None if path is None else Path(path)

    def load(self, device: torch.device) -> dict[str, Any] | None:
        """The state last saved, tensors on `device`; None where there is none.

        Raises:
            ValueError: the file is not a checkpoint, or one of a run with other settings.
        """
        if self._path is None or not self._path.exists():
            return None
        try:
            kept = torch.load(self._path, map_location=device, weights_only=True)
            settings, state = kept["settings"], kept["state"]
        except Exception as error:
            raise ValueError(f"{self._op}: {self._path} is not a checkpoint: {str(error).splitlines()[0]}") from None
        for name, value in self._settings.items():
            if settings.get(name) != value:
                raise ValueError(
                    f"{self._op}: {self._path} is of another run: {name} was {settings.get(name)}, is {value}"
                )
        result: dict[str, Any] = state
        return result

    def save(self, state: dict[str, Any]) -> None:
        """Replaces what was saved before."""
        if self._path is None:
            return
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            with open(temporary, "wb") as file:
                torch.save({"settings": self._settings, "state": state}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._path)
        finally:
            with suppress(FileNotFoundError):
                temporary.unlink()


def fingerprint(x: Tensor | None) -> int:
    """A number that tells one tensor's values from another's; 0 for none."""
    return 0 if x is None else zlib.crc32(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
