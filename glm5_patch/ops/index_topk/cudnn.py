"""The top-k of one sequence by cuDNN's frontend, https://github.com/NVIDIA/cudnn-frontend. It
compiles on first use, for some seconds."""

from __future__ import annotations

import torch
from cudnn import DSA
from torch import Tensor

_IndexerTopK = DSA.IndexerTopK

_plans: dict[tuple, object] = {}


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
