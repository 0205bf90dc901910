"""Backward of sparse attention by cuDNN's frontend,
https://github.com/NVIDIA/cudnn-frontend. It compiles it on first use, for some seconds."""

from __future__ import annotations

import math

import torch
from cudnn import DSA
from torch import Tensor

from ..compared import why_not_latent
from .triton import flat_keys

_sparse_attention_backward = DSA.sparse_attention_backward_wrapper


def why_not_shape(query: Tensor, latent_dim: int, k: int) -> str | None:
    """Why it can't compute on such queries; args as of ``libraries.takes``."""
    heads = query.shape[2]
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"cuDNN takes bfloat16 and float16, not {str(query.dtype).removeprefix('torch.')}"
    if heads not in (32, 64):
        return f"cuDNN is taken with 32 and 64 heads of a rank, not {heads}"
    return why_not_latent(query, latent_dim)


def backward(
    query, latent, topk_indices, starts, positions, d_out, out, lse, softmax_scale
) -> tuple[Tensor, Tensor]:
    """As ``sparse_mla.backward``, not deterministic, and the latent's gradient in its dtype.

    Args:
        out, lse: as a ``forward`` returned them.
    """
    keys, lengths = flat_keys(topk_indices, starts, positions)
    no_sink = torch.full((query.shape[2],), float("-inf"), device=query.device)
    found = _sparse_attention_backward(
        query.flatten(0, 1),
        latent.flatten(0, 1),
        out.flatten(0, 1),
        d_out.flatten(0, 1),
        (lse * math.log(2)).flatten(0, 1),
        no_sink,
        keys,
        softmax_scale=softmax_scale,
        topk_length=lengths,
    )
    return found["dq"].view(query.shape), found["dkv"].view(latent.shape)
