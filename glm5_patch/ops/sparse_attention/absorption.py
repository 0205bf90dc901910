"""Sparse attention with the up-projection of keys folded into the queries, differentiable."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..fallback import compute
from ..registry import backend
from . import triton
from .inputs import AbsorbedInputs, AttentionInputs, MLADims

BLOCK_ROWS = 512
"""Queries that a block has at least."""
VISIBLE_PLACES = 1 << 26
"""Places of a top-k that holds every visible key, 256 MiB: what one block of queries may have."""
TOPK_MULTIPLE = 128
"""Where every key is selected, the width of the top-k is a multiple of it: libraries take no other,
and a longer document elsewhere in the batch must not decide whether one computes."""


@backend("sparse_attention", name="triton", rank=1, needs=triton.TRITON, load=triton.load)
def absorbed_attention(attention: AttentionInputs) -> tuple[Tensor, Tensor]:
    """As ``operation.sparse_attention``: a query times its key's projection meets the latent
    itself, and what comes out of the latent is projected to values after. Each of the two passes
    over the keys is an operation of its own, so that a library may compute one of them."""
    if attention.topk_indices is not None:
        return _AbsorbedAttention.apply(*attention)
    parts = [_AbsorbedAttention.apply(*part) for part in in_blocks(attention, VISIBLE_PLACES)]
    if len(parts) == 1:
        return parts[0]
    outputs, lses = zip(*parts)
    return torch.cat(outputs), torch.cat(lses)


def in_blocks(attention: AttentionInputs, places: int) -> Iterator[AttentionInputs]:
    """Attention in blocks of queries, whole if it fits.

    Args:
        attention: without a top-k.
        places: most that a top-k of every visible key may have, of one block.
    """
    s, b = attention.query.shape[:2]
    rows = max(BLOCK_ROWS, places // (b * attention.queries.most_keys))
    if s <= rows:
        yield attention
        return
    for first in range(0, s, rows):
        yield attention.of_queries(slice(first, min(first + rows, s)))


class _AbsorbedAttention(torch.autograd.Function):
    """Keeps what comes out of the latent; the absorbed queries, as large, are made again. So is a
    top-k of every visible key, which grows with the square of the sequence."""

    @staticmethod
    def forward(ctx, *attention):
        absorbed = absorbed_inputs(AttentionInputs(*attention).with_topk(TOPK_MULTIPLE))
        query, latent, up_projection, topk_indices, queries, dims, softmax_scale, _ = attention
        out, lse = _forward(absorbed)
        output = query.new_empty((*query.shape[:3], dims.value))
        triton.project(out, _value_projection(up_projection, dims), output)
        if topk_indices is not None:
            topk_indices = absorbed.topk_indices
        selected = topk_indices, absorbed.starts, absorbed.positions
        ctx.save_for_backward(query, latent, up_projection, *selected, out, lse)
        ctx.queries, ctx.dims, ctx.softmax_scale = queries, dims, softmax_scale
        ctx.mark_non_differentiable(lse)
        return output.flatten(2), lse

    @staticmethod
    def backward(ctx, d_output, _):
        query, latent, up_projection, topk_indices, *spans, out, lse = ctx.saved_tensors
        dims = ctx.dims
        attention = query, latent, up_projection, topk_indices, ctx.queries, dims, ctx.softmax_scale
        topk_indices = AttentionInputs(*attention).with_topk(TOPK_MULTIPLE).topk_indices
        absorbed = AbsorbedInputs(
            absorb(query, up_projection, dims),
            latent.squeeze(2).contiguous(),
            topk_indices.contiguous(),
            *spans,
            dims.latent,
            ctx.softmax_scale,
        )
        d_output = _by_head(d_output.unflatten(2, (-1, dims.value)))
        d_out = out.new_empty(out.shape)
        value_projection = _value_projection(up_projection, dims)
        torch.bmm(d_output, value_projection.transpose(1, 2), out=_by_head(d_out))
        d_absorbed, d_latent = _backward(absorbed, out, lse, d_out)
        d_query = query.new_empty(query.shape)
        d_nope = _by_head(d_absorbed[..., : dims.latent])
        key_projection = _key_projection(up_projection, dims)
        torch.bmm(d_nope, key_projection.transpose(1, 2), out=_by_head(d_query[..., : dims.nope]))
        d_query[..., dims.nope :] = d_absorbed[..., dims.latent :]
        d_up = None
        if ctx.needs_input_grad[2]:  # not where it is frozen, under an adapter elsewhere
            d_up = up_projection.new_empty((dims.latent, query.shape[2], dims.nope + dims.value))
            q_nope = _by_head(query[..., : dims.nope])
            d_up[..., : dims.nope] = torch.bmm(d_nope.transpose(1, 2), q_nope).transpose(0, 1)
            d_value = torch.bmm(_by_head(out).transpose(1, 2), d_output)
            d_up[..., dims.nope :] = d_value.transpose(0, 1)
            d_up = d_up.flatten(1)
        return d_query, d_latent.to(latent.dtype).unsqueeze(2), d_up, *5 * [None]


def latent_attention(absorbed: AbsorbedInputs) -> Tensor:
    """Attention of queries that are absorbed already, [s, b, n, latent]."""
    return _LatentAttention.apply(*absorbed)


class _LatentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *absorbed):
        absorbed = AbsorbedInputs(*absorbed)
        out, lse = _forward(absorbed)
        ctx.save_for_backward(*absorbed[:5], out, lse)
        ctx.latent_dim, ctx.softmax_scale = absorbed[5:]
        return out

    @staticmethod
    def backward(ctx, d_out):
        *tensors, out, lse = ctx.saved_tensors
        absorbed = AbsorbedInputs(*tensors, ctx.latent_dim, ctx.softmax_scale)
        d_query, d_latent = _backward(absorbed, out, lse, d_out.contiguous())
        return d_query, d_latent.to(absorbed.latent.dtype), None, None, None, None, None


def _forward(absorbed: AbsorbedInputs) -> tuple[Tensor, Tensor]:
    return compute("sparse_attention.forward", absorbed.call, absorbed)


def _backward(
    absorbed: AbsorbedInputs, out: Tensor, lse: Tensor, d_out: Tensor
) -> tuple[Tensor, Tensor]:
    return compute("sparse_attention.backward", absorbed.call, absorbed, out, lse, d_out)


def absorbed_inputs(attention: AttentionInputs) -> AbsorbedInputs:
    """Of attention with a top-k."""
    return AbsorbedInputs(
        absorb(attention.query, attention.up_projection, attention.dims),
        attention.latent.squeeze(2).contiguous(),
        attention.topk_indices.contiguous(),
        *attention.queries.spans(),
        attention.dims.latent,
        attention.softmax_scale,
    )


def absorb(query: Tensor, up_projection: Tensor, dims: MLADims) -> Tensor:
    """[s, b, n, nope + rope] -> [s, b, n, latent + rope]."""
    absorbed = query.new_empty((*query.shape[:3], dims.latent + dims.rope))
    triton.project(query, _key_projection(up_projection, dims), absorbed, copied=dims.rope)
    return absorbed


def _by_head(tensor: Tensor) -> Tensor:
    """[s, b, n, d] -> a view [n, s * b, d]."""
    return tensor.flatten(0, 1).transpose(0, 1)


def _key_projection(up_projection: Tensor, dims: MLADims) -> Tensor:
    """[latent, n * (nope + value)] -> a view [n, nope, latent]."""
    per_head = up_projection.unflatten(-1, (-1, dims.nope + dims.value))
    return per_head[..., : dims.nope].permute(1, 2, 0)


def _value_projection(up_projection: Tensor, dims: MLADims) -> Tensor:
    """[latent, n * (nope + value)] -> a view [n, latent, value]."""
    per_head = up_projection.unflatten(-1, (-1, dims.nope + dims.value))
    return per_head[..., dims.nope :].transpose(0, 1)
