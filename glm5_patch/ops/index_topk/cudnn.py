"""The selection from the scores of one sequence by cuDNN's frontend,
https://github.com/NVIDIA/cudnn-frontend. It compiles on first use, for some seconds, and takes
twice the memory of the scores."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..needs import Needs, Width
from ..registry import backend

FEWEST_KEYS = 8193
"""Keys of a query from which on it is worth the memory that it takes."""

_plans: dict[tuple, object] = {}


@functools.cache
def indexer_topk() -> type:
    """The library's class; raises ImportError of a library that is older than it."""
    from cudnn import DSA

    return DSA.IndexerTopK


@backend(
    "index_topk.selection",
    name="cudnn",
    rank=2,
    needs=Needs(
        package="cudnn",
        distribution="nvidia-cudnn-frontend",
        device="cuda",
        capability=(9, 0),
        capability_below=(10, 0),
        sizes={
            "dsa_indexer_topk": Width(at_most=2048),
            "keys": Width(at_least=FEWEST_KEYS),
            "one_sequence": Width(one_of=(1,)),
        },
    ),
    load=indexer_topk,
    most_difference=0.0,
    optional=True,
)
def selection(scores: Tensor, starts: Tensor, positions: Tensor, longest: int, k: int) -> Tensor:
    """As ``reference.selection``."""
    plan, lengths = _plan(scores, positions, k), positions + 1
    out = torch.empty((len(scores), k), dtype=torch.int32, device=scores.device)
    size = plan.scratch_workspace_bytes()
    scratch = torch.empty(size, dtype=torch.uint8, device=scores.device)
    plan.execute(scores, lengths, out_indices=out, workspace=scratch)
    return out


def _plan(scores: Tensor, lengths: Tensor, k: int):
    """Of a top-k that takes the lower place among equals and returns places in ascending order."""
    key = (scores.device, scores.shape, k)
    if key not in _plans:
        plan = indexer_topk()(scores, lengths, k, return_val=False, deterministic=True)
        plan.check_support()
        plan.compile()
        _plans[key] = plan
    return _plans[key]
