"""Rows that are read block by block: in memory, in a file, or from a function that yields chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from . import ops

Chunks = Callable[[], Iterable[Any]]
"""Called once per pass: yields (n_i, D) arrays or tensors, the same rows in the same order each time."""


class Block(NamedTuple):
    """Some consecutive rows."""

    begin: int  # the number of the first
    x: Tensor  # (n, D) float32 or float64


class ArrayRows:
    """The rows of a tensor, an array or a `numpy.memmap`, of which no more than two blocks are in memory at a time."""

    def __init__(self, op: str, array: Any, block_rows: int, device: torch.device | None = None):
        self._op, self._array, self.block_rows, self._device = op, array, block_rows, device
        if len(array.shape) != 2 or array.shape[1] == 0:
            raise ValueError(f"{op}: x must be (N, D), got {tuple(array.shape)}")
        self.n_rows, self.n_features = (int(size) for size in array.shape)
        first = self._read(slice(0, 0))
        self.dtype, self.device = first.dtype, first.device

    def blocks(self, begin: int = 0) -> Iterator[Block]:
        """All rows from `begin`, a multiple of the block size, on."""
        starts = range(begin, self.n_rows, self.block_rows)
        blocks = (Block(start, self._read(slice(start, start + self.block_rows))) for start in starts)
        return blocks if isinstance(self._array, Tensor) else read_ahead(blocks)

    def take(self, rows: Tensor) -> Tensor:
        """Rows by their numbers, ascending."""
        return self._read(rows.to(self._array.device) if isinstance(self._array, Tensor) else rows.numpy())

    def _read(self, which: Any) -> Tensor:
        part = self._array[which]
        return _as_float(self._op, part if isinstance(part, Tensor) else np.array(part), self._device)


class ChunkRows:
    """The rows that a function yields in chunks of any size, cut into blocks. It is run through once to count them."""

    def __init__(self, op: str, chunks: Chunks, block_rows: int, device: torch.device | None = None):
        self._op, self._chunks, self.block_rows, self._device = op, chunks, block_rows, device
        self.n_rows = 0
        for chunk in self._read():
            if self.n_rows == 0:
                self.n_features, self.dtype, self.device = chunk.shape[1], chunk.dtype, chunk.device
            if (chunk.shape[1], chunk.dtype) != (self.n_features, self.dtype):
                raise ValueError(
                    f"{op}: x yields chunks that differ: {self.n_features} features of {self.dtype}, "
                    f"then {chunk.shape[1]} of {chunk.dtype}"
                )
            self.n_rows += len(chunk)
        if self.n_rows == 0:
            raise ValueError(f"{op}: x yields no rows")

    def blocks(self, begin: int = 0) -> Iterator[Block]:
        """All rows from `begin`, a multiple of the block size, on; those before are read and dropped."""
        return read_ahead(block for block in self._cut() if block.begin >= begin)

    def take(self, rows: Tensor) -> Tensor:
        """Rows by their numbers, ascending: one pass."""
        found = [x[rows[(rows >= begin) & (rows < begin + len(x))] - begin] for begin, x in self.blocks()]
        return torch.cat(found)

    def _read(self) -> Iterator[Tensor]:
        for chunk in self._chunks():
            x = _as_float(self._op, chunk, self._device)
            if x.dim() != 2 or x.shape[1] == 0:
                raise ValueError(f"{self._op}: x must yield chunks (n, D), got {tuple(x.shape)}")
            yield x

    def _cut(self) -> Iterator[Block]:
        begin, held, count = 0, list[Tensor](), 0
        for chunk in self._read():
            held.append(chunk)
            count += len(chunk)
            if count < self.block_rows:
                continue
            *whole, rest = torch.split(torch.cat(held), self.block_rows)
            if len(rest) == self.block_rows:
                whole, rest = [*whole, rest], rest[:0]
            for x in whole:
                yield Block(begin, x)
                begin += len(x)
            held, count = [rest], len(rest)
        if begin + count != self.n_rows:
            raise ValueError(f"{self._op}: x yielded {self.n_rows} rows at first and {begin + count} now")
        if count:
            yield Block(begin, torch.cat(held))


Rows = ArrayRows | ChunkRows


def rows_of(op: str, x: Any, block_rows: int, device: torch.device) -> Rows:
    """The rows of an array or of a function that yields chunks, to be worked on on `device`."""
    if callable(x) and not isinstance(x, Tensor):
        return ChunkRows(op, x, block_rows, device)
    if not isinstance(x, Tensor | np.ndarray):
        raise TypeError(f"{op}: x must be a tensor, an array or a function that yields chunks, got {type(x).__name__}")
    return ArrayRows(op, x, block_rows, device)


def require_finite(op: str, x: Tensor, begin: int) -> None:
    """Raises where a row of x is not finite, by its number among all rows; the first of x has the number `begin`."""
    unfit = ~torch.isfinite(x).all(dim=1)
    if unfit.any():
        raise ValueError(f"{op}: x holds rows that are not finite, one of them at {begin + int(unfit.nonzero()[0])}")


def _as_float(op: str, rows: Tensor | npt.ArrayLike, device: torch.device | None) -> Tensor:
    """Rows as a tensor on `device` of a dtype that the kernels take."""
    if not isinstance(rows, Tensor):
        array = np.asarray(rows)
        if array.dtype.kind != "f":
            raise TypeError(f"{op}: x must have a floating-point dtype, got {array.dtype}")
        rows = torch.from_numpy(array if array.flags.writeable and array.flags.c_contiguous else array.copy(order="C"))
    return ops.float_tensor(op, "x", rows if device is None else rows.to(device))


T = TypeVar("T")


def read_ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items, the next one being read while the last is worked on."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, iterator, end)
        while (item := coming.result()) is not end:
            coming = reader.submit(next, iterator, end)
            yield item  # type: ignore[misc]
