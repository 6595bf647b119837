"""Lloyd's iteration over rows that are read in blocks, by one process or by many: steps 1-5 of csrc/kmeans/kmeans.h.

What is summed over rows is summed exactly (`ExactSums`), and a block is the same rows wherever it is read, so that
centroids and labels do not depend on how many processes share the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _kmeans, ops
from ._blocks import Rows
from ._group import Group
from ._kmeans import KMeansResult
from ._sums import ROWS_AT_ONCE, ExactSums


@dataclass(frozen=True)
class Options:
    """What `kmeans` was asked for."""

    n_clusters: int
    init: str | Tensor
    max_iter: int
    tol: float
    spherical: bool
    precision: str
    seed: int
    init_size: int
    block_rows: int

    def __post_init__(self) -> None:
        if self.n_clusters < 1:
            raise ValueError(f"kmeans: n_clusters must be at least 1, got {self.n_clusters}")
        if not 1 <= self.block_rows <= ROWS_AT_ONCE:
            raise ValueError(f"kmeans: block_rows must lie in [1, {ROWS_AT_ONCE}], got {self.block_rows}")
        if self.init_size < self.n_clusters:
            raise ValueError(f"kmeans: init_size must be at least n_clusters {self.n_clusters}, got {self.init_size}")
        if self.precision not in ("exact", "fast"):
            raise ValueError(f"kmeans: precision must be 'exact' or 'fast', got {self.precision!r}")
        if self.max_iter < 1:
            raise ValueError(f"kmeans: max_iter must be at least 1, got {self.max_iter}")
        if not self.tol >= 0:
            raise ValueError(f"kmeans: tol must not be negative, got {self.tol}")
        if isinstance(self.init, str) and self.init not in ("k-means++", "random"):
            raise ValueError(f"kmeans: init must be 'k-means++', 'random' or a tensor, got {self.init!r}")


def checked_weight(weight: Any, rows: Rows) -> Tensor | None:
    """sample_weight (n,) of these rows, of their dtype and on their device."""
    if weight is None:
        return None
    given = ops.float_tensor("kmeans", "sample_weight", torch.as_tensor(weight)).to(rows.device, rows.dtype)
    if given.shape != (rows.n_rows,):
        raise ValueError(f"kmeans: sample_weight must be ({rows.n_rows},), got {tuple(given.shape)}")
    if not (torch.isfinite(given) & (given >= 0)).all():
        raise ValueError("kmeans: sample_weight holds values that are negative or not finite")
    return given


def checked_start(init: str | Tensor, rows: Rows, n_clusters: int) -> None:
    """Raises where `init` is a tensor of another shape than (K, D), or not finite."""
    if isinstance(init, str):
        return
    if ops.float_tensor("kmeans", "init", init).shape != (n_clusters, rows.n_features):
        raise ValueError(f"kmeans: init must be ({n_clusters}, {rows.n_features}), got {tuple(init.shape)}")
    if not torch.isfinite(init).all():
        raise ValueError("kmeans: init holds rows that are not finite")


class Lloyd:
    """One run. Its `state` after each pass is all that is needed to go on from there.

    Args:
        rows: those of this process.
        weight: (n,) of theirs, or None.
        first: the number of the first among all processes' rows.
        total: how many those are.
        tell: called with the rows done, block by block.
    """

    def __init__(
        self,
        rows: Rows,
        weight: Tensor | None,
        options: Options,
        group: Group,
        first: int,
        total: int,
        tell: Callable[[int], object] = lambda _: None,
    ):
        self._rows, self._weight, self._options, self._group = rows, weight, options, group
        self._first, self._total, self._tell = first, total, tell
        self.state: dict[str, Any] = {"phase": "scan"}
        self._distances = torch.zeros(rows.n_rows, dtype=rows.dtype, device=rows.device)

    def passes(self) -> Iterator[str]:
        """Runs; yields the name of each pass over the rows when it is done and `state` has been brought up."""
        while (phase := self.state["phase"]) != "done":
            {"scan": self._scan, "iterate": self._iterate, "assign": self._assign}[phase]()
            yield phase

    def result(self) -> KMeansResult:
        """Of a run that is done."""
        state = self.state
        inertia = torch.tensor(state["inertia"], dtype=self._rows.dtype, device=self._rows.device)
        n_iter = torch.tensor(state["n_iter"], device=self._rows.device)
        return KMeansResult(state["centroids"], state["labels"].long(), inertia, n_iter)

    # ------------------------------------------------------------------------------------------------------------ start

    def _scan(self) -> None:
        """Checks the rows, finds the columns' largest values, and chooses the first centroids."""
        largest = torch.zeros(self._rows.n_features, dtype=torch.float64, device=self._rows.device)
        bad = [self._total, 0]  # the first row that is not fit, and how many
        for begin, x in self._rows.blocks():
            extent = torch.maximum(x.amax(dim=0), -x.amin(dim=0))
            if self._options.spherical or not torch.isfinite(extent).all():
                unfit = ~torch.isfinite(x).all(dim=1)
                if self._options.spherical:
                    unfit |= ~x.any(dim=1)
                if count := int(unfit.sum()):
                    bad = [min(bad[0], self._first + begin + int(unfit.nonzero()[0])), bad[1] + count]
            largest = torch.maximum(largest, extent.double().nan_to_num(0, 0))
            self._tell(len(x))
        self._refuse(bad)
        if self._options.spherical:
            largest.fill_(1.0)
        heaviest = torch.ones(1, dtype=torch.float64, device=self._rows.device)
        if self._weight is not None:
            heaviest = torch.cat([self._weight.double(), heaviest.new_zeros(1)]).amax().view(1)
        bound = self._group.max(torch.cat([largest, heaviest]))
        if bound[-1] == 0:
            raise ValueError("kmeans: sample_weight is zero for every row")
        centroids = self._first_centroids()
        n_clusters = self._options.n_clusters
        bound = torch.cat([bound[:-1] * bound[-1], bound[-1:], bound[:-1]])
        self.state = {
            "phase": "iterate",
            "n_iter": 0,
            "bound": bound,
            "limit": -1.0,
            "centroids": centroids,
            "labels": torch.full((self._rows.n_rows,), -1, dtype=torch.int32, device=self._rows.device),
            "sums": self._exact(bound).zeros(n_clusters),
        }

    def _refuse(self, bad: list[int]) -> None:
        """Raises on every process where one of them holds rows that cannot be clustered."""
        device = self._rows.device
        first = -int(self._group.max(torch.tensor([-bad[0]], device=device)))
        if count := int(self._group.sum(torch.tensor([bad[1]], device=device))):
            what = "finite and unlike zero" if self._options.spherical else "finite"
            raise ValueError(f"kmeans: x holds {count} rows that are not {what}, first at {first}")

    def _first_centroids(self) -> Tensor:
        """(K, D): those given, or rows drawn from a sample that all processes see."""
        options, device = self._options, self._rows.device
        if isinstance(options.init, Tensor):
            centroids = options.init.to(device, self._rows.dtype)
            return _unit(centroids) if options.spherical else centroids
        sampled = torch.arange(self._total)
        generator = torch.Generator().manual_seed(options.seed)
        if self._total > options.init_size:
            sampled = torch.randint(self._total, (options.init_size,), generator=generator)
            sampled = torch.unique(sampled)
        mine = sampled[(sampled >= self._first) & (sampled < self._first + self._rows.n_rows)] - self._first
        x = self._rows.take(mine).to(device)
        x = self._group.gather(_unit(x) if options.spherical else x)
        weight = None if self._weight is None else self._group.gather(self._weight[mine.to(device)])
        # Drawn on the CPU: the same on every process and every device.
        start = _kmeans.first_centroids(
            x[None].cpu(), None if weight is None else weight[None].cpu(), options.n_clusters, options.init, 1,
            torch.Generator().manual_seed(options.seed),
        )  # fmt: skip
        return start[0, 0].to(device)

    def _exact(self, bound: Tensor) -> ExactSums:
        """Sums of weight times row, and of the weight."""
        n_features = self._rows.n_features
        return ExactSums(bound[: n_features + 1], self._total, self._rows.dtype)

    # ----------------------------------------------------------------------------------------------------------- passes

    def _label(self, block: Any, centroids: Tensor) -> tuple[Tensor, Tensor, slice]:
        """One block's rows as they are clustered, their labels, and where they lie; keeps their distances."""
        x = _unit(block.x) if self._options.spherical else block.x
        labels, squared = (
            out[0] for out in ops.kmeans_assign(x[None], centroids[None], self._options.precision == "exact")
        )
        where = slice(block.begin, block.begin + len(x))
        self._distances[where] = squared
        self._tell(len(x))
        return x, labels, where

    def _iterate(self) -> None:
        state, options = self.state, self._options
        centroids, sums, kept = state["centroids"], state["sums"], state["labels"]
        exact = self._exact(state["bound"])
        moments = _Moments(state["bound"][-self._rows.n_features :], self._total)
        wants_moments = options.tol > 0 and state["limit"] < 0
        changed = 0
        for block in self._rows.blocks():
            x, labels, where = self._label(block, centroids)
            before = kept[where].long()
            moved = (labels != before).nonzero()[:, 0]
            if len(moved):
                changed += len(moved)
                values = self._weighted(x[moved], moved + block.begin)
                exact.add(sums, values, labels[moved])
                if state["n_iter"] > 0:
                    exact.add(sums, values, before[moved], sign=-1)
                kept[where] = labels.int()
            if wants_moments:
                moments.add(x)

        count = torch.tensor([changed], device=sums.device)
        everyone = self._group.sum(torch.cat([sums.flatten(), count]))
        if wants_moments:
            state["limit"] = options.tol * moments.mean_variance(self._group)
        state["n_iter"] += 1
        if state["n_iter"] > 1 and int(everyone[-1]) == 0:
            state["phase"] = "done"
            state["inertia"] = self._inertia()
            return
        moved_centroids = self._update(centroids, exact.value(everyone[:-1].view(sums.shape)))
        shift = float((moved_centroids.double() - centroids.double()).square().sum())
        state["centroids"] = moved_centroids
        if shift <= max(state["limit"], 0.0) or state["n_iter"] == options.max_iter:
            state["phase"] = "assign"

    def _assign(self) -> None:
        for block in self._rows.blocks():
            _, labels, where = self._label(block, self.state["centroids"])
            self.state["labels"][where] = labels.int()
        self.state["phase"] = "done"
        self.state["inertia"] = self._inertia()

    def _weighted(self, x: Tensor, rows: Tensor) -> Tensor:
        """(n, D + 1) float64: weight times row, and the weight."""
        values = torch.ones(len(x), x.shape[1] + 1, dtype=torch.float64, device=x.device)
        values[:, :-1] = x
        return values if self._weight is None else values.mul_(self._weight[rows].double()[:, None])

    def _update(self, centroids: Tensor, sums: Tensor) -> Tensor:
        total, mass = sums[:, :-1], sums[:, -1]
        divisor = torch.linalg.vector_norm(total, dim=1) if self._options.spherical else mass
        divides = (mass > 0) & (divisor > 0)
        mean = total / torch.where(divides, divisor, 1.0)[:, None]
        moved = torch.where(divides[:, None], mean, centroids.double()).to(centroids.dtype)
        if len(empty := (mass == 0).nonzero()[:, 0]):
            rows = self._farthest(int(mass.argmax()), len(empty))
            moved[empty[: len(rows)]] = rows
        return moved

    def _farthest(self, cluster: int, count: int) -> Tensor:
        """(≤ count, D) rows of the cluster, farthest from its centroid first, the lowest of equals, none at 0."""
        taken = (self.state["labels"] == cluster) & (self._distances > 0)
        if self._weight is not None:
            taken &= self._weight > 0
        rows = taken.nonzero()[:, 0]
        best = self._distances[rows].argsort(descending=True, stable=True)[:count]
        rows, back = rows[best].sort()
        x = self._rows.take(rows.cpu()).to(self._distances)[back.argsort()]
        x = self._group.gather(_unit(x) if self._options.spherical else x)
        distances = self._group.gather(self._distances[rows][back.argsort()])
        return x[distances.argsort(descending=True, stable=True)[:count]]

    def _inertia(self) -> float:
        """Σ w · squared distance, in float64: blocks in order, then all of them by an exact sum."""
        sums = []
        for begin in range(0, self._rows.n_rows, self._rows.block_rows):
            block = slice(begin, begin + self._rows.block_rows)
            squared = self._distances[block].double()
            sums.append((squared if self._weight is None else squared * self._weight[block].double()).sum())
        blocks = torch.stack(sums) if sums else self._distances.new_zeros(0, dtype=torch.float64)
        inertia = math.fsum(self._group.gather(blocks).tolist())
        if not math.isfinite(inertia):
            raise ValueError(f"kmeans: x is too large, squared distances overflow {self._distances.dtype}")
        return inertia


class _Moments:
    """The mean over columns of the variance over rows, from exact sums."""

    def __init__(self, bound: Tensor, n_rows: int):
        self._n_rows = n_rows
        self._exact = ExactSums(torch.cat([bound, bound.square()]), n_rows, torch.float64)
        self._sums = self._exact.zeros(1)

    def add(self, x: Tensor) -> None:
        x = x.double()
        nothing = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        self._exact.add(self._sums, torch.cat([x, x.square()], dim=1), nothing)

    def mean_variance(self, group: Group) -> float:
        mean, square = (self._exact.value(group.sum(self._sums))[0] / self._n_rows).chunk(2)
        return float((square - mean.square()).mean().clamp(min=0))


def _unit(x: Tensor) -> Tensor:
    unit: Tensor = x / torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return unit
