"""Which layers belong to multi-token prediction: told by where they are built.

megatron-core 0.16 numbers them after the decoder's layers, later releases from 1 again, so a
number tells nothing. Each of them runs its own indexer and shares with no other layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_building: ContextVar[Any] = ContextVar("glm5_patch_building_mtp", default=None)


@contextmanager
def building_mtp(depth: Any) -> Iterator[None]:
    """While a depth of multi-token prediction builds its layers.

    Args:
        depth: the host's ``MultiTokenPredictionLayer``. Its ``layer_number`` is the depth, from 1,
            which it has before it builds what is inside.
    """
    token = _building.set(depth)
    try:
        yield
    finally:
        _building.reset(token)


def mtp_depth(layer_number: int, num_layers: int) -> int | None:
    """The depth, from 1, that the layer being built belongs to; None of a decoder layer.

    Args:
        layer_number: the number that the host gives it.
        num_layers: of the decoder; no layer of it has a higher number.
    """
    depth = _building.get()
    if depth is not None:
        return depth.layer_number
    return layer_number - num_layers if layer_number > num_layers else None
