"""Sparse attention of absorbed queries in Triton; see ``triton_kernels`` for how.

The kernels are imported inside the functions: they need triton, this record of them does not.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import tiles
from ..exact_sums import ExactPairs, ExactSums
from ..needs import Width, of_triton
from ..registry import backend
from .inputs import AbsorbedInputs
from .reference import LOG2_E

TRITON = of_triton(
    {  # narrower products are none for tensor cores
        "kv_lora_rank": Width(power_of_two=True, at_least=64),
        "qk_pos_emb_head_dim": Width(power_of_two=True, at_least=16),
    }
)


def load() -> None:
    importlib.import_module(".triton_kernels", __package__)


def project(tensor: Tensor, projection: Tensor, out: Tensor, copied: int = 0) -> None:
    """A product of each head. A row's bits do not depend on the number of rows.

    Args:
        tensor: [s, b, n, x + copied].
        projection: [n, x, y], of any strides.
        out: [s, b, n, y + copied], written.
        copied: the last columns, which are copied.
    """
    from . import triton_kernels as kernels

    source, target = tensor.flatten(0, 1), out.flatten(0, 1)
    rows, heads, _ = source.shape
    inner, columns = projection.shape[1:]
    products = tiles.of_device(tensor.device).projection
    parts = kernels.cdiv(columns, products.columns) + (copied > 0)
    kernels.project[(kernels.cdiv(rows, products.rows) * parts, heads)](
        source, projection, target,
        rows, *source.stride()[:2], *projection.stride(), *target.stride()[:2],
        INNER=inner, COLUMNS=columns, COPIED=copied, ROWS=products.rows, PART=products.columns,
        STEP=products.step, PRECISION=precision(tensor.dtype),
        num_stages=products.stages, num_warps=products.warps,
    )  # fmt: skip


@backend("sparse_attention.forward", name="triton", rank=1, needs=TRITON, load=load)
def forward(absorbed: AbsorbedInputs) -> tuple[Tensor, Tensor]:
    """As ``reference.forward``."""
    from . import triton_kernels as kernels

    query, latent, topk_indices, starts, positions, latent_dim, softmax_scale = absorbed
    s, b, heads, width = query.shape
    out = torch.empty((s, b, heads, latent_dim), dtype=query.dtype, device=query.device)
    lse = torch.empty((s, b, heads), dtype=torch.float32, device=query.device)
    chosen = tiles.of_device(query.device)
    block = heads_of_a_program(heads, chosen.forward_heads)
    kernels.forward[(s * b, kernels.cdiv(heads, block))](
        query, latent, topk_indices, starts, positions, out, lse,
        s, b, heads, topk_indices.shape[-1], softmax_scale * LOG2_E,
        LATENT=latent_dim, ROPE=width - latent_dim, HEADS=block, KEYS=chosen.forward_keys,
        PRECISION=precision(query.dtype), STAGES=chosen.forward_stages,
        num_warps=8 if block > 32 else 4,
    )  # fmt: skip
    return out, lse


@backend("sparse_attention.backward", name="triton", rank=1, needs=TRITON, load=load)
def backward(
    absorbed: AbsorbedInputs, out: Tensor, lse: Tensor, d_out: Tensor
) -> tuple[Tensor, Tensor]:
    """As ``reference.backward``, with the latent's gradient in fp32. Deterministic where
    ``torch.use_deterministic_algorithms`` asks for it, see ``room_for_latents``."""
    return key_gradients(absorbed, lse, row_terms(out, d_out), d_out)


def row_terms(out: Tensor, d_out: Tensor) -> Tensor:
    """out . d_out over the last dimension, in fp32: [s, b, n]."""
    from . import triton_kernels as kernels

    terms = torch.empty(out.shape[:-1], dtype=torch.float32, device=out.device)
    rows, latent_dim = terms.numel(), out.shape[-1]
    grid = (kernels.cdiv(rows, 16),)
    kernels.row_terms[grid](out, d_out, terms, LATENT=latent_dim, ROWS=16, rows=rows)
    return terms


def key_gradients(
    absorbed: AbsorbedInputs, lse: Tensor, terms: Tensor, d_out: Tensor
) -> tuple[Tensor, Tensor]:
    """As ``backward``, of row terms that are there already.

    Args:
        terms: ``row_terms`` of the forward's output.
    """
    from . import triton_kernels as kernels

    rows = d_out, lse, terms

    def measure(bounds: ExactSums) -> None:
        query_by_query(kernels.bounds, absorbed, *rows, *bounds)

    d_query = torch.empty_like(absorbed.query)
    d_latent, units = room_for_latents(absorbed, d_out, measure)
    query_by_query(kernels.backward, absorbed, *rows, d_query, d_latent, units)
    return d_query, d_latent if units is None else ExactPairs(d_latent, units).value()


def query_by_query(
    kernel,
    absorbed: AbsorbedInputs,
    *pointers: Tensor | None,
    united: Tensor | None = None,
    queries: int = 1,
) -> None:
    """Launch a kernel of the backward.

    Args:
        kernel: ``bounds`` or ``backward`` of ``triton_kernels``.
        absorbed: what it works on.
        pointers: those that follow.
        united: int32 [groups, b]; groups of neighbouring queries are passed over where it is
            not 0.
        queries: of a group.
    """
    query, latent, topk_indices, starts, positions, latent_dim, softmax_scale = absorbed
    s, b, heads, width = query.shape
    block = heads_of_a_program(heads, tiles.of_device(query.device).backward_heads)
    kernel[(s * b, -(-heads // block))](
        query, latent, topk_indices, starts, positions, *pointers,
        s, b, heads, topk_indices.shape[-1], softmax_scale, softmax_scale * LOG2_E, united,
        LATENT=latent_dim, ROPE=width - latent_dim, HEADS=block, KEYS=32,
        PRECISION=precision(query.dtype), STAGES=2, QUERIES=queries, num_warps=4,
    )  # fmt: skip


def room_for_latents(
    absorbed: AbsorbedInputs, d_out: Tensor, measure: Callable[[ExactSums], None]
) -> tuple[Tensor, Tensor | None]:
    """Where programs add up the gradient of the latents: zeros, fp32, and None; or ``ExactPairs``
    where ``torch.use_deterministic_algorithms`` asks for the same bits every time.

    Args:
        absorbed, d_out: of ``backward``.
        measure: adds to sums [t, b] how large the gradient of each key gets at most.
    """
    latent = absorbed.latent
    if not torch.are_deterministic_algorithms_enabled():
        return torch.zeros(latent.shape, dtype=torch.float32, device=latent.device), None
    s, _, heads, _ = absorbed.query.shape
    most = lambda tensor: torch.stack(torch.aminmax(tensor)).float().abs().amax()
    # A probability is at most 1, and what comes out of the latents no longer than one of them.
    length = torch.linalg.vector_norm(latent, dim=-1, dtype=torch.float32).amax()
    of_logits = 2 * absorbed.softmax_scale * length * most(absorbed.query)
    of_a_head = math.sqrt(absorbed.latent_dim) * most(d_out) * (of_logits + 1)
    bounds = ExactSums.zeros(latent.shape[:2], s * heads * of_a_head)
    measure(bounds)
    return ExactPairs.zeros(latent.shape[2], bounds.value())


def flat_keys(absorbed: AbsorbedInputs) -> tuple[Tensor, Tensor]:
    """The selected keys of each query as other libraries count them: int32 [s * b, k], rows of the
    flat latent [t * b], -1 for an empty place; and how many each query has, int32 [s * b]."""
    from . import triton_kernels as kernels

    topk_indices, starts, positions = absorbed[2:5]
    b, s, k = topk_indices.shape
    keys = torch.empty((s * b, k), dtype=torch.int32, device=topk_indices.device)
    block = min(1024, kernels.next_power_of_2(k))
    grid = (s * b, kernels.cdiv(k, block))
    kernels.flat_keys[grid](topk_indices, starts, keys, s, b, k, BLOCK=block)
    return keys, (positions - starts + 1).clamp(max=k).repeat_interleave(b)


def heads_of_a_program(heads: int, at_most: int) -> int:
    """A power of two of at least 16, which is the narrowest side of a product."""
    return min(at_most, max(16, 1 << (heads - 1).bit_length()))


def precision(dtype: torch.dtype) -> str:
    """What ``tl.dot`` does with fp32, which only products of 16-bit numbers have inside."""
    return "tf32" if dtype.itemsize == 2 else "ieee"
