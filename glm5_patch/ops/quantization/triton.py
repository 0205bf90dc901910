"""Rounding rows to fp8 in Triton: one kernel reads and writes the tensor once. The kernel is
imported inside the functions: it needs triton, this record of it does not."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from ..needs import Width, of_triton
from ..registry import backend
from .reference import LARGEST, SMALLEST_AMAX

NUMBERS = 4096
"""Of one program."""


def load() -> None:
    importlib.import_module(".triton_kernels", __package__)


@backend(
    "quantization",
    name="triton",
    rank=1,
    needs=of_triton({"dsa_indexer_head_dim": Width(power_of_two=True, at_least=2)}),
    load=load,
)
@torch.no_grad()
def quantize(tensor: Tensor, rotate: bool) -> tuple[Tensor, Tensor]:
    """See ``operation.quantize``."""
    from . import triton_kernels as kernels

    tensor = tensor.contiguous()
    *shape, dim = tensor.shape
    values = torch.empty_like(tensor, dtype=torch.bfloat16)
    scales = torch.empty(shape, dtype=torch.float32, device=tensor.device)
    rows = max(1, NUMBERS // dim)
    kernels.quantize[(kernels.cdiv(scales.numel(), rows),)](
        tensor, values, scales, scales.numel(), dim**-0.5, LARGEST, SMALLEST_AMAX,
        ROWS=rows, DIM=dim, STEPS=(dim.bit_length() - 1) * rotate, num_warps=4,
    )  # fmt: skip
    return values, scales
