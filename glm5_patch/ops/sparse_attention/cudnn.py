"""The backward of sparse attention by cuDNN's frontend,
https://github.com/NVIDIA/cudnn-frontend. It compiles on first use, for some seconds."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..fallback import BF16_DIFFERENCE
from ..needs import Needs, Width
from ..registry import backend
from .inputs import AbsorbedInputs
from .triton import flat_keys


@functools.cache
def sparse_attention_backward() -> Callable:
    """The library's function; raises ImportError of one that is older than it."""
    from cudnn import DSA

    return DSA.sparse_attention_backward_wrapper


@backend(
    "sparse_attention.backward",
    name="cudnn",
    rank=2,
    needs=Needs(
        package="cudnn",
        distribution="nvidia-cudnn-frontend",
        device="cuda",
        dtypes=(torch.bfloat16, torch.float16),
        capability=(9, 0),
        capability_below=(10, 0),
        widths={
            "heads": Width(one_of=(32, 64)),
            "kv_lora_rank": Width(one_of=(512,)),
            "qk_pos_emb_head_dim": Width(one_of=(64,)),
        },
        sizes={"query_numbers": Width(at_most=2**31 - 1)},
    ),
    load=sparse_attention_backward,
    most_difference=BF16_DIFFERENCE,
    deterministic=False,
)
def backward(
    absorbed: AbsorbedInputs, out: Tensor, lse: Tensor, d_out: Tensor
) -> tuple[Tensor, Tensor]:
    """As ``reference.backward``, with the latent's gradient in its dtype."""
    query, latent = absorbed.query, absorbed.latent
    keys, lengths = flat_keys(absorbed)
    no_sink = torch.full((query.shape[2],), float("-inf"), device=query.device)
    found = sparse_attention_backward()(
        query.flatten(0, 1),  # [s * b, n, latent + rope]
        latent.flatten(0, 1),  # [t * b, latent + rope]
        out.flatten(0, 1),  # [s * b, n, latent]
        d_out.flatten(0, 1),
        (lse * math.log(2)).flatten(0, 1),  # [s * b, n], natural
        no_sink,
        keys,  # [s * b, k]
        softmax_scale=absorbed.softmax_scale,
        topk_length=lengths,
    )
    return found["dq"].view(query.shape), found["dkv"].view(latent.shape)
