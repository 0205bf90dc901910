"""Sparse attention of absorbed queries in Gluon, for GLM-5's own shape on Hopper: heads in groups
of 64, latent 512, rotary 64; see ``gluon_kernels`` for how."""

from __future__ import annotations

import importlib
import warnings

import torch
from torch import Tensor

from ..exact_sums import ExactSums
from ..needs import Needs, Width
from ..registry import OWN_KERNELS, backend
from .inputs import AbsorbedInputs
from .reference import LOG2_E
from .triton import room_for_latents, row_terms

HEADS, LATENT, ROPE = 64, 512, 64
WIDTH = LATENT + ROPE
KEYS = 64
"""Of a tile."""
WHOLE_GROUPS = Width(multiple_of=HEADS)


def load() -> None:
    """Import the kernels. Gluon is not stable: another Triton may lack what they use."""
    try:
        importlib.import_module(".gluon_kernels", __package__)
    except (ImportError, AttributeError, TypeError) as error:
        warnings.warn(
            f"glm5-patch: this Triton's Gluon is unknown ({error}); sparse attention takes the "
            "plain Triton kernels, about half as fast",
            RuntimeWarning,
            stacklevel=2,
        )
        raise


def needs(shared_numbers: int, heads: Width = WHOLE_GROUPS, **sizes: Width) -> Needs:
    """What the kernels take.

    Args:
        shared_numbers: 16-bit numbers that a program holds in shared memory.
        heads: of a rank.
        sizes: further rules of ``Call.sizes``.
    """
    return Needs(
        package="triton",
        device="cuda",
        dtypes=(torch.bfloat16, torch.float16),
        capability=(9, 0),
        capability_below=(10, 0),
        shared_memory=2 * shared_numbers,
        widths={
            "heads": heads,
            "kv_lora_rank": Width(one_of=(LATENT,)),
            "qk_pos_emb_head_dim": Width(one_of=(ROPE,)),
        },
        sizes={"latent_numbers": Width(at_most=2**31 - 1), **sizes},
    )


@backend(
    "sparse_attention.forward",
    name="gluon",
    rank=2,
    needs=needs(HEADS * WIDTH + 2 * KEYS * WIDTH),
    load=load,
    asked_as=(OWN_KERNELS,),
)
def forward(absorbed: AbsorbedInputs) -> tuple[Tensor, Tensor]:
    """As ``reference.forward``; empty places of a top-k come last, after all that is visible."""
    from . import gluon_kernels as kernels

    query, latent, topk_indices, starts, positions, _, softmax_scale = absorbed
    s, b, heads, _ = query.shape
    out = torch.empty((s, b, heads, LATENT), dtype=query.dtype, device=query.device)
    lse = torch.empty((s, b, heads), dtype=torch.float32, device=query.device)
    groups = heads // HEADS
    kernels.forward[(s * b, groups)](
        query, latent, topk_indices, starts, positions, out, lse,
        s, b, groups, topk_indices.shape[-1], softmax_scale * LOG2_E, num_warps=8,
    )  # fmt: skip
    return out, lse


@backend(
    "sparse_attention.backward",
    name="gluon",
    rank=2,
    needs=needs(HEADS * (WIDTH + LATENT) + KEYS * WIDTH + 2 * HEADS * KEYS),
    load=load,
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
    from . import gluon_kernels as kernels

    query, latent, topk_indices, starts, positions, _, softmax_scale = absorbed
    s, b, heads, _ = query.shape
    d_query, (d_latent, units) = torch.empty_like(query), room_for_latents(absorbed, d_out)
    groups, part = heads // HEADS, 64
    added = kernels.fours(part) if units is None else kernels.sectors(part)
    kernels.backward[(s * b, groups)](
        query, latent, topk_indices, starts, positions, d_out, lse, terms, d_query, d_latent, units,
        s, b, groups, topk_indices.shape[-1], softmax_scale, softmax_scale * LOG2_E,
        PART=part, ADDED=added, ACCUMULATOR=kernels.accumulator(part), num_warps=8,
    )  # fmt: skip
    # Back from renamed columns, see gluon_kernels.
    if units is None:
        fours = d_latent.unflatten(-1, (WIDTH // 16, 4, 2, 2))
        return d_query, fours.transpose(-3, -2).flatten(-4)
    sectors = ExactSums(d_latent, units).value().unflatten(-1, (WIDTH // 8, 2, 4))
    return d_query, sectors.transpose(-2, -1).flatten(-3)
