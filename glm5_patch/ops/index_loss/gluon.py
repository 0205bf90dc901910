"""The target of the indexer's loss in Gluon, for GLM-5's own shape on Hopper; see
``sparse_attention.gluon``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..needs import Width
from ..registry import OWN_KERNELS, backend
from ..sparse_attention import gluon
from ..sparse_attention.gluon import HEADS, KEYS, WIDTH
from ..sparse_attention.inputs import AbsorbedInputs
from ..sparse_attention.reference import LOG2_E


def _compile() -> None:
    from . import gluon_kernels as kernels

    tensors = *gluon.TENSORS, torch.float32, torch.float32
    s, b, _, k = gluon.SIZES
    kernels.head_sums.warmup(*tensors, s, b, k, 1.0, grid=(1,), num_warps=8)


@backend(
    "index_loss.head_sums",
    name="gluon",
    rank=2,
    needs=gluon.needs(
        HEADS * WIDTH + 2 * KEYS * WIDTH, heads=Width(one_of=(HEADS,)), known_lse=Width(one_of=(1,))
    ),
    load=gluon.compiles(_compile),
    asked_as=(OWN_KERNELS,),
    optional=True,
)
def head_sums(absorbed: AbsorbedInputs, lse: Tensor | None) -> Tensor:
    """As ``reference.head_sums``."""
    from . import gluon_kernels as kernels

    query, latent, topk_indices, starts, positions, _, softmax_scale = absorbed
    s, b = query.shape[:2]
    sums = torch.zeros(topk_indices.shape, dtype=torch.float32, device=query.device)
    kernels.head_sums[(s * b,)](
        query, latent, topk_indices, starts, positions, lse, sums,
        s, b, topk_indices.shape[-1], softmax_scale * LOG2_E, num_warps=8,
    )  # fmt: skip
    return sums
