"""The index scores in the arithmetic in which sglang and vLLM serve GLM-5: DeepGEMM's
``fp8_mqa_logits``, https://github.com/deepseek-ai/DeepGEMM.

Queries and keys are rotated by a Hadamard matrix in bf16 and rounded to e4m3, with one scale for
each token (and head) that is a power of two (UE8M0, ``scale_fmt="ue8m0"``). A product of two such
numbers is exact in fp32, and a power of two can be multiplied in before without another rounding.
So every backend of the index scores computes these scores, from rounded inputs in bf16. DeepGEMM
itself computes them where it is asked for, see ``deep_gemm``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..fallback import compute
from ..quantization.operation import quantize
from ..query_positions import QueryPositions, query_blocks, visible_keys
from ..registry import backend
from .reference import IndexerInputs


@backend("index_topk.fp8", name="torch")
@torch.no_grad()
def index_topk(
    inputs: IndexerInputs, queries: QueryPositions, k: int, scale: float, rotate: bool
) -> Tensor:
    """As ``operation.fp8_index_topk``, by the backend that ``index_topk`` has for the inputs."""
    inputs = fp8_inputs(inputs, scale, rotate)
    return compute("index_topk", inputs.call, inputs, queries, k, 1.0)


def fp8_inputs(inputs: IndexerInputs, scale: float, rotate: bool = True) -> IndexerInputs:
    """What index scores with a scale of 1 are made of.

    Args:
        inputs: of all queries and keys.
        scale: of the products of queries and keys; it goes into the weights, as in serving.
        rotate: whether to apply the Hadamard matrix; inputs may be rotated already.

    Returns:
        Queries and keys that are e4m3 numbers times a power of two for the keys, in bf16; and
        weights times the scales of the queries.
    """
    query, query_scale = quantize(inputs.query, rotate)
    key, key_scale = quantize(inputs.key, rotate)
    return IndexerInputs(
        query,
        (key.float() * key_scale[..., None]).bfloat16(),
        inputs.weights * query_scale * scale,
    )


@torch.no_grad()
def shortfall(
    found: Tensor,
    expected: Tensor,
    inputs: IndexerInputs,
    queries: QueryPositions,
    k: int,
    scale: float,
    rotate: bool,
) -> float:
    """How far below the lowest selected score a selected key is, as a share of the highest score
    of its query: the most of all keys. Infinity if a query has another number of keys, a key twice,
    keys that do not ascend, or one that it does not see.

    Args:
        found: the selection that is judged, int32 [b, s, k].
        expected: this package's own.
        inputs, queries, k, scale, rotate: of ``operation.fp8_index_topk``.
    """
    empty = expected < 0
    ascends = (found[..., 1:] > found[..., :-1]) | empty[..., 1:]
    seen = found <= queries.local_positions[:, None]
    if not (((found < 0) == empty).all() and ascends.all() and seen.all()):
        return float("inf")
    b, s, _ = found.shape
    inputs = IndexerInputs(*(t.contiguous() for t in fp8_inputs(inputs, scale, rotate)))
    most = found.new_zeros((), dtype=torch.float32)
    for block in query_blocks(s, b * queries.keys * 8):
        scores = compute("index_scores", inputs.call, inputs, queries, block, 1.0)
        visible = visible_keys(block, queries)[:, : queries.keys]
        ends = visible.shape[-1]
        scores = scores[..., :ends]
        highest = scores.masked_fill(~visible, 0.0).abs().amax(-1, keepdim=True)
        scores = scores.masked_fill(~visible, float("-inf"))
        lowest = scores.topk(min(k, ends), sorted=False)[0].amin(-1, keepdim=True)
        columns = found[:, block].clamp_min(0).long() + queries.starts[block, None]
        short = (lowest - scores.gather(-1, columns)) / highest.clamp_min(1e-30)
        most = torch.maximum(most, short.masked_fill(empty[:, block], 0.0).amax())
    return most.item()
