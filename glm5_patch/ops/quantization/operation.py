"""Rounding rows to fp8 with one scale each, as sglang and vLLM do before DeepGEMM's
``fp8_mqa_logits``: a power of two (UE8M0, ``scale_fmt="ue8m0"``)."""

from __future__ import annotations

from torch import Tensor

from ..fallback import compute
from ..needs import Call


def quantize(tensor: Tensor, rotate: bool = True) -> tuple[Tensor, Tensor]:
    """Round rows to e4m3.

    Args:
        tensor: [..., dim]; dim is a power of two.
        rotate: whether to multiply the rows by the Hadamard matrix first, in bf16.

    Returns:
        bf16 [..., dim], numbers that e4m3 has, and fp32 [...], the power of two by which each row
        is to be multiplied.
    """
    call = Call.of(tensor, dsa_indexer_head_dim=tensor.shape[-1])
    return compute("quantization", call, tensor, rotate)
