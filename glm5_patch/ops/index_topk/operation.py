"""Which keys each query attends to."""

from __future__ import annotations

from torch import Tensor

from ..fallback import compute
from ..needs import Call
from ..query_positions import QueryPositions
from .reference import IndexerInputs


def index_topk(inputs: IndexerInputs, queries: QueryPositions, k: int, scale: float) -> Tensor:
    """The keys with the highest index scores among those that each query sees.

    Of equal scores the lower position wins, in every backend. After ReLU about 5 % of the scores
    are exactly 0, and ``torch.topk``, which Hugging Face uses, selects among them by the length of
    the row and the device. A query's keys are the same whatever else is in the batch.

    Args:
        inputs: what the scores are made of.
        queries: where the queries stand among the keys.
        k: how many keys to select, at most t.
        scale: of the products of queries and keys, before the weights.

    Returns:
        int32 [b, s, k]: positions counted from the query's document start, ascending; then -1
        where fewer keys are visible.
    """
    return compute("index_topk", inputs.call, inputs, queries, k, scale)


def fp8_index_topk(
    inputs: IndexerInputs, queries: QueryPositions, k: int, scale: float, rotate: bool
) -> Tensor:
    """``index_topk`` in the arithmetic in which sglang and vLLM serve GLM-5, see ``fp8``.

    Args:
        inputs, queries, k, scale: as of ``index_topk``.
        rotate: whether to apply the Hadamard matrix; inputs may be rotated already.

    Returns:
        As ``index_topk``.
    """
    return compute("index_topk.fp8", inputs.call, inputs, queries, k, scale, rotate)


def select(
    inputs: IndexerInputs,
    scores: Tensor,
    queries: QueryPositions,
    spans: tuple[Tensor, Tensor],
    block: slice,
    k: int,
) -> Tensor:
    """Select for a block of the queries of one sequence, by the backend that fits.

    Args:
        inputs: what the scores are made of.
        scores: fp32 [block, t].
        queries: where all queries stand among the keys.
        spans: theirs, see ``QueryPositions.spans``.
        block: which of them.
        k: how many keys to select.

    Returns:
        int32 [block, k], as of ``index_topk``.
    """
    longest = min(queries.most_keys, queries.end(block))
    call = selection_call(inputs, queries, longest, k)
    starts, places = (span[block] for span in spans)
    return compute("index_topk.selection", call, scores, starts, places, longest, k)


def selection_call(inputs: IndexerInputs, queries: QueryPositions, longest: int, k: int) -> Call:
    """What decides which backend selects from scores of at most ``longest`` keys a query."""
    return Call.of(inputs.query).sized(
        dsa_indexer_topk=k, keys=longest, one_sequence=int(queries.is_one_sequence)
    )
