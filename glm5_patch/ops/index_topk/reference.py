"""The lightning indexer's scores and selection in torch (DeepSeek-V3.2-Exp, section 2.1)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..needs import Call
from ..query_positions import QueryPositions, Window, sequences, windows
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
    """Scores of a block of queries against the first keys, fp32 [b, block, end], unmasked.

    Args:
        inputs: of all queries and keys.
        block: the queries.
        end: how many keys.
        scale: of the products of queries and keys, before the weights.
    """
    query, weights = inputs.query[block], inputs.weights[block]
    return index_scores_of(query, inputs.key[:end], weights, scale)


def window_scores(inputs: IndexerInputs, window: Window, batch: slice, scale: float) -> Tensor:
    """Scores of a window of some sequences' queries against the keys that it sees, fp32
    [b, size, width], unmasked.

    Args:
        inputs: of all queries and keys.
        window: the queries and the keys.
        batch: which sequences.
        scale: of the products of queries and keys, before the weights.
    """
    return index_scores_of(
        window.of_queries(inputs.query[:, batch]),
        window.of_keys(inputs.key[:, batch]),
        window.of_queries(inputs.weights[:, batch]),
        scale,
    )


def index_scores_of(query: Tensor, key: Tensor, weights: Tensor, scale: float) -> Tensor:
    """fp32 [b, rows, t] of [rows, b, heads, dim], [t, b, dim] and [rows, b, heads].

    In Hugging Face's order of operations, so that near ties fall alike.
    """
    q = query.transpose(0, 1).float()  # [b, rows, heads, dim]
    k = key.permute(1, 2, 0).float()  # [b, dim, t]
    per_head = torch.matmul(q.flatten(1, 2), k).unflatten(1, q.shape[1:3])
    per_head = per_head.mul_(scale).relu_()  # [b, rows, heads, t]
    return torch.matmul(weights.transpose(0, 1).unsqueeze(-2), per_head).squeeze(-2)


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
        fp32 [b, block, t], no zero of it negative; of a key that the query does not see, anything.
    """
    b = inputs.query.shape[1]
    shape = (b, block.stop - block.start, queries.keys)
    scores = torch.full(shape, float("-inf"), device=inputs.query.device)
    inputs = inputs._replace(query=inputs.query[block], weights=inputs.weights[block])
    for window in score_windows(inputs, queries.of_queries(block)):
        seen = window.keys.stop - window.keys.start
        for batch in sequences(b, scores.device):
            found = window_scores(inputs, window, batch, scale)[:, window.slots, :seen]
            scores[batch, window.rows, window.keys] = found + 0.0  # -0.0 becomes 0.0
    return scores


def score_windows(inputs: IndexerInputs, queries: QueryPositions) -> Iterator[Window]:
    """Windows that bound the [size, heads, width] products of one sequence."""
    return windows(queries, inputs.query.shape[2] * 4)


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
    chosen = highest(scores, visible, k)
    return torch.where(chosen < 0, -1, chosen - starts[:, None].int())


def highest(scores: Tensor, visible: Tensor, k: int) -> Tensor:
    """The columns of the k highest visible scores of each row, ascending, then -1; the lower column
    wins among equals. ``torch.topk`` alone lets equals fall by length and device.

    Args:
        scores: fp32 [..., columns].
        visible: bool [..., columns].
        k: how many.

    Returns:
        int32 [..., k].
    """
    scores = scores.nan_to_num(float("inf"), float("inf"), float("-inf"))
    scores = scores.masked_fill_(~visible, float("-inf"))
    columns = scores.shape[-1]
    chosen = visible
    if columns > k:
        kth = scores.topk(k, sorted=False)[0].amin(-1, keepdim=True)
        above = scores > kth
        equal = (scores == kth) & visible
        spare = k - above.sum(-1, keepdim=True)
        chosen = above | equal & (equal.cumsum(-1) <= spare)
    place = torch.where(chosen, chosen.cumsum(-1) - 1, k)  # one more takes what is not chosen
    column = torch.arange(columns, dtype=torch.int32, device=scores.device).expand(chosen.shape)
    shape = *scores.shape[:-1], k + 1
    found = torch.full(shape, -1, dtype=torch.int32, device=scores.device)
    return found.scatter_(-1, place, column)[..., :k].contiguous()


@backend("index_topk", name="torch")
@torch.no_grad()
def index_topk(inputs: IndexerInputs, queries: QueryPositions, k: int, scale: float) -> Tensor:
    """As ``operation.index_topk``, from the scores of all keys that a window sees."""
    s, b = inputs.query.shape[:2]
    topk_indices = torch.empty((b, s, k), dtype=torch.int32, device=inputs.query.device)
    for window in score_windows(inputs, queries):
        visible = window.visible
        for batch in sequences(b, visible.device):
            scores = window_scores(inputs, window, batch, scale)
            local = highest(scores, visible.expand(scores.shape), k)
            topk_indices[batch, window.rows] = local[:, window.slots]
    return topk_indices
