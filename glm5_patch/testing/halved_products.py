"""How far a computation is from itself by rounding alone."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class HalvedProducts(TorchDispatchMode):
    """Every matrix product is the sum of two, over half of the summed dimension each, as a split of
    two sums it."""

    def __init__(self, *products: torch._ops.OpOverload) -> None:
        """Of these operations, of which ``mm`` and ``bmm`` of aten are possible."""
        super().__init__()
        self._products = products

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        half = args[0].shape[-1] // 2 if function in self._products else 0
        if not half:
            return function(*args, **(kwargs or {}))
        left, right = args
        first = function(left[..., :half], right[..., :half, :])
        return first + function(left[..., half:], right[..., half:, :])
