"""The processes of a run: torch.distributed's collectives, which end with a clear error where a process is gone."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class PeerError(RuntimeError):
    """Another process of the group has ended, or has not answered in time."""


class Group:
    """The processes that call `op` together. Without torch.distributed, or in a group of one, nothing is sent.

    Args:
        op: the public function, for messages.
        group: a process group; None: the default one, or this process alone where there is none.
        timeout: seconds that a collective may take.

    Attributes:
        rank, size: this process and how many there are.
        device: where the group's own messages travel from; rows must lie on such a device too.
        received: bytes of others' data that the collectives brought to this process, their own protocol not counted.
    """

    def __init__(self, op: str, group: dist.ProcessGroup | None = None, timeout: float = 300.0):
        self.op, self.received = op, 0
        self._group, self._timeout = group, datetime.timedelta(seconds=timeout)
        alone = group is None and not (dist.is_available() and dist.is_initialized())
        self.rank, self.size = (0, 1) if alone else (dist.get_rank(group), dist.get_world_size(group))
        on_gpu = not alone and dist.get_backend(group) == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    @classmethod
    def alone(cls, op: str) -> Group:
        """This process by itself, whatever group there is."""
        group = cls.__new__(cls)
        group.op, group.received, group.rank, group.size, group.device = op, 0, 0, 1, torch.device("cpu")
        return group

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, in place."""
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def max(self, tensor: Tensor) -> Tensor:
        """The maximum over processes, in place."""
        return self._reduce(tensor, dist.ReduceOp.MAX)

    def gather(self, tensor: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """Everyone's rows, in the order of ranks; sizes: how many each has, where that is known."""
        if self.size == 1:
            return tensor
        if sizes is None:
            counts = torch.zeros(self.size, dtype=torch.int64, device=tensor.device)
            counts[self.rank] = len(tensor)
            sizes = self.sum(counts).tolist()
        most = max(sizes)
        padded = tensor.new_zeros(most, *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in sizes]
        self._wait("all_gather", dist.all_gather, parts, padded)
        self.received += (self.size - 1) * _bytes(padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """What the process of rank `source` has, in place."""
        if self.size > 1:
            root = source if self._group is None else dist.get_global_rank(self._group, source)
            self._wait("broadcast", dist.broadcast, tensor, root)
            self.received += _bytes(tensor) * (source != self.rank)
        return tensor

    def exchange(self, tensor: Tensor, sent: Sequence[int], taken: Sequence[int] | None = None) -> Tensor:
        """Gives `sent[r]` of the rows, in order, to each rank r -> what all ranks gave to this one, in their order.

        taken: how many rows come from each, where that is known.
        """
        if self.size == 1:
            return tensor
        if taken is None:
            counts = torch.tensor(sent, device=tensor.device)
            taken = self.exchange(counts, [1] * self.size, [1] * self.size).tolist()
        result = tensor.new_empty(sum(taken), *tensor.shape[1:])
        self._wait("all_to_all", dist.all_to_all_single, result, tensor.contiguous(), list(taken), list(sent))
        own = taken[self.rank]
        self.received += _bytes(result[own:])
        return result

    @contextlib.contextmanager
    def arguments(self) -> Iterator[None]:
        """Arguments are checked inside: where one process refuses its own, all the others end with an error too."""
        try:
            yield
        except (TypeError, ValueError):
            self._refusals(1)
            raise
        if refused := self._refusals(0):
            raise ValueError(f"{self.op}: rank {refused[0]} has refused its arguments")

    def _refusals(self, mine: int) -> list[int]:
        flags = self.gather(torch.tensor([mine], device=self.device), [1] * self.size).tolist()
        return [rank for rank, flag in enumerate(flags) if flag]

    def agree(self, **facts: int) -> None:
        """Raises ValueError on every process where they do not all state the same facts."""
        stated = self.gather(torch.tensor([list(facts.values())], device=self.device), [1] * self.size)
        for name, values in zip(facts, stated.T.tolist(), strict=True):
            if len(set(values)) > 1:
                raise ValueError(f"{self.op}: {name} differs between processes: {', '.join(map(str, values))}")

    def starts(self, n_rows: int) -> list[int]:
        """Where each process's rows begin among all, and how many those are: size + 1 numbers."""
        counts = self.gather(torch.tensor([n_rows], device=self.device), [1] * self.size).tolist()
        return [0, *itertools.accumulate(counts)]

    def _reduce(self, tensor: Tensor, how: Any) -> Tensor:
        if self.size > 1:
            self._wait("all_reduce", dist.all_reduce, tensor, how)
            self.received += 2 * _bytes(tensor) * (self.size - 1) // self.size  # reduce-scatter, then all-gather
        return tensor

    def _wait(self, what: str, collective: Callable[..., Any], *arguments: Any) -> None:
        try:
            work = collective(*arguments, group=self._group, async_op=True)
            work.wait(self._timeout)
        except RuntimeError as error:
            raise PeerError(
                f"{self.op}: {what} failed on rank {self.rank} of {self.size}: another process has ended or has not "
                f"answered for {self._timeout.total_seconds():g} s ({str(error).splitlines()[0]})"
            ) from error


def checksum(*settings: object) -> int:
    """A number that tells settings apart, for `Group.agree`."""
    return zlib.crc32(repr(settings).encode())


def sizes_between(starts: Sequence[int]) -> list[int]:
    """How many rows each process has, from where they start."""
    return [after - before for before, after in itertools.pairwise(starts)]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
