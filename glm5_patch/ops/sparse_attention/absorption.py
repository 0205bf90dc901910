"""Sparse attention with the up-projection of keys folded into the queries, differentiable."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from .. import compared as libraries
from ..query_positions import QueryPositions, visible_topk
from . import triton as sparse_mla


def absorbed_attention(
    query: Tensor,
    latent: Tensor,
    up: Tensor,
    topk_indices: Tensor | None,
    queries: QueryPositions,
    dims,
    scale,
) -> Tensor:
    """As ``model.sparse_mla.sparse_mla``: a query times its key's projection meets the latent
    itself, and what comes out of the latent is projected to values after."""
    if topk_indices is None:
        topk_indices = visible_topk(queries, query.shape[1])
    return _AbsorbedAttention.apply(query, latent, up, topk_indices, queries, dims, scale)


class _AbsorbedAttention(torch.autograd.Function):
    """Keeps what comes out of the latent; the absorbed queries, as large, are made again."""

    @staticmethod
    def forward(ctx, query, latent, up, topk_indices, queries, dims, scale):
        s, b, heads, _ = query.shape
        where = (topk_indices.contiguous(), *queries.spans())
        # [t, b, 1, latent + rope] -> [t, b, latent + rope]
        absorbed, latent = absorb(query, up, dims), latent.squeeze(2).contiguous()
        out, lse = _run_forward(absorbed, latent, *where, dims.latent, scale)
        output = query.new_empty((s, b, heads, dims.value))
        torch.bmm(_by_head(out), _up_value(up, dims), out=_by_head(output))
        ctx.save_for_backward(query, latent, up, *where, out, lse)
        ctx.dims, ctx.scale = dims, scale
        return output.flatten(2)

    @staticmethod
    def backward(ctx, d_output):
        query, latent, up, *where, out, lse = ctx.saved_tensors
        dims = ctx.dims
        d_output = _by_head(d_output.unflatten(2, (-1, dims.value)))
        up_key, up_value = _up_key(up, dims), _up_value(up, dims)
        d_out = out.new_empty(out.shape)
        torch.bmm(d_output, up_value.transpose(1, 2), out=_by_head(d_out))
        absorbed = absorb(query, up, dims)
        d_absorbed, d_latent = _run_backward(absorbed, latent, *where, d_out, out, lse, ctx.scale)
        d_query = query.new_empty(query.shape)
        d_key_side = _by_head(d_absorbed[..., : dims.latent])
        torch.bmm(d_key_side, up_key.transpose(1, 2), out=_by_head(d_query[..., : dims.nope]))
        d_query[..., dims.nope :] = d_absorbed[..., dims.latent :]
        d_up = None
        if ctx.needs_input_grad[2]:  # not where it is frozen, under an adapter elsewhere
            d_up = up.new_empty((dims.latent, query.shape[2], dims.nope + dims.value))
            q_nope = _by_head(query[..., : dims.nope])
            d_up[..., : dims.nope] = torch.bmm(d_key_side.transpose(1, 2), q_nope).transpose(0, 1)
            d_value_side = torch.bmm(_by_head(out).transpose(1, 2), d_output)
            d_up[..., dims.nope :] = d_value_side.transpose(0, 1)
            d_up = d_up.flatten(1)
        return d_query, d_latent.to(latent.dtype).unsqueeze(2), d_up, None, None, None, None


def latent_attention(
    absorbed: Tensor,
    latent: Tensor,
    topk_indices: Tensor,
    starts: Tensor,
    positions: Tensor,
    latent_dim: int,
    scale: float,
) -> Tensor:
    """Attention of queries that are absorbed already, [s, b, n, latent]; args as of
    ``kernels.sparse_mla.forward``."""
    return _LatentAttention.apply(
        absorbed.contiguous(),
        latent.contiguous(),
        topk_indices,
        starts,
        positions,
        latent_dim,
        scale,
    )


class _LatentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, absorbed, latent, topk_indices, starts, positions, latent_dim, scale):
        where = (topk_indices, starts, positions)
        out, lse = _run_forward(absorbed, latent, *where, latent_dim, scale)
        ctx.save_for_backward(absorbed, latent, *where, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, d_out):
        absorbed, latent, *where, out, lse = ctx.saved_tensors
        d_absorbed, d_latent = _run_backward(
            absorbed, latent, *where, d_out.contiguous(), out, lse, ctx.scale
        )
        return d_absorbed, d_latent.to(latent.dtype), None, None, None, None, None


def _run_forward(absorbed, latent, topk_indices, starts, positions, latent_dim, scale):
    args = (absorbed, latent, topk_indices, starts, positions, latent_dim, scale)

    def ours():
        return (hopper_kernels(absorbed, latent, latent_dim) or sparse_mla).forward(*args)

    if not libraries.takes("flash_mla", absorbed, latent_dim, topk_indices.shape[-1]):
        return ours()
    from .flash_mla import forward

    return libraries.compared(
        "flash_mla", f"forward of {absorbed.shape[2]} heads", lambda: forward(*args), ours
    )


def _run_backward(absorbed, latent, topk_indices, starts, positions, d_out, out, lse, scale):
    where = (absorbed, latent, topk_indices, starts, positions, d_out)
    deterministic = torch.are_deterministic_algorithms_enabled()
    latent_dim = d_out.shape[-1]

    def ours():
        args = (*where, lse, sparse_mla.row_terms(out, d_out), scale)
        hopper = None if deterministic else hopper_kernels(absorbed, latent, latent_dim)
        return hopper.backward(*args) if hopper else sparse_mla.backward(*args, deterministic)

    if deterministic or not libraries.takes("cudnn", absorbed, latent_dim, topk_indices.shape[-1]):
        return ours()
    from .cudnn import backward

    return libraries.compared(
        "cudnn",
        f"backward of {absorbed.shape[2]} heads",
        lambda: backward(*where, out, lse, scale),
        ours,
    )


def _by_head(tensor: Tensor) -> Tensor:
    """[s, b, n, d] -> a view [n, s * b, d]."""
    return tensor.flatten(0, 1).transpose(0, 1)


def _up_key(up: Tensor, dims) -> Tensor:
    """[latent, n * (nope + value)] -> a view [n, nope, latent]."""
    return up.unflatten(-1, (-1, dims.nope + dims.value))[..., : dims.nope].permute(1, 2, 0)


def _up_value(up: Tensor, dims) -> Tensor:
    """[latent, n * (nope + value)] -> a view [n, latent, value]."""
    return up.unflatten(-1, (-1, dims.nope + dims.value))[..., dims.nope :].transpose(0, 1)


def absorb(query: Tensor, up: Tensor, dims) -> Tensor:
    """[s, b, n, nope + rope] -> [s, b, n, latent + rope]."""
    absorbed = query.new_empty((*query.shape[:3], dims.latent + dims.rope))
    nope, latent = query[..., : dims.nope], absorbed[..., : dims.latent]
    torch.bmm(_by_head(nope), _up_key(up, dims), out=_by_head(latent))
    absorbed[..., dims.latent :] = query[..., dims.nope :]
    return absorbed


def hopper_kernels(query: Tensor, latent: Tensor, latent_dim: int):
    """The kernels in explicit layouts, where they fit; None elsewhere."""
    hopper = _hopper_module() if query.is_cuda else None
    return hopper if hopper and hopper.why_not(query, latent, latent_dim) is None else None


@functools.cache
def _hopper_module():
    """None where this Triton has another Gluon, which is not stable yet."""
    try:
        from . import gluon as sparse_mla_hopper
    except (ImportError, AttributeError, TypeError) as error:
        warnings.warn(
            f"glm5-patch: this Triton's Gluon is unknown ({error}); sparse attention takes the "
            "plain Triton kernels, about half as fast",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return sparse_mla_hopper
