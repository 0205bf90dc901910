"""The forward of sparse attention by FlashMLA, https://github.com/deepseek-ai/FlashMLA."""

from __future__ import annotations

import inspect

import torch
from flash_mla import flash_mla_sparse_fwd
from torch import Tensor

from ..compared import why_not_latent
from .triton import LOG2_E, flat_keys

if "topk_length" not in inspect.signature(flash_mla_sparse_fwd).parameters:
    raise ImportError("flash_mla_sparse_fwd takes no topk_length: it is older than February 2026")


def why_not_shape(query: Tensor, latent_dim: int, k: int) -> str | None:
    """Why it can't compute on such queries; args as of ``libraries.takes``."""
    heads = query.shape[2]
    if query.dtype != torch.bfloat16:
        return f"FlashMLA takes bfloat16, not {str(query.dtype).removeprefix('torch.')}"
    if heads not in (64, 128):
        return f"FlashMLA takes 64 or 128 heads of a rank, not {heads}"
    if k % 128:
        return f"FlashMLA takes a top-k of a multiple of 128, not {k}"
    return why_not_latent(query, latent_dim)


def forward(query, latent, topk_indices, starts, positions, latent_dim, softmax_scale):
    """As ``sparse_mla.forward``; empty places of a top-k come last."""
    s, b, heads, _ = query.shape
    keys, lengths = flat_keys(topk_indices, starts, positions)
    out, _, lse = flash_mla_sparse_fwd(
        query.flatten(0, 1),
        latent.flatten(0, 1).unsqueeze(1),
        keys.unsqueeze(1),
        softmax_scale,
        latent_dim,
        topk_length=lengths,
    )
    lse = (lse * LOG2_E).masked_fill_(lse == float("inf"), -1e30)  # of a query without keys
    return out.view(s, b, heads, latent_dim), lse.view(s, b, heads)
