"""The selection in fp8 with scores by DeepGEMM, https://github.com/deepseek-ai/DeepGEMM, the
kernel that sglang and vLLM serve with. It compiles on first use, for some seconds."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..needs import Needs, Width
from ..quantization.operation import quantize
from ..query_positions import QueryPositions, query_blocks
from ..registry import backend
from .fp8 import shortfall
from .operation import select
from .reference import IndexerInputs

ROUNDING = 2e-3
"""Of the highest score of a query. The tensor cores of Hopper add fp8 products up with 14 bits."""


@functools.cache
def fp8_mqa_logits() -> Callable[..., Tensor]:
    """The library's function; raises ImportError of a library that is older than it."""
    from deep_gemm import fp8_mqa_logits

    return fp8_mqa_logits


@backend(
    "index_topk.fp8",
    name="deep_gemm",
    rank=-1,  # only where it is asked for: beside some C++ libraries it ends the process
    needs=Needs(
        package="deep_gemm",
        distribution="deep_gemm",
        device="cuda",
        capability=(9, 0),
        capability_below=(11, 0),
        widths={
            "dsa_indexer_n_heads": Width(one_of=(32, 64)),
            "dsa_indexer_head_dim": Width(one_of=(64, 128)),
        },
    ),
    load=fp8_mqa_logits,
    most_difference=ROUNDING,
    difference=shortfall,
    optional=True,
)
@torch.no_grad()
def index_topk(
    inputs: IndexerInputs, queries: QueryPositions, k: int, scale: float, rotate: bool
) -> Tensor:
    """As ``fp8.index_topk``."""
    (query, query_scale), (key, key_scale) = (
        quantize(tensor, rotate) for tensor in (inputs.query, inputs.key)
    )
    query, key = (tensor.to(torch.float8_e4m3fn) for tensor in (query, key))
    weights = inputs.weights.float() * query_scale * scale
    s, b = query.shape[:2]
    starts, places = spans = queries.spans()
    ends = places + 1
    found = torch.empty((b, s, k), dtype=torch.int32, device=query.device)
    for block in query_blocks(s, queries.keys * 4):
        for batch in range(b):
            scores = fp8_mqa_logits()(
                query[block, batch].contiguous(),  # [block, heads, dim]
                (key[:, batch].contiguous(), key_scale[:, batch].contiguous()),
                weights[block, batch].contiguous(),  # [block, heads]
                starts[block],
                ends[block],
                clean_logits=False,
            )
            # [block, t] of wider rows. A selection takes whole rows, and looks at no key that the
            # query does not see.
            width = scores.stride(0)
            scores = scores.as_strided((len(scores), width), (width, 1))
            scores += 0.0  # -0.0 becomes 0.0
            found[batch, block] = select(inputs, scores, queries, spans, block, k)
    return found
