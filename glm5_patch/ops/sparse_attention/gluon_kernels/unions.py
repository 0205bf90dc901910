"""Gluon kernels of sparse attention's backward over unions of neighbouring queries, on Hopper.

The 64 rows of a program are the HEADS of 64 / HEADS neighbours. Pointers are those of
``union_kernels`` and ``triton_kernels``.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .backward import work_in_parts
from .bounds import add_bounds
from .tiles import union_of_program


@gluon.jit
def union_backward(
    Q, LATENTS, ENTRIES, COUNTS, D_OUT, LSE, TERMS, D_Q, D_LATENTS, UNITS, PROGRESS,
    first, rows, batch, capacity, scale, scale_log2, at_once, HEADS: gl.constexpr,
):  # fmt: skip
    """Gradients of neighbouring queries, and what they add together to those of their keys."""
    b, query, present, count, ENTRIES = union_of_program(
        ENTRIES, COUNTS, first, rows, batch, capacity, HEADS
    )
    if count > 0:
        work_in_parts(
            Q, LATENTS, ENTRIES, D_OUT, LSE, TERMS, D_Q, D_LATENTS, UNITS, PROGRESS, at_once,
            query, batch * HEADS, present, HEADS, 0, count, batch, b, scale, scale_log2,
        )  # fmt: skip


@gluon.jit
def union_bounds(
    Q, LATENTS, ENTRIES, COUNTS, D_OUT, LSE, TERMS, BOUNDS, UNIT,
    first, rows, batch, capacity, scale, scale_log2, HEADS: gl.constexpr,
):  # fmt: skip
    """What neighbouring queries add at most together to any number of a key's gradient."""
    b, query, present, count, ENTRIES = union_of_program(
        ENTRIES, COUNTS, first, rows, batch, capacity, HEADS
    )
    if count > 0:
        add_bounds(
            Q, LATENTS, ENTRIES, D_OUT, LSE, TERMS, BOUNDS, UNIT,
            query, batch * HEADS, present, HEADS, 0, count, batch, b, scale, scale_log2,
        )  # fmt: skip
