"""Which rows are whose."""

from __future__ import annotations

import torch.distributed as dist

BLOCK_ROWS = 16384
"""Rows that are worked on at a time. Results are the same to the bit where the same rows form a block."""


def shard(
    n_rows: int, *, rank: int | None = None, size: int | None = None, block_rows: int = BLOCK_ROWS
) -> tuple[int, int]:
    """The first row of this process and the one after its last: whole blocks, as even as can be.

    Args:
        n_rows: of all processes together.
        rank, size: this process and how many there are; by default those of the default group, else 0 and 1.
        block_rows: what the functions are given.
    """
    grouped = dist.is_available() and dist.is_initialized()
    rank = (dist.get_rank() if grouped else 0) if rank is None else rank
    size = (dist.get_world_size() if grouped else 1) if size is None else size
    if not 0 <= rank < size or n_rows < 0 or block_rows < 1:
        raise ValueError(f"shard: no rank {rank} of {size} for {n_rows} rows in blocks of {block_rows}")
    blocks = -(-n_rows // block_rows)
    begin, end = (min(blocks * r // size * block_rows, n_rows) for r in (rank, rank + 1))
    return begin, end
