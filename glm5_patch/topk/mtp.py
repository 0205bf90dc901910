"""Which layers belong to multi-token prediction: told by where they are built.

megatron-core 0.16 numbers them after the decoder's layers, later releases from 1 again, so a
number tells nothing. Each of them runs its own indexer and shares with no other layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_building: ContextVar[bool] = ContextVar("glm5_patch_building_mtp", default=False)


@contextmanager
def building_mtp() -> Iterator[None]:
    """While a depth of multi-token prediction builds its layers."""
    token = _building.set(True)
    try:
        yield
    finally:
        _building.reset(token)


def is_mtp_layer(layer_number: int, num_layers: int) -> bool:
    """Whether the layer that is being built belongs to multi-token prediction.

    Args:
        layer_number: the number that the host gives it.
        num_layers: of the decoder; no layer of it has a higher number.
    """
    return _building.get() or layer_number > num_layers
