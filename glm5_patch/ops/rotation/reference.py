"""Turning a part of each head by its position, with one tensor for each step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..registry import backend


class Rotation(NamedTuple):
    """By what the tokens' positions turn a tensor."""

    cos: Tensor
    """[s, rope], of the tensor's dtype, contiguous."""
    sin: Tensor
    """Likewise."""
    interleaved: bool
    """Pairs are the columns (0, 1), (2, 3), ... and not the two halves. What is turned comes in two
    halves either way."""


@backend("rotation", name="torch")
def rotate(tensor: Tensor, rotation: Rotation, first: int) -> Tensor:
    """See ``operation.rotate``."""
    tensor = tensor.flatten(2, 3)
    cos, sin = (part[:, None, None] for part in rotation[:2])  # [s, 1, 1, rope]
    widths = [first, cos.shape[-1], tensor.shape[-1] - first - cos.shape[-1]]
    before, turned, after = tensor.split(widths, dim=-1)
    if rotation.interleaved:
        turned = torch.cat([turned[..., 0::2], turned[..., 1::2]], dim=-1)
    left, right = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat([-right, left], dim=-1) * sin
    return torch.cat([before, turned, after], dim=-1)
