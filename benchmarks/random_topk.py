"""Random keys for queries to attend to."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 4096
"""Queries whose keys are drawn at a time."""
NEIGHBOURS = 64
"""Queries after which keys are not kept, a divisor of ``ROWS``."""


def random_topk(length: int, k: int, draw: torch.Generator, kept: float = 0.0) -> Tensor:
    """Distinct random causal keys, ascending, int32 [1, length, k]: one of each of k equal parts,
    or all that a query sees, then -1.

    Args:
        length, k: sizes.
        draw: on the device where the keys are wanted.
        kept: the share of its keys that a query has from the one before. The others are drawn
            again, and some are equal by chance: one in n where a query sees n * k keys.
    """
    topk = torch.empty((1, length, k), dtype=torch.int32, device=draw.device)
    part = torch.arange(k, device=draw.device)
    like = dict(generator=draw, device=draw.device)
    for begin in range(0, length, ROWS):
        row = torch.arange(begin, min(begin + ROWS, length), device=draw.device)[:, None]
        # A kept key must lie in the same part for all neighbours, and be seen by the first.
        seen = (row - row % NEIGHBOURS if kept else row).clamp_min(k - 1) + 1
        low, high = part * seen // k, (part + 1) * seen // k
        share = torch.rand(low.shape, dtype=torch.float64, **like)
        if kept:
            new = (torch.rand(low.shape, **like) >= kept) | (row % NEIGHBOURS == 0)
            drawn = torch.where(new, row - begin, 0).cummax(0).values
            share = share.gather(0, drawn)
        chosen = low + (share * (high - low)).long()
        everything = torch.where(part <= row, part, -1)
        topk[0, begin : begin + ROWS] = torch.where(row < k, everything, chosen).int()
    return topk
