"""Sparse attention with the up-projection of keys folded into the queries, differentiable."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from ..blocks import Rows, visible_topk
from . import sparse_mla


def absorbed_attention(
    query: Tensor, latent: Tensor, up: Tensor, topk_indices: Tensor | None, rows: Rows, dims, scale
) -> Tensor:
    """As ``model.sparse_mla.sparse_mla``: a query times its key's projection meets the latent
    itself, and what comes out of the latent is projected to values after."""
    if topk_indices is None:
        topk_indices = visible_topk(rows, query.shape[1])
    q_nope, q_rope = query.split([dims.nope, dims.rope], dim=-1)
    # [latent, n, nope], [latent, n, value]
    up_key, up_value = up.unflatten(-1, (-1, dims.nope + dims.value)).split(
        [dims.nope, dims.value], dim=-1
    )
    absorbed = torch.cat([torch.einsum("sbnd,lnd->sbnl", q_nope, up_key), q_rope], dim=-1)
    out = _Attention.apply(absorbed, latent.squeeze(2), topk_indices, rows, dims.latent, scale)
    return torch.einsum("sbnl,lnv->sbnv", out, up_value).flatten(2)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, latent, topk_indices, rows, latent_dim, scale):
        query, latent, topk_indices = (t.contiguous() for t in (query, latent, topk_indices))
        where = (topk_indices, rows.starts.int(), (rows.starts + rows.local_positions).int())
        ctx.hopper = _hopper(query, latent_dim)
        kernels = ctx.hopper or sparse_mla
        out, lse = kernels.forward(query, latent, *where, latent_dim, scale)
        ctx.save_for_backward(query, latent, *where, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, d_out):
        *inputs, out, lse = ctx.saved_tensors
        d_out = d_out.contiguous()
        tail = (d_out, lse, sparse_mla.row_terms(out, d_out), ctx.scale)
        deterministic = torch.are_deterministic_algorithms_enabled()
        if ctx.hopper and not deterministic:
            d_query, d_latent = ctx.hopper.backward(*inputs, *tail)
        else:
            d_query, d_latent = sparse_mla.backward(*inputs, *tail, deterministic)
        return d_query, d_latent.to(inputs[1].dtype), None, None, None, None


def _hopper(query: Tensor, latent_dim: int):
    """The kernels in explicit layouts, where they fit."""
    hopper = _hopper_module() if query.is_cuda else None
    return hopper if hopper and hopper.why_not(query, latent_dim) is None else None


@functools.cache
def _hopper_module():
    """None where this Triton has another Gluon, which is not stable yet."""
    try:
        from . import sparse_mla_hopper
    except (ImportError, AttributeError, TypeError) as error:
        warnings.warn(
            f"glm5-patch: this Triton's Gluon is unknown ({error}); sparse attention takes the "
            "plain Triton kernels, about 3 times slower in the backward pass",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return sparse_mla_hopper
