"""The keys of recorded queries, from their compressed frames."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..fallback import compute
from ..needs import Call
from .frame import Unpacked


def recorded_keys(frames: Sequence[Unpacked], wanted: Tensor, k: int, device) -> Tensor:
    """Decode the keys of some queries.

    Args:
        frames: of one layer; their rows count one after the other.
        wanted: int64 [n], on the CPU: which of these rows.
        k: keys of each query.
        device: where to decode, and to leave the keys.

    Returns:
        int32 [n, k], ascending.
    """
    call = Call(torch.device(device), torch.int32)
    return compute("recorded_keys", call, frames, wanted, k, device)


def upload(tensor: Tensor, device) -> Tensor:
    """A copy on a device. The host does not wait for a GPU, nor for a stream of it."""
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
