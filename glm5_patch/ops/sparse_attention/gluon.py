"""Sparse attention of absorbed queries in Gluon, for GLM-5's own shape on Hopper: heads in groups
of 64, latent 512, rotary 64; see ``gluon_kernels`` for how."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ..exact_sums import ExactPairs, ExactSums
from ..needs import Needs, Width
from ..registry import OWN_KERNELS, backend
from .inputs import AbsorbedInputs
from .reference import LOG2_E
from .triton import room_for_latents, row_terms

HEADS, LATENT, ROPE = 64, 512, 64
WIDTH = LATENT + ROPE
KEYS = 64
"""Of a tile."""
L2_SHARE = 0.8
"""See ``progress_for``."""
WARPS = 4
"""Of each part of a program whose parts do different work."""
BACKWARD_NUMBERS = HEADS * (WIDTH + LATENT) + KEYS * WIDTH + 2 * HEADS * KEYS + 256
"""16-bit numbers that a program of the backward holds in shared memory."""
WHOLE_GROUPS = Width(multiple_of=HEADS)


def compiles(warm_up: Callable[[], object]) -> Callable[[], None]:
    """A backend's ``load``: compiles its kernel. Gluon is not stable, another Triton may lack what
    it uses.

    Args:
        warm_up: imports the kernel and compiles it.
    """

    def load() -> None:
        try:
            warm_up()
        except Exception as error:  # whatever a compiler raises
            warnings.warn(
                f"glm5-patch: this Triton's Gluon is unknown ({error}); the plain Triton kernels "
                "compute in its place, about half as fast",
                RuntimeWarning,
                stacklevel=2,
            )
            raise

    return load


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


TENSORS = torch.bfloat16, torch.bfloat16, torch.int32, torch.int32, torch.int32
"""Queries, latents, top-k, starts and positions, as a kernel is compiled for them."""
SIZES = 16, 1, 1, 2048
"""Rows, batch, groups of heads, top-k."""


def _compile_forward() -> None:
    from .gluon_kernels import forward as kernels

    kernels.forward.warmup(
        *TENSORS, torch.bfloat16, torch.float32, *SIZES, 1.0, grid=(1,), num_warps=WARPS
    )


def _compile_backward() -> None:
    from .gluon_kernels import backward as kernels

    rows = torch.bfloat16, torch.float32, torch.float32
    for progress in (None, torch.int64):
        outputs = torch.bfloat16, torch.float32, None, progress
        kernels.backward.warmup(
            *TENSORS, *rows, *outputs, *SIZES, 1.0, 1.0, 132, grid=(1,), num_warps=WARPS
        )


@backend(
    "sparse_attention.forward",
    name="gluon",
    rank=3,
    needs=needs(HEADS * WIDTH + 2 * KEYS * WIDTH + 1024),
    load=compiles(_compile_forward),
    asked_as=(OWN_KERNELS,),
)
def forward(absorbed: AbsorbedInputs) -> tuple[Tensor, Tensor]:
    """As ``reference.forward``; empty places of a top-k come last, after all that is visible."""
    from .gluon_kernels import forward as kernels

    query, latent, topk_indices, starts, positions, _, softmax_scale = absorbed
    s, b, heads, _ = query.shape
    out = torch.empty((s, b, heads, LATENT), dtype=query.dtype, device=query.device)
    lse = torch.empty((s, b, heads), dtype=torch.float32, device=query.device)
    groups = heads // HEADS
    kernels.forward[(s * b, groups)](
        query, latent, topk_indices, starts, positions, out, lse,
        s, b, groups, topk_indices.shape[-1], softmax_scale * LOG2_E, num_warps=WARPS,
    )  # fmt: skip
    return out, lse


@backend(
    "sparse_attention.backward",
    name="gluon",
    rank=3,
    needs=needs(BACKWARD_NUMBERS),
    load=compiles(_compile_backward),
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
    from .gluon_kernels import backward as kernels
    from .gluon_kernels import bounds as bound_kernels

    query, latent, topk_indices, starts, positions, _, softmax_scale = absorbed
    s, b, heads, _ = query.shape
    given = query, latent, topk_indices, starts, positions, d_out, lse, terms
    sizes = s, b, heads // HEADS, topk_indices.shape[-1], softmax_scale, softmax_scale * LOG2_E
    grid = (s * b, heads // HEADS)

    def measure(bounds: ExactSums) -> None:
        bound_kernels.bounds[grid](*given, *bounds, *sizes, num_warps=WARPS)

    d_query = torch.empty_like(query)
    d_latent, units = room_for_latents(absorbed, d_out, measure)
    progress, at_once = progress_for(latent)
    kernels.backward[grid](
        *given, d_query, d_latent, units, progress, *sizes, at_once, num_warps=WARPS
    )
    if units is not None:
        return d_query, ExactPairs(d_latent, units).value()
    return d_query, fours(d_latent).flatten(-4)


def progress_for(latent: Tensor) -> tuple[Tensor | None, int]:
    """What programs of the backward begin by, see ``work_in_parts``, and how many run at once. None
    where the gradient of all latents fits into L2, and where the same bits are asked for every
    time: a query's gradient is added up in the order of the tiles."""
    if latent.device.type != "cuda":  # kernels are compiled without a GPU
        return None, 1
    device = torch.cuda.get_device_properties(latent.device)
    fits = 4 * latent.numel() <= L2_SHARE * device.L2_cache_size
    if fits or torch.are_deterministic_algorithms_enabled():
        return None, 1
    progress = torch.zeros(1, dtype=torch.int64, device=latent.device)
    return progress, device.multi_processor_count


def fours(d_latent: Tensor) -> Tensor:
    """Back from renamed columns, see ``gluon_kernels``: a view [..., WIDTH / 16, 2, 4, 2]."""
    return d_latent.unflatten(-1, (WIDTH // 16, 4, 2, 2)).transpose(-3, -2)
