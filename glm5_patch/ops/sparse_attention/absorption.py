"""Sparse attention with the up-projection of keys folded into the queries, differentiable."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..fallback import compute
from ..registry import backend
from . import triton
from .inputs import AbsorbedInputs, AttentionInputs, MLADims

BLOCK_ROWS = 512
"""Queries that a block has at least."""
ABSORBED_BYTES = 1 << 30
"""What the absorbed queries of one block may take: those of 14,563 tokens with 64 heads in bf16.
What comes out of the latent and the gradients of both take about as much each."""
KEPT_BYTES = 8 << 30
"""What comes out of the latent is kept for the backward if it takes no more: that of 131,072 tokens
with 64 heads in bf16. Else the backward computes it again."""
KEPT_QUERY_BYTES = 4 << 30
"""Queries are kept for the backward if they take no more: those of as many tokens. Else the
backward makes them again, if ``AttentionInputs.make_query`` can."""
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
    return _AbsorbedAttention.apply(torch.is_grad_enabled() and _recomputes(), *attention)


def in_blocks(attention: AttentionInputs, places: int) -> Iterator[tuple[slice, AttentionInputs]]:
    """Attention in blocks of queries of about the same size, whole if it fits.

    Args:
        attention: what to cut.
        places: most that a top-k of every visible key may have, of one block without a top-k.

    Yields:
        Which queries, and their attention.
    """
    s, b, heads, _ = attention.query.shape
    width = attention.dims.latent + attention.dims.rope
    most = ABSORBED_BYTES // (b * heads * width * attention.query.element_size())
    if attention.topk_indices is None:
        most = min(most, places // (b * attention.queries.most_keys))
    blocks = -(-s // max(BLOCK_ROWS, most))
    if blocks <= 1:
        yield slice(0, s), attention
        return
    rows = -(-s // blocks)
    for first in range(0, s, rows):
        block = slice(first, min(first + rows, s))
        yield block, attention.of_queries(block)


class _AbsorbedAttention(torch.autograd.Function):
    """Works on one block of queries at a time: what is as wide as the latent exists for one alone,
    but for what comes out of it, which is kept for the backward if it is small. The backward makes
    absorbed queries again, but for a ``_KeptQuery``, and a top-k of every visible key, which grows
    with the square of the sequence."""

    @staticmethod
    def forward(ctx, recomputed, *attention):
        attention = AttentionInputs(*attention)
        if attention.topk_indices is not None:
            attention = attention._replace(topk_indices=attention.topk_indices.contiguous())
        query, dims = attention.query, attention.dims
        output = query.new_empty((*query.shape[:3], dims.value))
        keeps = query.nbytes // query.shape[-1] * dims.latent <= KEPT_BYTES
        blocks = list(in_blocks(attention, VISIBLE_PLACES))
        keeps_absorbed = len(blocks) == 1 and recomputed
        attended = [_attend(part, output[rows], keeps, keeps_absorbed) for rows, part in blocks]
        kept, lses, absorbed_queries = zip(*attended)
        lse = lses[0] if len(lses) == 1 else torch.cat(lses)
        ctx.make_query = attention.make_query if query.nbytes > KEPT_QUERY_BYTES else None
        kept_query = query if ctx.make_query is None else None
        ctx.save_for_backward(kept_query, *attention[1:4], lse, *kept)
        # Not among what is saved: a checkpoint compares that of a recompute with the forward's.
        ctx.absorbed = _KeptQuery(absorbed_queries[0]) if keeps_absorbed else None
        ctx.queries, ctx.dims, ctx.softmax_scale = attention[4:7]
        ctx.mark_non_differentiable(lse)
        return output.flatten(2), lse

    @staticmethod
    def backward(ctx, d_output, _):
        query, latent, up_projection, topk_indices, lse, *kept = ctx.saved_tensors
        absorbed_query = None if ctx.absorbed is None else ctx.absorbed.take()
        if query is None:
            query = ctx.make_query()
        tensors = query, latent, up_projection, topk_indices
        attention = AttentionInputs(*tensors, ctx.queries, ctx.dims, ctx.softmax_scale, lse)
        d_output = d_output.unflatten(2, (-1, ctx.dims.value))
        d_query = query.new_empty(query.shape)
        trains_up = ctx.needs_input_grad[3]  # not where it is frozen, under an adapter elsewhere
        sums = None, None
        for (rows, part), out in zip(in_blocks(attention, VISIBLE_PLACES), kept):
            of_rows = part, absorbed_query, out, d_output[rows], d_query[rows]
            sums = [_plus(*pair) for pair in zip(sums, _gradients(*of_rows, trains_up))]
        d_latent, d_up = sums
        if d_up is not None:
            d_up = d_up.to(up_projection.dtype).flatten(1)
        return None, d_query, d_latent.to(latent.dtype).unsqueeze(2), d_up, *6 * [None]


class _KeptQuery:
    """The absorbed queries of a recompute of a single block, for the backward that follows. Where
    several are recomputed before the first goes backward, those of the last alone are kept."""

    _last: Callable[[], _KeptQuery | None] = staticmethod(lambda: None)

    def __init__(self, query: Tensor) -> None:
        if (before := _KeptQuery._last()) is not None:
            before.take()
        self._query: Tensor | None = query
        _KeptQuery._last = weakref.ref(self)

    def take(self) -> Tensor | None:
        """Them, once; None: they are not kept any more."""
        query, self._query = self._query, None
        return query


def _recomputes() -> bool:
    """Whether autograd is going backward: a forward is then a checkpoint's recompute."""
    return torch._C._current_graph_task_id() != -1


def _attend(
    part: AttentionInputs, output: Tensor, keeps: bool, keeps_absorbed: bool
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Attention of some queries.

    Args:
        part: theirs.
        output: [rows, b, n, value], written.
        keeps: whether what comes out of the latent is returned.
        keeps_absorbed: whether the absorbed queries are.

    Returns:
        What comes out of the latent, or None; the log2-sum-exp2, as of ``reference.forward``; and
        the absorbed queries, or None.
    """
    absorbed = _absorbed(part)
    out, lse = _forward(absorbed)
    triton.project(out, _value_projection(part.up_projection, part.dims), output)
    return out if keeps else None, lse, absorbed.query if keeps_absorbed else None


def _gradients(
    part: AttentionInputs,
    absorbed_query: Tensor | None,
    out: Tensor | None,
    d_output: Tensor,
    d_query: Tensor,
    of_up_projection: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of ``_attend``.

    Args:
        part: what it was given.
        absorbed_query: its queries, absorbed; None: they are made again.
        out: what came out of the latent; None: it is computed again.
        d_output: [rows, b, n, value].
        d_query: [rows, b, n, nope + rope], written.
        of_up_projection: whether that one's is wanted.

    Returns:
        Of the latent, [t, b, latent + rope], and of the up-projection, [latent, n, nope + value].
    """
    query, up_projection, dims = part.query, part.up_projection, part.dims
    absorbed = _absorbed(part, absorbed_query)
    if out is None:
        out, _ = _forward(absorbed)
    d_output = _by_head(d_output)
    d_out = out.new_empty(out.shape)
    value_projection = _value_projection(up_projection, dims)
    torch.bmm(d_output, value_projection.transpose(1, 2), out=_by_head(d_out))
    d_absorbed, d_latent = _backward(absorbed, out, part.lse, d_out)
    d_nope = _by_head(d_absorbed[..., : dims.latent])
    key_projection = _key_projection(up_projection, dims)
    torch.bmm(d_nope, key_projection.transpose(1, 2), out=_by_head(d_query[..., : dims.nope]))
    d_query[..., dims.nope :] = d_absorbed[..., dims.latent :]
    if not of_up_projection:
        return d_latent, None
    d_up = up_projection.new_empty((dims.latent, query.shape[2], dims.nope + dims.value))
    q_nope = _by_head(query[..., : dims.nope])
    d_up[..., : dims.nope] = torch.bmm(d_nope.transpose(1, 2), q_nope).transpose(0, 1)
    d_value = torch.bmm(_by_head(out).transpose(1, 2), d_output)
    d_up[..., dims.nope :] = d_value.transpose(0, 1)
    return d_latent, d_up


def _plus(total: Tensor | None, block: Tensor | None) -> Tensor | None:
    """The sum over blocks, in fp32 from the second one on."""
    return block if total is None else total.float().add_(block)


def _absorbed(part: AttentionInputs, query: Tensor | None = None) -> AbsorbedInputs:
    return absorbed_inputs(part.with_topk(TOPK_MULTIPLE), query)


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


def absorbed_inputs(attention: AttentionInputs, query: Tensor | None = None) -> AbsorbedInputs:
    """Of attention with a top-k.

    Args:
        attention: that.
        query: its queries, absorbed already; None: they are absorbed here.
    """
    if query is None:
        query = absorb(attention.query, attention.up_projection, attention.dims)
    return AbsorbedInputs(
        query,
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
