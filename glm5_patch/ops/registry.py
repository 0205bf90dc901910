"""Fused kernels for what a sparse layer computes, beside the blocked torch code that tests them."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

from .. import env
from ..errors import GLM5PatchError
from .compared import triton_and_libraries

_NARROWEST = {"kv_lora_rank": 64, "qk_pos_emb_head_dim": 16, "dsa_indexer_head_dim": 16}
"""Widths below these make products that tensor cores don't take."""


LOSS_HEADS = 64
"""Attention heads of a rank whose probabilities the fused indexer loss can sum; more would be
several programs, whose sums would have to meet."""


def use_triton(like: Tensor, **widths: int) -> bool:
    """Whether Triton computes on tensors like this one; see ``triton_computes``."""
    return triton_computes(like.device, like.dtype, **widths)


def triton_computes(device: torch.device, dtype: torch.dtype, **widths: int) -> bool:
    """Whether Triton computes on such tensors, as ``GLM5_PATCH_KERNELS`` asks.

    Args:
        device, dtype: of the tensors in question.
        widths: settings of the configuration that the kernels index by.

    Raises:
        GLM5PatchError: Triton was asked for and can't.
    """
    reason = why_torch(device, dtype, **widths)
    if reason is not None and env.kernels() not in ("auto", "torch"):
        asked = f"{env.KERNELS}={env.kernels()}"
        raise GLM5PatchError(f"{asked}: {reason}; unset it, or set it to torch")
    return reason is None


def why_torch(device: torch.device, dtype: torch.dtype, **widths: int) -> str | None:
    """Why the blocked torch code computes on such tensors; None where Triton does."""
    asked = env.kernels()
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and asked == "triton"
    if asked == "torch":
        return f"{env.KERNELS}=torch"
    if not _triton_is_installed():
        return "triton is not installed"
    if device.type != "cuda" and not interpreted:
        return f"the tensors are on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16) and not interpreted:
        return f"{str(dtype).removeprefix('torch.')} is computed in full precision"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the device is older than Ampere"
    for name, width in widths.items():
        if width & (width - 1) or width < _NARROWEST.get(name, 1):
            return f"{name}={width} is no power of two of at least {_NARROWEST.get(name, 1)}"
    return None


def computed_by(device: torch.device, dtype: torch.dtype) -> str:
    """What computes sparse attention on such tensors, in words."""
    reason = why_torch(device, dtype)
    return triton_and_libraries(device) if reason is None else f"torch ({reason})"


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
