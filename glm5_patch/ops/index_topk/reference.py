"""The lightning indexer's scores and selection in torch (DeepSeek-V3.2-Exp, section 2.1)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..needs import Call
from ..query_positions import QueryPositions, query_blocks, visible_keys
from ..registry import backend


class IndexerInputs(NamedTuple):
    """What the index scores are made of; positions are already rotated in."""

    query: Tensor
    """[s, b, heads, dim]."""
    key: Tensor
    """[t, b, dim]; t is s, or under context parallelism the whole sequence."""
    weights: Tensor
    """fp32 [s, b, heads], scaled by ``heads ** -0.5``."""

    @property
    def call(self) -> Call:
        heads, dim = self.query.shape[2:]
        return Call.of(self.query, dsa_indexer_n_heads=heads, dsa_indexer_head_dim=dim)


def block_scores(inputs: IndexerInputs, block: slice, end: int, scale: float) -> Tensor:
    """Scores of a block of queries against the first keys, fp32 [b, block, end].

    Unmasked, and in Hugging Face's order of operations, so that near ties fall alike.

    Args:
        inputs: of all queries and keys.
        block: the queries.
        end: how many keys.
        scale: of the products of queries and keys, before the weights.
    """
    q = inputs.query[block].transpose(0, 1).float()  # [b, block, heads, dim]
    k = inputs.key[:end].permute(1, 2, 0).float()  # [b, dim, end]
    weights = inputs.weights[block].transpose(0, 1)  # [b, block, heads]
    # [b, block * heads, end] -> [b, block, heads, end]
    per_head = torch.matmul(q.flatten(1, 2), k).unflatten(1, q.shape[1:3])
    per_head = per_head.mul_(scale).relu_()
    return torch.matmul(weights.unsqueeze(-2), per_head).squeeze(-2)


def score_blocks(inputs: IndexerInputs) -> Iterator[slice]:
    """Slices over the queries that bound the [b, block, heads, t] products of a block."""
    s, b, heads, _ = inputs.query.shape
    return query_blocks(s, b * heads * len(inputs.key) * 4)


@backend("index_scores", name="torch")
def index_scores(
    inputs: IndexerInputs, queries: QueryPositions, block: slice, scale: float
) -> Tensor:
    """Scores of a block of queries against all keys.

    Args:
        inputs: what the scores are made of, of all queries and keys.
        queries: where all queries stand among the keys.
        block: the queries.
        scale: of the products of queries and keys, before the weights.

    Returns:
        fp32 [b, block, t]; of a key that the query does not see, anything.
    """
    b, end = inputs.query.shape[1], queries.end(block)
    shape = (b, block.stop - block.start, queries.keys)
    scores = torch.full(shape, float("-inf"), device=inputs.query.device)
    scores[..., :end] = block_scores(inputs, block, end, scale).masked_fill_(
        ~visible_keys(block, queries), float("-inf")
    )
    return scores


@backend("index_topk.selection", name="torch")
def selection(scores: Tensor, starts: Tensor, positions: Tensor, longest: int, k: int) -> Tensor:
    """The places of the k highest scores of each query; the lower place wins among equals.

    Args:
        scores: fp32 [block, t], of all keys.
        starts, positions: int32 [block], the first and the last key that each query sees.
        longest: no query sees more keys.
        k: how many.

    Returns:
        int32 [block, k], places counted from ``starts``, ascending, then -1 where fewer keys are
        visible.
    """
    keys = torch.arange(scores.shape[1], device=scores.device)
    visible = (keys >= starts[:, None]) & (keys <= positions[:, None])
    scores = scores.masked_fill(~visible, float("-inf"))
    values, columns = scores.sort(dim=-1, descending=True, stable=True)
    values, columns = values[:, :k], columns[:, :k]
    none = torch.iinfo(torch.int32).max
    local = torch.where(values == float("-inf"), none, columns - starts[:, None])
    local = local.sort(-1)[0]
    local = torch.where(local == none, -1, local).int()
    return torch.nn.functional.pad(local, (0, k - local.shape[1]), value=-1)


@backend("index_topk", name="torch")
@torch.no_grad()
def index_topk(inputs: IndexerInputs, queries: QueryPositions, k: int, scale: float) -> Tensor:
    """As ``operation.index_topk``, by sorting the scores of all keys in blocks of queries."""
    s, b = inputs.query.shape[:2]
    topk_indices = torch.empty((b, s, k), dtype=torch.int32, device=inputs.query.device)
    for block in score_blocks(inputs):
        # Full rows: the choice among equal scores depends on the length of the row.
        scores = index_scores(inputs, queries, block, scale)
        if torch.are_deterministic_algorithms_enabled():
            values, columns = scores.sort(dim=-1, descending=True, stable=True)
            values, columns = values[..., :k], columns[..., :k]
        else:
            values, columns = scores.topk(k, dim=-1)
        local = columns - queries.starts[block, None]
        topk_indices[:, block] = local.masked_fill(values == float("-inf"), -1).int()
    return topk_indices
