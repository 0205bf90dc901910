"""Turning a part of each head by its position in Triton: one kernel reads and writes the tensor
once. The kernel is imported inside the functions: it needs triton, this record of it does not."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from ..needs import Width, of_triton
from ..registry import backend
from .reference import Rotation

MOST_HEADS = 16
"""Of one program."""


def load() -> None:
    importlib.import_module(".triton_kernels", __package__)


@backend(
    "rotation",
    name="triton",
    rank=1,
    needs=of_triton({"qk_pos_emb_head_dim": Width(power_of_two=True, at_least=2)}),
    load=load,
)
def rotate(tensor: Tensor, rotation: Rotation, first: int) -> Tensor:
    """See ``operation.rotate``."""
    return _Rotate.apply(tensor, rotation, first)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, rotation, first):
        ctx.rotation, ctx.first, ctx.heads = rotation, first, tensor.shape[2:4]
        return _launch(tensor, rotation, first, backward=False)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.unflatten(2, ctx.heads)
        grad = _launch(grad, ctx.rotation, ctx.first, backward=True)
        return grad.unflatten(2, ctx.heads), None, None


def _launch(tensor: Tensor, rotation: Rotation, first: int, backward: bool) -> Tensor:
    from . import triton_kernels as kernels

    if tensor.stride(-1) != 1:
        tensor = tensor.contiguous()
    s, b, groups, n, width = tensor.shape
    out = tensor.new_empty((s, b, groups * n, width))
    rope = rotation.cos.shape[-1]
    heads = min(MOST_HEADS, kernels.next_power_of_2(groups * n))
    kernels.rotate[(s * b, kernels.cdiv(groups * n, heads))](
        tensor, rotation.cos, rotation.sin, out,
        b, groups * n, n, *tensor.stride()[:4],
        FIRST=first, ROPE=rope, WIDTH=width, INTERLEAVED=rotation.interleaved, BACKWARD=backward,
        KEPT=kernels.next_power_of_2(max(first, width - first - rope, 1)), HEADS=heads, num_warps=4,
        enable_fp_fusion=False,  # it would round a product and a sum once
    )  # fmt: skip
    return out
