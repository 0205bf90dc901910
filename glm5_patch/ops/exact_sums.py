"""Sums that many programs add to in any order, with the same bits every time.

A sum of integers does not depend on the order of its terms, as a sum of rounded numbers does. So
each term becomes a multiple of a small unit, in 64 bits, and is added by an atomic operation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BITS = 60
"""No sum gets larger than 2 to this; two bits are left for what rounding adds to a bound."""
SMALLEST = 2.0 ** (BITS - 126)
"""A bound below it counts as this: fp32 has no larger power of two than 2 to 127."""


class ExactSums(NamedTuple):
    """Sums that are being made."""

    integers: Tensor
    """int64: the sums, in units."""
    units: Tensor
    """fp32 []: how many units make one. 0 where the bound is not finite."""

    @classmethod
    def zeros(cls, shape: torch.Size, bound: Tensor) -> ExactSums:
        """Nothing is added yet.

        Args:
            shape: of the sums.
            bound: fp32 []; none of them, nor a part of one, gets larger.
        """
        exponent = (BITS - bound.clamp_min(SMALLEST).log2()).floor()
        integers = torch.zeros(shape, dtype=torch.int64, device=bound.device)
        return cls(integers, torch.exp2(exponent))

    def value(self) -> Tensor:
        """The sums, in fp32; not a number where the bound is not finite."""
        return (self.integers.double() / self.units.double()).float()
