"""The backward of sparse attention over unions of neighbouring queries, on Hopper.

Neighbouring queries select much the same keys. Where a rank has fewer than 64 heads, a program's
64 rows are those of several neighbours, and it adds to the gradient of each of their keys once: a
quarter as often where four queries have the same keys. Groups that share too little are computed
by the Triton kernel, query by query. What a group does depends on its keys alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..exact_sums import ExactPairs, ExactSums
from ..needs import Width
from ..registry import OWN_KERNELS, backend
from . import gluon, triton
from .gluon import WARPS, WIDTH
from .inputs import AbsorbedInputs
from .reference import LOG2_E
from .triton import room_for_latents, row_terms

ROWS = 64
"""Heads of all queries of a group."""
SHARE = 0.75
"""A union serves if it has at most this share of the keys that its queries have."""
SCRATCH_BYTES = 256 << 20
"""Of the unions that exist at once, those of one group at least."""
BLOCK = 4096
"""Keys that a program looks through at a time."""


class Unions(NamedTuple):
    """Of a block of groups, see ``union_kernels``."""

    first: int
    """Group."""
    entries: Tensor
    """int32 [groups of the block, b, capacity]; overwritten by those of the next block."""


def unions(absorbed: AbsorbedInputs, counts: Tensor) -> Iterator[Unions]:
    """The unions of all groups, block by block.

    Args:
        absorbed: whose keys.
        counts: int32 [groups, b], written before the block is there.
    """
    from . import union_kernels as kernels

    _, latent, topk_indices, starts, positions, *_ = absorbed
    b, s, k = topk_indices.shape
    groups, queries = len(counts), queries_of_a_group(absorbed)
    words = kernels.cdiv(len(latent), 4)
    capacity = kernels.cdiv(int(SHARE * queries * k), 16) * 16
    most = max(1, SCRATCH_BYTES // (4 * b * (words + capacity)))
    size = kernels.cdiv(groups, kernels.cdiv(groups, most))
    device = topk_indices.device
    members = torch.zeros((size, b, words), dtype=torch.int32, device=device)
    entries = torch.empty((size, b, capacity), dtype=torch.int32, device=device)
    block = min(1024, kernels.next_power_of_2(k))
    for first in range(0, groups, size):
        there = min(size, groups - first)
        kernels.mark[(there * queries * b, kernels.cdiv(k, block))](
            topk_indices, starts, positions, members, first, s, b, k, words,
            QUERIES=queries, BLOCK=block,
        )  # fmt: skip
        kernels.unite[(there * b,)](
            members.view(torch.uint8), starts, positions, entries, counts,
            first, s, b, k, words, capacity, SHARE, QUERIES=queries,
            BLOCK=min(BLOCK, kernels.next_power_of_2(len(latent))), num_warps=8,
        )  # fmt: skip
        yield Unions(first, entries[:there])


def queries_of_a_group(absorbed: AbsorbedInputs) -> int:
    return ROWS // absorbed.query.shape[2]


def _compile() -> None:
    from .gluon_kernels import unions as kernels

    tensors = torch.bfloat16, torch.bfloat16, torch.int32, torch.int32
    rows = torch.bfloat16, torch.float32, torch.float32
    sizes = 0, 16, 1, 2048, 1.0, 1.0, 132
    for progress in (None, torch.int64):
        outputs = torch.bfloat16, torch.float32, None, progress
        kernels.union_backward.warmup(
            *tensors, *rows, *outputs, *sizes, HEADS=16, grid=(1,), num_warps=WARPS
        )


@backend(
    "sparse_attention.backward",
    name="gluon",
    rank=3,
    needs=gluon.needs(gluon.BACKWARD_NUMBERS, heads=Width(one_of=(8, 16, 32))),
    load=gluon.compiles(_compile),
    asked_as=(OWN_KERNELS,),
)
def backward(
    absorbed: AbsorbedInputs, out: Tensor, lse: Tensor, d_out: Tensor
) -> tuple[Tensor, Tensor]:
    """As ``reference.backward``, with the latent's gradient in fp32."""
    return key_gradients(absorbed, lse, row_terms(out, d_out), d_out)


def key_gradients(
    absorbed: AbsorbedInputs, lse: Tensor, terms: Tensor, d_out: Tensor
) -> tuple[Tensor, Tensor]:
    """As ``backward``, of row terms that are there already."""
    from . import triton_kernels
    from .gluon_kernels import unions as kernels

    query, latent = absorbed[:2]
    s, b, heads, _ = query.shape
    queries = queries_of_a_group(absorbed)
    counts = torch.empty((-(-s // queries), b), dtype=torch.int32, device=query.device)
    rows = d_out, lse, terms
    scales = absorbed.softmax_scale, absorbed.softmax_scale * LOG2_E

    def together(kernel, outputs: tuple, *more: int) -> None:
        for first, entries in unions(absorbed, counts):
            groups, _, capacity = entries.shape
            kernel[(groups * b,)](
                query, latent, entries, counts, *rows, *outputs,
                first, s, b, capacity, *scales, *more, HEADS=heads, num_warps=WARPS,
            )  # fmt: skip

    def alone(kernel, outputs: tuple) -> None:
        triton.query_by_query(kernel, absorbed, *rows, *outputs, united=counts, queries=queries)

    def measure(bounds: ExactSums) -> None:
        together(kernels.union_bounds, bounds)
        alone(triton_kernels.bounds, bounds)

    d_query = torch.empty_like(query)
    d_latent, units = room_for_latents(absorbed, d_out, measure)
    renamed = d_latent if units is not None else torch.zeros_like(d_latent)
    progress, at_once = gluon.progress_for(latent)
    together(kernels.union_backward, (d_query, renamed, units, progress), at_once)
    alone(triton_kernels.backward, (d_query, d_latent, units))
    if units is not None:
        return d_query, ExactPairs(d_latent, units).value()
    plain = d_latent.unflatten(-1, (WIDTH // 16, 2, 4, 2))
    plain += gluon.fours(renamed)
    return d_query, d_latent
