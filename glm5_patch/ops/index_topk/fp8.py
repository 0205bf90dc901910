"""The index scores in the arithmetic in which sglang and vLLM serve GLM-5: DeepGEMM's
``fp8_mqa_logits``, https://github.com/deepseek-ai/DeepGEMM.

Queries and keys are rotated by a Hadamard matrix in bf16 and rounded to e4m3, with one scale for
each token (and head) that is a power of two (UE8M0, ``scale_fmt="ue8m0"``). A product of two such
numbers is exact in fp32, and a power of two can be multiplied in before without another rounding.
So every backend of the index scores computes these scores, from rounded inputs in bf16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import IndexerInputs

LARGEST = 448.0
"""Of e4m3."""
SMALLEST_AMAX = 1e-4
"""What the largest number of a token counts as at least."""


def fp8_inputs(inputs: IndexerInputs, scale: float, rotate: bool = True) -> IndexerInputs:
    """What index scores with a scale of 1 are made of.

    Args:
        inputs: of all queries and keys.
        scale: of the products of queries and keys; it goes into the weights, as in serving.
        rotate: whether to apply the Hadamard matrix; inputs may be rotated already.

    Returns:
        Queries and keys that are e4m3 numbers times a power of two for the keys, in bf16; and
        weights times the scales of the queries.
    """
    query, query_scale = quantize(inputs.query, rotate)
    key, key_scale = quantize(inputs.key, rotate)
    return IndexerInputs(
        query.bfloat16(),
        (key.float() * key_scale[..., None]).bfloat16(),
        inputs.weights * query_scale * scale,
    )


def quantize(tensor: Tensor, rotate: bool = True) -> tuple[Tensor, Tensor]:
    """[..., dim] -> the same in float8_e4m3fn, and fp32 [...], a power of two for each row."""
    tensor = tensor.bfloat16()
    if rotate:
        tensor = hadamard(tensor)
    values = tensor.float()
    amax = values.abs().amax(-1).clamp_min(SMALLEST_AMAX)
    mantissa, exponent = torch.frexp(amax / LARGEST)  # mantissa in [0.5, 1)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    scale = torch.ldexp(torch.ones_like(amax), exponent)
    values = (values / scale[..., None]).clamp(-LARGEST, LARGEST)
    return values.to(torch.float8_e4m3fn), scale


def hadamard(tensor: Tensor) -> Tensor:
    """Rows [..., dim] times the orthonormal Hadamard matrix (Sylvester's), computed in fp32; dim is
    a power of two."""
    dim, found = tensor.shape[-1], tensor.float()
    width = 1
    while width < dim:
        left, right = found.unflatten(-1, (-1, 2, width)).unbind(-2)
        found = torch.stack([left + right, left - right], -2).flatten(-3)
        width *= 2
    return (found * dim**-0.5).to(tensor.dtype)
