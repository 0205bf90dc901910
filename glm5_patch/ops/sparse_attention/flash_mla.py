"""The forward of sparse attention by FlashMLA, https://github.com/deepseek-ai/FlashMLA."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from ..fallback import BF16_DIFFERENCE
from ..needs import Needs, Width
from ..registry import backend
from .inputs import AbsorbedInputs
from .reference import LOG2_E, NO_KEYS
from .triton import flat_keys


@functools.cache
def flash_mla_sparse_fwd() -> Callable:
    """The library's function: importing it needs CUDA.

    Raises:
        ImportError: it does not take the numbers of keys.
    """
    from flash_mla import flash_mla_sparse_fwd

    if "topk_length" not in inspect.signature(flash_mla_sparse_fwd).parameters:
        raise ImportError("flash_mla_sparse_fwd has no topk_length: it is older than February 2026")
    return flash_mla_sparse_fwd


@backend(
    "sparse_attention.forward",
    name="flash_mla",
    rank=2,
    needs=Needs(
        package="flash_mla",
        distribution="flash_mla",
        device="cuda",
        dtypes=(torch.bfloat16,),
        capability=(9, 0),
        capability_below=(10, 0),
        widths={
            "heads": Width(one_of=(64, 128)),
            "kv_lora_rank": Width(one_of=(512,)),
            "qk_pos_emb_head_dim": Width(one_of=(64,)),
        },
        sizes={
            "dsa_indexer_topk": Width(multiple_of=128),
            "query_numbers": Width(at_most=2**31 - 1),
        },
    ),
    load=flash_mla_sparse_fwd,
    most_difference=BF16_DIFFERENCE,
)
def forward(absorbed: AbsorbedInputs) -> tuple[Tensor, Tensor]:
    """As ``reference.forward``."""
    s, b, heads, _ = absorbed.query.shape
    keys, lengths = flat_keys(absorbed)
    out, _, lse = flash_mla_sparse_fwd()(
        absorbed.query.flatten(0, 1),  # [s * b, n, latent + rope]
        absorbed.latent.flatten(0, 1).unsqueeze(1),  # [t * b, 1, latent + rope]
        keys.unsqueeze(1),  # [s * b, 1, k]
        absorbed.softmax_scale,
        absorbed.latent_dim,
        topk_length=lengths,
    )
    # [s * b, n]; the library's is natural, and infinite of a query without keys
    lse = (lse * LOG2_E).masked_fill_(lse == float("inf"), NO_KEYS)
    return out.view(s, b, heads, absorbed.latent_dim), lse.view(s, b, heads)
