"""Rounding rows to fp8 in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import backend

LARGEST = 448.0
"""Of e4m3."""
SMALLEST_AMAX = 1e-4
"""What the largest number of a row counts as at least."""


@backend("quantization", name="torch")
@torch.no_grad()
def quantize(tensor: Tensor, rotate: bool) -> tuple[Tensor, Tensor]:
    """See ``operation.quantize``."""
    tensor = tensor.bfloat16()
    if rotate:
        tensor = hadamard(tensor)
    values = tensor.float()
    amax = values.abs().amax(-1).clamp_min(SMALLEST_AMAX)
    mantissa, exponent = torch.frexp(amax / LARGEST)  # mantissa in [0.5, 1)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    scale = torch.ldexp(torch.ones_like(amax), exponent.where(amax.isfinite(), 0))
    values = (values / scale[..., None]).clamp(-LARGEST, LARGEST)
    return values.to(torch.float8_e4m3fn).bfloat16(), scale


def hadamard(tensor: Tensor) -> Tensor:
    """Rows [..., dim] times the orthonormal Hadamard matrix (Sylvester's), computed in fp32; dim is
    a power of two."""
    dim, width = tensor.shape[-1], 1
    found = tensor.to(torch.float32, copy=True)
    spare = torch.empty_like(found)
    while width < dim:
        left, right = found.unflatten(-1, (-1, 2, width)).unbind(-2)
        sums, differences = spare.unflatten(-1, (-1, 2, width)).unbind(-2)
        torch.add(left, right, out=sums)
        torch.sub(left, right, out=differences)
        found, spare = spare, found
        width *= 2
    return (found * dim**-0.5).to(tensor.dtype)
