"""Turning a part of each head by its position (RoPE, arXiv 2104.09864)."""

from __future__ import annotations

from torch import Tensor

from ..fallback import compute
from ..needs import Call
from .reference import Rotation


def rotate(tensor: Tensor, rotation: Rotation, first: int) -> Tensor:
    """Turn some columns of each head, and keep the others.

    Args:
        tensor: [s, b, g, n, width], of any strides but that of its last dimension.
        rotation: by what.
        first: the column where the turned ones begin.

    Returns:
        A new tensor [s, b, g * n, width]. Each product and each sum is rounded to its dtype.
    """
    call = Call.of(tensor, qk_pos_emb_head_dim=rotation.cos.shape[-1])
    return compute("rotation", call, tensor, rotation, first)
