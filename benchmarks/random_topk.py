"""Random keys for queries to attend to."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 4096
"""Queries whose keys are drawn at a time."""


def random_topk(length: int, k: int, draw: torch.Generator) -> Tensor:
    """Distinct random causal keys, int32 [1, length, k]: one of each of k equal parts, or all that
    a query sees, then -1."""
    topk = torch.empty((1, length, k), dtype=torch.int32, device=draw.device)
    part = torch.arange(k, device=draw.device)
    for begin in range(0, length, ROWS):
        row = torch.arange(begin, min(begin + ROWS, length), device=draw.device)[:, None]
        low, high = part * (row + 1) // k, (part + 1) * (row + 1) // k
        share = torch.rand(low.shape, generator=draw, device=draw.device, dtype=torch.float64)
        chosen = low + (share * (high - low)).long()
        everything = torch.where(part <= row, part, -1)
        topk[0, begin : begin + ROWS] = torch.where(row < k, everything, chosen).int()
    return topk
