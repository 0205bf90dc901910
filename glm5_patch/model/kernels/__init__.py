"""Fused kernels for what a sparse layer computes, beside the blocked torch code that tests them."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

from ... import env
from ...errors import GLM5PatchError


def use_triton(like: Tensor, *powers_of_two: int) -> bool:
    """Whether Triton computes on tensors like this one, as ``GLM5_PATCH_KERNELS`` asks.

    Args:
        like: of the device and dtype in question.
        powers_of_two: widths that the kernels index by.

    Raises:
        GLM5PatchError: Triton was asked for and can't.
    """
    asked = env.kernels()
    if asked == "torch":
        return False
    reason = why_not_triton(like, *powers_of_two)
    if reason is None:
        return asked == "triton" or like.is_cuda
    if asked == "triton":
        raise GLM5PatchError(f"{env.KERNELS}=triton: {reason}; unset it, or set it to torch")
    return False


def why_not_triton(like: Tensor, *powers_of_two: int) -> str | None:
    """What keeps the Triton kernels from such tensors; None if nothing does."""
    if not _triton_is_installed():
        return "triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not (like.is_cuda or interpreted):
        return f"the tensors are on {like.device.type}"
    if like.dtype not in (torch.bfloat16, torch.float16) and not interpreted:
        return f"{str(like.dtype).removeprefix('torch.')} is computed in full precision by torch"
    if like.is_cuda and torch.cuda.get_device_capability(like.device) < (8, 0):
        return "the device is older than Ampere"
    odd = [width for width in powers_of_two if width & (width - 1)]
    return f"{odd[0]} is no power of two" if odd else None


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
