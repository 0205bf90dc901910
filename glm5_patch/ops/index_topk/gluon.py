"""The lightning indexer in Gluon on Hopper: scores and selection in one pass over the keys.

The scores of a query against a sample of its keys set a bar that somewhat more than k of all its
scores reach. Those that reach it, the candidates, are written down as they are computed, and the k
highest are selected from them. The other scores are not written. Queries that their sample misled
are selected from all of their scores.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import env
from ..needs import Needs, Width
from ..query_positions import QueryPositions
from ..registry import OWN_KERNELS, backend, backends
from ..sparse_attention.gluon import WARPS, compiles
from . import triton
from .operation import selection_call
from .reference import IndexerInputs
from .triton import Candidates

DIM = 128
KEYS = 64
"""Of a tile."""
COLUMNS = 256
"""Of the products of a tile: the heads of all queries of a consumer."""
STAGES = 4
"""Tiles of keys in shared memory."""
PROGRAMS = 512
"""Of a launch that computes scores, if there are enough keys."""
KEYS_OF_A_SHARE = 4096
"""At least, where several programs share out the keys of some queries."""
CANDIDATE_BYTES = 340 << 20
"""Upper bound of the candidates and samples of a block of queries, and of the scores of those that
their sample misled."""
FEWEST_KEYS = 16385
"""Of the longest document, from which on one pass is faster than two. Both select the same keys:
both are exact, and the kernels of both add the products of a score up in the same order."""
STRIDE = 16
"""One key of so many is in a sample, or of a power of two times as many."""
MOST_SAMPLES = 8192
"""Of a query."""

NEEDS = Needs(
    package="triton",
    device="cuda",
    dtypes=triton.TRITON.dtypes,
    capability=(9, 0),
    capability_below=(10, 0),
    shared_memory=2 * DIM * (2 * COLUMNS + STAGES * KEYS) + 4096 + 128,
    widths={
        "dsa_indexer_n_heads": Width(one_of=(32, 64)),
        "dsa_indexer_head_dim": Width(one_of=(DIM,)),
    },
)


def _compile() -> None:
    from . import gluon_kernels as kernels

    inputs = torch.bfloat16, torch.bfloat16, torch.float32, torch.int32, torch.int32
    sizes = 16, 32, 1, 0, 64
    shape = dict(HEADS=32, QUERIES=COLUMNS // 32, grid=(1,), num_warps=WARPS)
    kernels.scores.warmup(*inputs, torch.float32, *sizes, 64, 1, 16, 1.0, **shape)
    outputs = torch.float32, torch.float32, torch.int32, torch.int32
    kernels.candidates.warmup(*inputs, *outputs, *sizes, 2048, 1.0, CAPACITY=4096, **shape)


RECORD = dict(
    name="gluon",
    rank=2,
    needs=NEEDS,
    load=compiles(_compile),
    asked_as=(OWN_KERNELS,),
    optional=True,
)
"""Of the backends of both operations."""


class Sampling(NamedTuple):
    """How candidates are found."""

    stride: int
    """One key of so many is in the sample."""
    room: int
    """For candidates of a query, a power of two; one that sees no more keys needs no sample."""

    @classmethod
    def of(cls, longest: int, k: int) -> Sampling:
        """So that a sample seldom misleads, of queries that see at most ``longest`` keys."""
        stride = STRIDE
        while longest > stride * MOST_SAMPLES:
            stride *= 2
        room = 1 << (2 * k - 1).bit_length()
        while room < min(longest, triton.most_candidates(k, k / stride)):
            room *= 2
        return cls(stride, room)


@backend("index_topk", **RECORD)
@torch.no_grad()
def index_topk(inputs: IndexerInputs, queries: QueryPositions, k: int, scale: float) -> Tensor:
    """As ``operation.index_topk``."""
    s, b, heads, _ = inputs.query.shape
    device = inputs.query.device
    wave = processors(device) * queries_of_a_program(heads)
    few_keys = queries.most_keys < max(FEWEST_KEYS, 2 * k + 1)
    if few_keys or s < wave or _asks_for_a_library(inputs, queries, k):
        return triton.index_topk(inputs, queries, k, scale)
    inputs = IndexerInputs(*(tensor.contiguous() for tensor in inputs))
    sampling = Sampling.of(queries.most_keys, k)
    bytes_of_a_row = 8 * sampling.room + 4 * (queries.keys // sampling.stride)
    rows = max(wave, CANDIDATE_BYTES // bytes_of_a_row // wave * wave)
    topk_indices = torch.empty((b, s, k), dtype=torch.int32, device=device)
    for batch in range(b):
        own, counts = topk_indices[batch], []
        for begin in range(0, s, rows):
            block = slice(begin, min(begin + rows, s))
            counts.append(_select(own[block], inputs, queries, block, batch, scale, sampling))
        triton.score_and_select_misled(
            own, torch.cat(counts), inputs, queries, batch, scale, processors(device),
            CANDIDATE_BYTES,
        )  # fmt: skip
    return topk_indices


def processors(device: torch.device) -> int:
    """Which run a program each."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def queries_of_a_program(heads: int) -> int:
    return 2 * (COLUMNS // heads)


def _asks_for_a_library(inputs: IndexerInputs, queries: QueryPositions, k: int) -> bool:
    """Whether ``GLM5_PATCH_KERNELS`` names one that selects from rows of scores."""
    call = selection_call(inputs, queries, queries.most_keys, k)
    return any(
        one.name == env.kernels() and one.most_difference is not None and one.check(call).ok
        for one in backends("index_topk.selection")
    )


def _select(
    out: Tensor,
    inputs: IndexerInputs,
    queries: QueryPositions,
    block: slice,
    batch: int,
    scale: float,
    sampling: Sampling,
) -> Tensor:
    """Select for a block of the queries of one sequence, but for those that their sample misled.

    Args:
        out: int32 [block, k], the result.
        inputs, queries, scale: as of ``index_topk``.
        block: which of the queries.
        batch: which sequence.
        sampling: how candidates are found.

    Returns:
        int32 [block]: how many candidates each query has, -1 where its sample misled.
    """
    size, k = out.shape
    stride, room = sampling
    spans = [span[block] for span in queries.spans()]
    bars = torch.empty(size, device=out.device)
    samples = torch.empty((size, queries.keys // stride), device=out.device)
    write_scores(samples, inputs, queries, block, batch, scale, stride=stride, least=room)
    longest = min(queries.most_keys, queries.end(block))
    triton.write_bars(bars, samples, *spans, longest, k, stride, room)
    candidates = Candidates.empty(size, room, out.device)
    write_candidates(candidates, inputs, queries, block, batch, scale, bars, k)
    triton.select_from_candidates(out, candidates, *spans)
    return candidates.counts


def write_scores(
    out: Tensor,
    inputs: IndexerInputs,
    queries: QueryPositions,
    block: slice,
    batch: int,
    scale: float,
    *,
    stride: int = 1,
    least: int = 0,
) -> None:
    """Scores of a block of the queries of one sequence.

    Args:
        out: fp32 [block or more, t // stride], the result; of a key that the query does not see,
            anything.
        inputs, queries, scale: as of ``index_topk``, contiguous.
        block: which of the queries.
        batch: which sequence.
        stride: one key of so many, a sample.
        least: queries that see no more keys are left out.
    """
    from . import gluon_kernels as kernels

    query, key, weights = inputs
    _, b, heads, _ = query.shape
    groups = -(-(block.stop - block.start) // queries_of_a_program(heads))
    shares = max(1, min(PROGRAMS // groups, len(key) // stride // KEYS_OF_A_SHARE))
    kernels.scores[(groups, shares)](
        query, key, weights, *queries.spans(), out,
        block.start, block.stop, b, batch, len(key), out.shape[1], stride, least, scale,
        HEADS=heads, QUERIES=COLUMNS // heads, num_warps=WARPS,
    )  # fmt: skip


def write_candidates(
    out: Candidates,
    inputs: IndexerInputs,
    queries: QueryPositions,
    block: slice,
    batch: int,
    scale: float,
    bars: Tensor,
    k: int,
) -> None:
    """Candidates of those queries of a block of one sequence that see more than k keys.

    Args:
        out: the result.
        inputs, queries, scale: as of ``index_topk``, contiguous.
        block: which of the queries.
        batch: which sequence.
        bars: fp32 [block], what candidates reach.
        k: how many keys to select.
    """
    from . import gluon_kernels as kernels

    query, key, weights = inputs
    size, b, heads = block.stop - block.start, *query.shape[1:3]
    kernels.candidates[(-(-size // queries_of_a_program(heads)),)](
        query, key, weights, *queries.spans(), bars, *out,
        block.start, block.stop, b, batch, len(key), k, scale,
        HEADS=heads, QUERIES=COLUMNS // heads, CAPACITY=out.values.shape[1], num_warps=WARPS,
    )  # fmt: skip


@backend("index_scores", **RECORD)
def index_scores(
    inputs: IndexerInputs, queries: QueryPositions, block: slice, scale: float
) -> Tensor:
    """As ``reference.index_scores``, with inputs that are contiguous."""
    b = inputs.query.shape[1]
    shape = b, block.stop - block.start, len(inputs.key)
    out = torch.empty(shape, device=inputs.query.device)
    for batch in range(b):
        write_scores(out[batch], inputs, queries, block, batch, scale)
    return out
