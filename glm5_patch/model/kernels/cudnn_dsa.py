"""Backward and top-k of sparse attention by cuDNN's frontend,
https://github.com/NVIDIA/cudnn-frontend. It compiles each on first use, for some seconds."""

from __future__ import annotations

import math

import torch
from cudnn import DSA
from torch import Tensor

from .libraries import why_not_latent
from .sparse_mla import flat_keys

_sparse_attention_backward = DSA.sparse_attention_backward_wrapper
_IndexerTopK = DSA.IndexerTopK

_plans: dict[tuple, object] = {}


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


def topk(scores: Tensor, positions: Tensor, out: Tensor) -> None:
    """As ``indexer.topk`` of a block of one sequence; takes twice the memory of the scores.

    Args:
        scores: fp32 [block, t], contiguous.
        positions: int32 [block], where each query of the block stands.
        out: int32 [block, k], contiguous.
    """
    plan, lengths = _plan(scores, positions, out.shape[1]), positions + 1
    size = plan.scratch_workspace_bytes()
    scratch = torch.empty(size, dtype=torch.uint8, device=scores.device)
    plan.execute(scores, lengths, out_indices=out, workspace=scratch)


def _plan(scores: Tensor, lengths: Tensor, k: int):
    """Of a top-k that takes the lower place among equals and returns places in ascending order."""
    key = (scores.device, scores.shape, k)
    if key not in _plans:
        plan = _IndexerTopK(scores, lengths, k, return_val=False, deterministic=True)
        plan.check_support()
        plan.compile()
        _plans[key] = plan
    return _plans[key]
