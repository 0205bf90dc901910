"""The lightning indexer in Triton: scores of a block of queries, and the selection from each row.

The kernels are imported inside the functions: they need triton, this record of them does not.
"""

from __future__ import annotations

import importlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..fallback import compute
from ..needs import Needs, Width
from ..query_positions import QueryPositions, query_blocks
from ..registry import backend
from .operation import select
from .reference import IndexerInputs

FEWEST_QUERIES = 256
"""Of a block: fewer leave a GPU idle. Their scores take 1 GiB where there are a million keys."""
IN_REGISTERS = 4096
"""Scores of a row that a program holds in registers to select from; of longer rows, candidates."""
DEVIATIONS = 5
"""Standard deviations by which more scores of a sample are candidates than are expected of the k
largest."""

TRITON = Needs(
    package="triton",
    device="cuda",
    interpretable=True,
    dtypes=(torch.bfloat16, torch.float16),
    capability=(8, 0),
    widths={
        "dsa_indexer_n_heads": Width(power_of_two=True),
        "dsa_indexer_head_dim": Width(power_of_two=True, at_least=16),
    },
)


def load() -> None:
    importlib.import_module(".triton_kernels", __package__)


@backend("index_topk", name="triton", rank=1, needs=TRITON, load=load)
@torch.no_grad()
def index_topk(inputs: IndexerInputs, queries: QueryPositions, k: int, scale: float) -> Tensor:
    """As ``operation.index_topk``; among equal scores the lower position wins."""
    inputs = IndexerInputs(*(tensor.contiguous() for tensor in inputs))
    s, b = inputs.query.shape[:2]
    spans = queries.spans()
    topk_indices = torch.empty((b, s, k), dtype=torch.int32, device=inputs.query.device)
    for block in query_blocks(s, b * queries.keys * 4, FEWEST_QUERIES):
        scores = compute("index_scores", inputs.call, inputs, queries, block, scale)
        for batch in range(b):
            topk_indices[batch, block] = select(inputs, scores[batch], queries, spans, block, k)
        del scores  # before there are those of the next block
    return topk_indices


@backend("index_scores", name="triton", rank=1, needs=TRITON, load=load)
def index_scores(
    inputs: IndexerInputs, queries: QueryPositions, block: slice, scale: float
) -> Tensor:
    """As ``reference.index_scores``, with inputs that are contiguous."""
    from . import triton_kernels as kernels

    query, key, weights = inputs
    _, b, heads, dim = query.shape
    queries_of_a_program = max(1, 128 // heads)
    size = block.stop - block.start
    half = query.dtype.itemsize == 2
    out = torch.empty((b, size, len(key)), device=query.device)
    for batch in range(b):
        kernels.scores[(kernels.cdiv(size, queries_of_a_program), 4)](
            query, key, weights, *queries.spans(), out[batch],
            block.start, block.stop, b, batch, len(key), scale,
            HEADS=heads, DIM=dim, QUERIES=queries_of_a_program, KEYS=64 if half else 32,
            PRECISION="tf32" if half else "ieee", STAGES=3, num_warps=4,
        )  # fmt: skip
    return out


@backend(
    "index_topk.selection",
    name="triton",
    rank=1,
    needs=Needs(
        package="triton",
        device="cuda",
        interpretable=True,
        dtypes=TRITON.dtypes,
        capability=TRITON.capability,
    ),
    load=load,
)
def selection(scores: Tensor, starts: Tensor, positions: Tensor, longest: int, k: int) -> Tensor:
    """As ``reference.selection``."""
    out = torch.empty((len(scores), k), dtype=torch.int32, device=scores.device)
    select_into(out, scores, starts, positions, longest)
    return out


def most_candidates(k: int, expected: float) -> float:
    """How many scores of a row reach its bar at most, unless its sample misleads.

    Args:
        k: how many keys to select.
        expected: of the k largest scores, in the sample.
    """
    wanted = expected + DEVIATIONS * math.sqrt(expected) + 1
    return k * wanted / expected * (1 + 3 / math.sqrt(wanted))


def room_for_candidates(longest: int, k: int) -> int:
    """How many candidates of a row there is room for, a power of two. A sample of half as many says
    which scores are candidates: enough that they reach k and fit, of a row of ``longest``."""
    room = 1 << (2 * k - 1).bit_length()
    while room < longest and most_candidates(k, k * (room / 2) / longest) > room:
        room *= 2
    return room


class Candidates(NamedTuple):
    """Of the rows of a block: what may be among the k highest scores."""

    values: Tensor
    """fp32 [block, room], in the order of the keys."""
    names: Tensor
    """int32 [block, room]: their places."""
    counts: Tensor
    """int32 [block]: how many, or -1 of a row that its sample misled."""

    @classmethod
    def empty(cls, rows: int, room: int, device: torch.device) -> Candidates:
        return cls(
            torch.empty((rows, room), device=device),
            torch.empty((rows, room), dtype=torch.int32, device=device),
            torch.empty(rows, dtype=torch.int32, device=device),
        )


def select_into(
    out: Tensor, scores: Tensor, starts: Tensor, positions: Tensor, longest: int
) -> None:
    """As ``selection``, into int32 [block, k], contiguous."""
    from . import triton_kernels as kernels

    rows, k = out.shape
    length = kernels.next_power_of_2(longest)
    if length <= max(IN_REGISTERS, 2 * k):
        _launch_topk(out, scores, Candidates(out, out, out), starts, positions, length, False)
        return
    room = room_for_candidates(longest, k)
    candidates = Candidates.empty(rows, room, out.device)
    kernels.candidates[(rows,)](
        scores, starts, positions, *candidates, scores.shape[1], k,
        SAMPLE=room // 2, CAPACITY=room, DEVIATIONS=DEVIATIONS, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    select_from_candidates(out, candidates, starts, positions)
    select_misled(out, scores, candidates.counts, starts, positions)


def select_from_candidates(
    out: Tensor, candidates: Candidates, starts: Tensor, positions: Tensor
) -> None:
    """As ``select_into``, of the rows that their sample did not mislead."""
    room = candidates.values.shape[1]
    _launch_topk(out, candidates.values, candidates, starts, positions, room, True)


def select_misled(
    out: Tensor, scores: Tensor, counts: Tensor, starts: Tensor, positions: Tensor
) -> None:
    """As ``select_into``, of the rows that their sample misled; the other rows of ``scores`` are
    not looked at."""
    from . import triton_kernels as kernels

    rows, k = out.shape
    kernels.topk_of_misled[(rows,)](
        scores, starts, positions, counts, out, scores.shape[1], k, BLOCK=1024, num_warps=4
    )


def _launch_topk(
    out: Tensor,
    scores: Tensor,
    candidates: Candidates,
    starts: Tensor,
    positions: Tensor,
    length: int,
    from_candidates: bool,
) -> None:
    from . import triton_kernels as kernels

    rows, k = out.shape
    kernels.topk[(rows,)](
        scores, starts, positions, *candidates, out, scores.shape[1], k,
        LENGTH=length, BLOCK=min(length, 1024), CANDIDATES=from_candidates,
        num_warps=min(16, max(4, length // 2048)),
    )  # fmt: skip


def write_bars(
    bars: Tensor,
    samples: Tensor,
    starts: Tensor,
    positions: Tensor,
    longest: int,
    k: int,
    stride: int,
    room: int,
) -> None:
    """What the scores of each row must reach to be candidates.

    Args:
        bars: fp32 [block], the result.
        samples: fp32 [block, t // stride], scores of one key of every ``stride``; not looked at in
            rows for whose keys there is room.
        starts, positions: int32 [block], the first and the last key that each query sees.
        longest: no query sees more keys.
        k: how many keys to select.
        stride: of the sample.
        room: for candidates of a row.
    """
    from . import triton_kernels as kernels

    rows, width = samples.shape
    length = kernels.next_power_of_2(max(1, longest // stride))
    kernels.bars[(rows,)](
        samples, starts, positions, bars, width, k, stride,
        LENGTH=length, CAPACITY=room, DEVIATIONS=DEVIATIONS,
        num_warps=min(16, max(4, length // 2048)),
    )  # fmt: skip
