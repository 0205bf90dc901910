"""Attention over the selected keys, in windows of queries: memory linear in the sequence length.

For one window the logits of all keys up to it are computed and the unselected ones masked; only the
log-sum-exp is kept, and the backward pass computes the probabilities again (FlashAttention,
arXiv 2205.14135, with an explicit mask). Accumulation is fp32. A query's output has the same bits
whatever else is in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..query_positions import (
    WINDOW,
    QueryPositions,
    Window,
    query_blocks,
    sequences,
    windows,
)
from ..registry import backend
from .inputs import AbsorbedInputs, AttentionInputs

LOG2_E = math.log2(math.e)
NO_KEYS = -1e30
"""The log-sum-exp of a query without keys."""


@backend("sparse_attention", name="torch")
def sparse_attention(attention: AttentionInputs) -> tuple[Tensor, None]:
    """Attention with the keys and values of every head, see ``operation.sparse_attention``."""
    query, topk_indices = attention.query, attention.topk_indices
    output = blocked_attention(
        query, *keys_and_values(attention), topk_indices, attention.queries, attention.softmax_scale
    )
    return output, None


def keys_and_values(attention: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Keys [t, b, n, nope + rope] and values [t, b, n, value] of every head."""
    dims = attention.dims
    latent, rope = attention.latent.squeeze(2).split([dims.latent, dims.rope], dim=-1)
    per_head = _by_window(latent.flatten(0, 1), attention.up_projection)
    per_head = per_head.unflatten(0, latent.shape[:2])
    per_head = per_head.unflatten(-1, (-1, dims.nope + dims.value))
    nope, value = per_head.split([dims.nope, dims.value], dim=-1)
    rope = rope.unsqueeze(2).expand(-1, -1, nope.shape[2], -1)
    return torch.cat([nope, rope], dim=-1), value


def _by_window(tensor: Tensor, projection: Tensor) -> Tensor:
    """A product [rows, x] @ [x, y] in products of the same shape, whatever the number of rows."""
    padded = torch.nn.functional.pad(tensor, (0, 0, 0, -len(tensor) % WINDOW))
    parts = [part.contiguous() @ projection for part in padded.split(WINDOW)]
    return torch.cat(parts)[: len(tensor)]


def blocked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    topk_indices: Tensor | None,
    queries: QueryPositions,
    softmax_scale: float,
) -> Tensor:
    """Softmax attention of each query over the keys that its top-k names.

    Args:
        query: [s, b, n, d].
        key: [t, b, n, d]; t is s, or more under context parallelism.
        value: [t, b, n, dv].
        topk_indices: int32 [b, s, k], see ``selected_keys``.
        queries: where the queries stand among the keys.
        softmax_scale: factor of the logits.

    Returns:
        [s, b, n * dv], of the value's dtype. A query without any key gets zeros.
    """
    output = _BlockedAttention.apply(query, key, value, topk_indices, queries, softmax_scale)
    return output.flatten(2)


def window_logits(query: Tensor, key: Tensor, mask: Tensor, softmax_scale: float) -> Tensor:
    """fp32 [b, n, size, width] of one window, -inf where ``mask`` is False.

    Args:
        query: [size, b, n, d].
        key: [width, b, n, d].
        mask: bool [b or 1, size, width].
        softmax_scale: factor of the logits.
    """
    logits = torch.matmul(heads_first(query), heads_first(key).transpose(-1, -2))
    return logits.mul_(softmax_scale).masked_fill_(~mask[:, None], float("-inf"))


def heads_first(tensor: Tensor) -> Tensor:
    """[rows, b, n, d] -> fp32 [b, n, rows, d]."""
    return tensor.permute(1, 2, 0, 3).float()


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, topk_indices, queries, softmax_scale):
        s, b, n, _ = query.shape
        output = value.new_empty((s, b, n, value.shape[-1]))
        lse = torch.empty((s, b, n), dtype=torch.float32, device=query.device)
        for batch, window, logits in _logits(query, key, topk_indices, queries, softmax_scale):
            # exp(-inf - 0) is 0 for a query without keys; exp(-inf + inf) would be nan.
            window_lse = logits.logsumexp(-1)  # [b, n, size]
            window_lse.masked_fill_(window_lse == float("-inf"), 0.0)
            v = heads_first(window.of_keys(value[:, batch]))
            out = logits.sub_(window_lse[..., None]).exp_() @ v  # [b, n, size, dv]
            output[window.rows, batch] = out.permute(2, 0, 1, 3)[window.slots].to(output.dtype)
            lse[window.rows, batch] = window_lse.permute(2, 0, 1)[window.slots]
        ctx.save_for_backward(query, key, value, topk_indices, output, lse)
        ctx.queries, ctx.softmax_scale = queries, softmax_scale
        return output

    @staticmethod
    def backward(ctx, grad_output):
        query, key, value, topk_indices, output, lse = ctx.saved_tensors
        # [s, b, n]: sum over the value dimension, the softmax backward's row term.
        delta = (grad_output.float() * output.float()).sum(-1)
        dq = torch.empty_like(query)
        dk, dv = (torch.zeros_like(t, dtype=torch.float32) for t in (key, value))
        inputs = query, key, topk_indices, ctx.queries, ctx.softmax_scale
        for batch, window, logits in _logits(*inputs):
            seen = window.keys.stop - window.keys.start
            q, d_out = (
                heads_first(window.of_queries(tensor[:, batch])) for tensor in (query, grad_output)
            )
            k, v = (heads_first(window.of_keys(tensor[:, batch])) for tensor in (key, value))
            row_lse, row_delta = (
                window.of_queries(tensor[:, batch]).permute(1, 2, 0)[..., None]
                for tensor in (lse, delta)
            )
            probs = logits.sub_(row_lse).exp_()  # [b, n, size, width]
            d_value = probs.transpose(-1, -2) @ d_out
            d_logits = (d_out @ v.transpose(-1, -2)).sub_(row_delta)
            d_logits = d_logits.mul_(probs).mul_(ctx.softmax_scale)
            d_query = (d_logits @ k).permute(2, 0, 1, 3)[window.slots]
            d_key = d_logits.transpose(-1, -2) @ q
            dq[window.rows, batch] = d_query.to(dq.dtype)
            dk[window.keys, batch] += d_key.permute(2, 0, 1, 3)[:seen]
            dv[window.keys, batch] += d_value.permute(2, 0, 1, 3)[:seen]
        return dq, dk.to(key.dtype), dv.to(value.dtype), None, None, None


def _logits(
    query: Tensor,
    key: Tensor,
    topk_indices: Tensor | None,
    queries: QueryPositions,
    softmax_scale: float,
) -> Iterator[tuple[slice, Window, Tensor]]:
    """Of every window, and the sequences that are computed together: ``window_logits`` of what its
    queries attend to."""
    b = query.shape[1]
    for window in windows(queries, query.shape[2] * 4):
        for batch in sequences(b, query.device):
            mask = window.selected(None if topk_indices is None else topk_indices[batch])
            q, k = window.of_queries(query[:, batch]), window.of_keys(key[:, batch])
            yield batch, window, window_logits(q, k, mask, softmax_scale)


@backend("sparse_attention.forward", name="torch")
def forward(absorbed: AbsorbedInputs) -> tuple[Tensor, Tensor]:
    """Attention of each query over the latents that its top-k names.

    Returns:
        [s, b, n, latent], of the query's dtype, zeros for a query without keys; and the
        log2-sum-exp2 of the logits, fp32 [s, b, n], ``NO_KEYS`` likewise.
    """
    out = absorbed.query.new_empty((*absorbed.query.shape[:3], absorbed.latent_dim))
    lse = torch.empty(out.shape[:3], dtype=torch.float32, device=out.device)
    for block in gathered_blocks(absorbed):
        _, latent, valid = gathered(absorbed, block)
        logits = log2_logits(absorbed, block, latent, valid)  # [block, b, n, k]
        block_lse = (logits * math.log(2)).logsumexp(-1) * LOG2_E
        lse[block] = block_lse.masked_fill(block_lse == float("-inf"), NO_KEYS)
        probs = torch.exp2(logits - lse[block, ..., None])
        out[block] = torch.matmul(probs, latent[..., : absorbed.latent_dim]).to(out.dtype)
    return out, lse


@backend("sparse_attention.backward", name="torch")
def backward(
    absorbed: AbsorbedInputs, out: Tensor, lse: Tensor, d_out: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of ``forward``.

    Args:
        absorbed: what it was given.
        out, lse: what it returned.
        d_out: [s, b, n, latent], contiguous.

    Returns:
        Of the queries, in their dtype, and of the latents, fp32 [t, b, latent + rope] or in their
        dtype.
    """
    d_query = torch.empty_like(absorbed.query)
    d_latent = torch.zeros_like(absorbed.latent, dtype=torch.float32)
    row_terms = (out.float() * d_out.float()).sum(-1)  # [s, b, n]
    for block in gathered_blocks(absorbed):
        key, latent, valid = gathered(absorbed, block)
        logits = log2_logits(absorbed, block, latent, valid)
        probs = torch.exp2(logits - lse[block, ..., None])  # [block, b, n, k]
        upstream = d_out[block].float()
        d_probs = torch.matmul(upstream, latent[..., : absorbed.latent_dim].transpose(-1, -2))
        d_logits = probs * (d_probs - row_terms[block, ..., None]) * absorbed.softmax_scale
        d_query[block] = torch.matmul(d_logits, latent).to(d_query.dtype)
        # [block, b, k, latent + rope]: what each query adds to each of its keys
        d_keys = torch.matmul(d_logits.transpose(-1, -2), absorbed.query[block].float())
        d_keys[..., : absorbed.latent_dim] += torch.matmul(probs.transpose(-1, -2), upstream)
        d_latent.flatten(0, 1).index_add_(0, key.flatten(), d_keys.flatten(0, 2))
    return d_query, d_latent


def gathered_blocks(absorbed: AbsorbedInputs):
    b, s, k = absorbed.topk_indices.shape
    return query_blocks(s, b * k * absorbed.query.shape[-1] * 4)


def gathered(absorbed: AbsorbedInputs, block: slice) -> tuple[Tensor, Tensor, Tensor]:
    """The keys of a block of queries, as rows of the flat latent, [block, b, k]; their latents,
    fp32 [block, b, k, latent + rope]; and which places name a key."""
    local = absorbed.topk_indices[:, block].transpose(0, 1)
    b = local.shape[1]
    key = (local.clamp_min(0) + absorbed.starts[block, None, None]).long() * b
    key = key + torch.arange(b, device=key.device)[:, None]
    return key, absorbed.latent.flatten(0, 1)[key].float(), local >= 0


def log2_logits(absorbed: AbsorbedInputs, block: slice, latent: Tensor, valid: Tensor) -> Tensor:
    """[block, b, n, k], in powers of two, -inf of an empty place."""
    logits = torch.matmul(absorbed.query[block].float(), latent.transpose(-1, -2))
    logits = logits * (absorbed.softmax_scale * LOG2_E)
    return logits.masked_fill(~valid[:, :, None], float("-inf"))
