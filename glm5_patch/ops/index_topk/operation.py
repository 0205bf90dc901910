"""Which keys each query attends to."""

from __future__ import annotations

from torch import Tensor

from ..fallback import compute
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
