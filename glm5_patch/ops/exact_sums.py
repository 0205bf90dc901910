"""Sums that many programs add to in any order, with the same bits every time.

A sum of integers does not depend on the order of its terms, as a sum of rounded numbers does. So
each term becomes a multiple of a small unit, and is added by an atomic operation on 64 bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BITS = 60
"""No sum gets larger than 2 to this; two bits are left for what rounding adds to a bound."""
PAIR_BITS = 30
"""The same of one of two sums that share an integer."""


class ExactSums(NamedTuple):
    """Sums with one unit."""

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
        integers = torch.zeros(shape, dtype=torch.int64, device=bound.device)
        return cls(integers, _units(bound, BITS))

    def value(self) -> Tensor:
        """The sums, in fp32; not a number where the bound is not finite."""
        return (self.integers.double() / self.units.double()).float()


class ExactPairs(NamedTuple):
    """Two sums in each integer: with a unit for each row, 32 bits are enough. What the sum in the
    lower half carries over or borrows is known from its sign, and taken back at the end."""

    integers: Tensor
    """int64 [..., width / 2]: columns 2 i and 2 i + 1 in the lower and the upper half of i."""
    units: Tensor
    """fp32 [...]: how many units make one in this row. 0 where the bound is not finite."""

    @classmethod
    def zeros(cls, width: int, bound: Tensor) -> ExactPairs:
        """Nothing is added yet.

        Args:
            width: columns of a row, an even number.
            bound: fp32 [...]; no sum of the row, nor a part of one, gets larger.
        """
        shape = (*bound.shape, width // 2)
        integers = torch.zeros(shape, dtype=torch.int64, device=bound.device)
        return cls(integers, _units(bound, PAIR_BITS))

    def value(self) -> Tensor:
        """The sums, fp32 [..., width]; not numbers where the bound is not finite."""
        lower = self.integers.int()
        upper = ((self.integers - lower) >> 32).int()
        return torch.stack((lower, upper), -1).flatten(-2) / self.units[..., None]


def _units(bound: Tensor, bits: int) -> Tensor:
    """A power of two. fp32 has none above 2 to 127: a bound that asks for more counts as larger."""
    return torch.exp2((bits - bound.clamp_min(2.0 ** (bits - 126)).log2()).floor())
