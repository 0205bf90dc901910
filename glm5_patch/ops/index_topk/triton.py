"""The lightning indexer in Triton: scores of a block of queries, and the selection from each row.

The kernels are imported inside the functions: they need triton, this record of them does not.
"""

from __future__ import annotations

import importlib
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..fallback import compute
from ..needs import Width, of_triton
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

TRITON = of_triton(
    {
        "dsa_indexer_n_heads": Width(power_of_two=True),
        "dsa_indexer_head_dim": Width(power_of_two=True, at_least=16),
    }
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

    b, keys, size = inputs.query.shape[1], len(inputs.key), block.stop - block.start
    tile = _tile(inputs)
    out = torch.empty((b, size, keys), device=inputs.query.device)
    for batch in range(b):
        kernels.scores[(kernels.cdiv(size, tile["QUERIES"]), 4)](
            *inputs, *queries.spans(), out[batch],
            block.start, block.stop, b, batch, keys, scale, **tile,
        )  # fmt: skip
    return out


def _tile(inputs: IndexerInputs) -> dict[str, Any]:
    """Of the kernels that compute scores."""
    _, _, heads, dim = inputs.query.shape
    half = inputs.query.dtype.itemsize == 2
    sizes = dict(HEADS=heads, DIM=dim, QUERIES=max(1, 128 // heads), KEYS=64 if half else 32)
    return dict(**sizes, PRECISION="tf32" if half else "ieee", STAGES=3, num_warps=4)


@backend(
    "index_topk.selection",
    name="triton",
    rank=1,
    needs=of_triton(),
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


def score_and_select_misled(
    out: Tensor,
    counts: Tensor,
    inputs: IndexerInputs,
    queries: QueryPositions,
    batch: int,
    scale: float,
    programs: int,
    most_bytes: int,
) -> None:
    """Select for the queries of one sequence that their sample misled, from all of their scores.
    Where there are none, the one launch returns at once; the host doesn't wait to know.

    Args:
        out: int32 [s, k], the result; the other rows stay as they are.
        counts: int32 [s], of candidates; negative of a query that its sample misled.
        inputs, queries, scale: as of ``index_topk``, contiguous.
        batch: which sequence.
        programs: at most, which share the queries out between them.
        most_bytes: of all programs' scores, if more than one program has room in them.
    """
    from . import triton_kernels as kernels

    (s, k), b, keys, tile = out.shape, inputs.query.shape[1], len(inputs.key), _tile(inputs)
    lines = tile["QUERIES"]
    groups = kernels.cdiv(s, lines)
    programs = max(1, min(programs, groups, most_bytes // (4 * lines * keys)))
    scores = torch.empty((programs * lines, keys), device=out.device)
    kernels.scores_and_topk_of_misled[(programs,)](
        *inputs, *queries.spans(), counts, scores, out, s, b, batch, keys, k, scale,
        BLOCK=1024, **tile,
    )  # fmt: skip


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
