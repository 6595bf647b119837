"""Sums of rows that are the same to the bit in any order: on any number of processes, from any device, piece by piece.

A float sum depends on its order, a sum of integers does not. So values become fixed-point numbers, with one quantum
per column, and are added up as int64. What that rounds away is at most 2⁻³⁷ of the column's largest value per row of
float32 data (fewer bits where more than 2²⁶ rows share the 62), 2⁻⁷³ of float64 data, which take two integers a value.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROWS_AT_ONCE = 1 << 16  # whole numbers of 36 bits, so many of them, add up without rounding in float64

_BITS = 36


class ExactSums:
    """Turns rows of C columns into fixed point and back.

    Args:
        bound: (C,) float64, no value of a column is larger in magnitude.
        n_rows: how many rows may be added up in all.
        dtype: of the data: float32 rows take one integer per value, float64 rows two.
    """

    def __init__(self, bound: Tensor, n_rows: int, dtype: torch.dtype):
        self._bits = min(_BITS, 62 - math.ceil(math.log2(n_rows + 1)))
        self._limbs = 2 if dtype == torch.float64 else 1
        exponent = torch.frexp(bound).exponent.clamp(min=-900)
        self._scale = torch.ldexp(torch.ones_like(bound), self._bits - exponent)  # a power of two: multiplies exactly

    def zeros(self, n_groups: int) -> Tensor:
        """(L, K, C) int64: the sums of K groups without a row."""
        size = (self._limbs, n_groups, len(self._scale))
        return torch.zeros(size, dtype=torch.int64, device=self._scale.device)

    def add(self, sums: Tensor, values: Tensor, groups: Tensor, sign: int = 1) -> None:
        """Adds the rows of values (n, C) float64 to their groups (n,), or takes them away; n ≤ ROWS_AT_ONCE."""
        index = groups[:, None].expand_as(values)
        values = values * self._scale
        for i, limb in enumerate(sums):
            whole = values.round()
            part = torch.zeros(limb.shape, dtype=torch.float64, device=limb.device).scatter_add_(0, index, whole)
            limb.add_(part.long(), alpha=sign)
            if i + 1 < self._limbs:
                values = (values - whole) * 2.0**self._bits

    def value(self, sums: Tensor) -> Tensor:
        """(K, C) float64."""
        return (
            torch.stack([limb.double() * 2.0 ** (-self._bits * i) for i, limb in enumerate(sums)]).sum(0) / self._scale
        )
