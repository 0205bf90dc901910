"""Which layers belong to multi-token prediction: told by where they are built.

megatron-core 0.16 numbers them after the decoder's layers, later releases from 1 again, so a
number tells nothing. Each of them runs its own indexer and shares with no other layer. One that is
applied several times may share the top-k of its first application with the later ones
(``index_share_for_mtp_iteration`` in config.json).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from .carrier import TopkCarrier

_building: ContextVar[Any] = ContextVar("glm5_patch_building_mtp", default=None)


class _Iterations:
    """The applications of one MTP layer in one forward."""

    def __init__(self, share: bool) -> None:
        self.share = share
        self.first: TopkCarrier | None = None
        self.count = 0


_iterations: ContextVar[_Iterations | None] = ContextVar("glm5_patch_mtp_iterations", default=None)


def is_repeated(config: Any) -> bool:
    """Whether one MTP layer is applied several times."""
    return bool(
        getattr(config, "mtp_use_repeated_layer", False) and (config.mtp_num_layers or 0) > 1
    )


def shares_iterations(config: Any) -> bool:
    """Whether one MTP layer is applied several times, and they share one top-k."""
    return is_repeated(config) and bool(
        getattr(config, "dsa_indexer_share_for_mtp_iteration", False)
    )


@contextmanager
def iterations(config: Any) -> Iterator[None]:
    """For one forward of an MTP block whose layer is applied several times: count, and let every
    iteration after the first reuse its top-k if they share it."""
    token = _iterations.set(_Iterations(shares_iterations(config)))
    try:
        yield
    finally:
        _iterations.reset(token)


def link_iteration(carrier: TopkCarrier) -> None:
    """Tell the carrier of an MTP layer which iteration it is, and where the first one's top-k is. A
    recompute, which runs outside the forward, keeps its carrier and so both."""
    carrier.is_of_mtp = True
    found = _iterations.get()
    if found is None:
        return
    if found.first is None:
        found.first = carrier
    if found.share:
        carrier.first_iteration = found.first
    carrier.iteration = found.count
    found.count += 1


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
