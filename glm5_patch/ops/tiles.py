"""How much of an operation a Triton program works on, by what the device has.

Each choice compiles within the shared memory of its devices at GLM-5's shapes; see
``tests/ops/test_devices.py``.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from .needs import Capability


class Products(NamedTuple):
    """Of a product of two matrices."""

    rows: int
    columns: int
    step: int
    """Of the dimension that is added up."""
    stages: int
    warps: int


class Tiles(NamedTuple):
    """Of the operations whose tiles depend on the device."""

    forward_heads: int
    """Most attention heads of a program; all of them share the keys that it gathers."""
    forward_keys: int
    forward_stages: int
    """How many tiles of keys are on their way at once."""
    backward_heads: int
    target_heads: int
    """Of the target of the indexer's loss."""
    projection: Products


_SMALL_PRODUCTS = Products(rows=64, columns=128, step=64, stages=2, warps=4)
AMPERE = Tiles(64, 64, 2, 32, 64, _SMALL_PRODUCTS)
"""163 KiB of shared memory: A100."""
HOPPER = AMPERE._replace(projection=_SMALL_PRODUCTS._replace(stages=3))
"""227 KiB."""
BLACKWELL = AMPERE._replace(forward_stages=1)
"""227 KiB, but operands of a product of 64 heads lie there too: B200."""
SMALL = Tiles(32, 32, 2, 16, 16, _SMALL_PRODUCTS)
"""99 KiB: L40S, RTX."""
SMALL_BELOW = 160 << 10
"""Bytes of shared memory that ``AMPERE`` takes at most."""


def choose(capability: Capability, shared_memory: int) -> Tiles:
    """By compute capability, and the bytes of shared memory that a program may take."""
    if shared_memory < SMALL_BELOW:
        return SMALL
    return {9: HOPPER, 10: BLACKWELL}.get(capability[0], AMPERE)


@functools.cache
def of_device(device: torch.device) -> Tiles:
    """Of a GPU; of another device, which Triton's interpreter works for, ``AMPERE``."""
    if device.type != "cuda":
        return AMPERE
    properties = torch.cuda.get_device_properties(device)
    shared_memory = getattr(properties, "shared_memory_per_block_optin", SMALL_BELOW)
    return choose(torch.cuda.get_device_capability(device), shared_memory)
