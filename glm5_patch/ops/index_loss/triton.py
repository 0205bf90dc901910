"""The indexer's loss over the selected keys in Triton, with its gradients, in one pass over them.

See ``model.indexer_loss`` for what it computes. Nothing larger than the top-k itself is kept: the
attention's probabilities summed over the heads, and the index scores, are [b, s, k].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..query_positions import QueryPositions
from ..registry import LOSS_HEADS
from ..sparse_attention.absorption import absorb
from ..sparse_attention.triton import (
    LOG2_E,
    add_in_order,
    add_rows,
    gather_columns,
    heads_of_a_program,
    load_columns,
    load_span,
    precision,
    tile_of_keys,
)

_EPS = 1e-10


@triton.jit
def _logits(
    KV, q_0, q_1, q_rope, key, scale_log2,
    LATENT: tl.constexpr, ROPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = LATENT // 2
    latent_0 = gather_columns(KV, key, 0, HALF)
    latent_1 = gather_columns(KV, key, HALF, HALF)
    rope = gather_columns(KV, key, LATENT, ROPE)
    logits = tl.dot(q_0, tl.trans(latent_0), input_precision=PRECISION)
    logits = tl.dot(q_1, tl.trans(latent_1), logits, input_precision=PRECISION)
    return tl.dot(q_rope, tl.trans(rope), logits, input_precision=PRECISION) * scale_log2


@triton.jit
def _target(
    Q, KV, TOPK, STARTS, POSITIONS, TARGET,
    rows, batch, heads, k, scale_log2,
    LATENT: tl.constexpr, ROPE: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention probabilities of one query, summed over its heads."""
    WIDTH: tl.constexpr = LATENT + ROPE
    HALF: tl.constexpr = LATENT // 2
    row = rows - 1 - tl.program_id(0) // batch
    b = tl.program_id(0) % batch
    head = tl.arange(0, HEADS)
    own = head < heads
    query = (row * batch + b).to(tl.int64) * heads + head
    q_0 = load_columns(Q, query * WIDTH, 0, HALF, own)
    q_1 = load_columns(Q, query * WIDTH, HALF, HALF, own)
    q_rope = load_columns(Q, query * WIDTH, LATENT, ROPE, own)
    start, seen = load_span(STARTS, POSITIONS, row)
    count = tl.minimum(seen, k)
    line = (b.to(tl.int64) * rows + row) * k
    largest = tl.full([HEADS], -1e30, tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    for first in range(0, count, KEYS):
        key, valid = tile_of_keys(TOPK + line, first, count, start, batch, b, KEYS, WIDTH)
        logits = _logits(KV, q_0, q_1, q_rope, key, scale_log2, LATENT, ROPE, PRECISION)
        logits = tl.where(valid[None, :], logits, -1e30)
        larger = tl.maximum(largest, tl.max(logits, 1))
        probs = tl.where(valid[None, :], tl.exp2(logits - larger[:, None]), 0.0)
        total = total * tl.exp2(largest - larger) + tl.sum(probs, 1)
        largest = larger
    lse = largest + tl.log2(tl.where(total > 0, total, 1.0))
    for first in range(0, count, KEYS):
        key, valid = tile_of_keys(TOPK + line, first, count, start, batch, b, KEYS, WIDTH)
        logits = _logits(KV, q_0, q_1, q_rope, key, scale_log2, LATENT, ROPE, PRECISION)
        probs = tl.exp2(logits - lse[:, None])
        probs = tl.where(valid[None, :] & own[:, None], probs, 0.0)
        place = first + tl.arange(0, KEYS)
        tl.store(TARGET + line + place, tl.sum(probs, 0), mask=place < count)


@triton.jit
def _loss(
    Q, K, WEIGHTS, TOPK, STARTS, POSITIONS, TARGET, SCORES, LOSS, D_Q, D_K, D_WEIGHTS,
    first_row, end_row, rows, batch, k, scale, loss_scale,
    HEADS: tl.constexpr, DIM: tl.constexpr, KEYS: tl.constexpr,
    ATOMIC: tl.constexpr, PRECISION: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """KL(target || softmax(index scores)) of one query over its keys, and its gradients."""
    row = end_row - 1 - tl.program_id(0) // batch
    b = tl.program_id(0) % batch
    query = (row * batch + b).to(tl.int64) * HEADS + tl.arange(0, HEADS)
    everyone = tl.arange(0, HEADS) >= 0
    q = load_columns(Q, query * DIM, 0, DIM, everyone)
    weights = tl.load(WEIGHTS + query) * scale
    start, seen = load_span(STARTS, POSITIONS, row)
    count = tl.minimum(seen, k)
    line = (b.to(tl.int64) * rows + row) * k
    largest, total, mass = -1e30, 0.0, 0.0
    for first in range(0, count, KEYS):
        key, valid = tile_of_keys(TOPK + line, first, count, start, batch, b, KEYS, DIM)
        index_key = gather_columns(K, key, 0, DIM)
        products = tl.dot(q, tl.trans(index_key), input_precision=PRECISION)
        scores = tl.sum(tl.maximum(products, 0.0) * weights[:, None], 0)
        place = first + tl.arange(0, KEYS)
        tl.store(SCORES + line + place, scores, mask=place < count)
        mass += tl.sum(tl.load(TARGET + line + place, mask=valid, other=0.0), 0)
        scores = tl.where(valid, scores, -1e30)
        larger = tl.maximum(largest, tl.max(scores, 0))
        total = total * tl.exp(largest - larger)
        total += tl.sum(tl.where(valid, tl.exp(scores - larger), 0.0), 0)
        largest = larger
    lse = largest + tl.log(tl.where(total > 0, total, 1.0))
    mass = tl.maximum(mass, EPS)
    tl.debug_barrier()  # the scores come back to other threads
    loss = 0.0
    d_q = tl.zeros([HEADS, DIM], tl.float32)
    d_weights = tl.zeros([HEADS], tl.float32)
    for first in range(0, count, KEYS):
        key, valid = tile_of_keys(TOPK + line, first, count, start, batch, b, KEYS, DIM)
        place = first + tl.arange(0, KEYS)
        target = tl.load(TARGET + line + place, mask=valid, other=0.0) / mass
        log_predicted = tl.load(SCORES + line + place, mask=valid, other=0.0) - lse
        terms = target * (tl.log(tl.maximum(target, EPS)) - log_predicted)
        loss += tl.sum(tl.where(valid, terms, 0.0), 0)
        d_scores = tl.where(valid, tl.exp(log_predicted) - target, 0.0)
        index_key = gather_columns(K, key, 0, DIM)
        products = tl.dot(q, tl.trans(index_key), input_precision=PRECISION)
        d_weights += tl.sum(tl.maximum(products, 0.0) * d_scores[None, :], 1) * scale
        d_products = tl.where(products > 0, weights[:, None] * d_scores[None, :], 0.0).to(q.dtype)
        d_q = tl.dot(d_products, index_key, d_q, input_precision=PRECISION)
        part = tl.dot(tl.trans(d_products), q, input_precision=PRECISION) * loss_scale
        if ATOMIC:
            target_row = key
        else:
            pair = ((row - first_row) * batch + b).to(tl.int64) * k + place
            target_row = pair * DIM
        add_rows(D_K, target_row, 0, DIM, part, valid, ATOMIC)
    tl.store(LOSS + b.to(tl.int64) * rows + row, loss)
    columns = tl.arange(0, DIM)
    tl.store(D_Q + query[:, None] * DIM + columns[None, :], d_q * loss_scale)
    tl.store(D_WEIGHTS + query, d_weights * loss_scale)


def target(
    query: Tensor, latent: Tensor, topk_indices: Tensor, starts, positions, latent_dim, scale
) -> Tensor:
    """Attention probabilities over the selected keys, summed over the heads, fp32 [b, s, k].

    Args as of ``sparse_mla.forward``; places without a key get 0.
    """
    s, b, heads, width = query.shape
    out = torch.zeros(topk_indices.shape, dtype=torch.float32, device=query.device)
    block = heads_of_a_program(heads, LOSS_HEADS)
    _target[(s * b,)](
        query, latent, topk_indices, starts, positions, out,
        s, b, heads, topk_indices.shape[-1], scale * LOG2_E,
        LATENT=latent_dim, ROPE=width - latent_dim, HEADS=block, KEYS=64,
        PRECISION=precision(query.dtype), num_warps=8 if block > 32 else 4,
    )  # fmt: skip
    return out


def attention_target(
    query: Tensor,
    latent: Tensor,
    up: Tensor,
    topk_indices: Tensor,
    queries: QueryPositions,
    dims,
    scale: float,
) -> Tensor:
    """As ``target``, of queries that are not absorbed; args as of ``model.sparse_mla``."""
    return target(
        absorb(query, up, dims),
        latent.squeeze(2).contiguous(),
        topk_indices,
        *queries.spans(),
        dims.latent,
        scale,
    )


def sparse_indexer_loss(
    inputs,
    target: Tensor,
    topk_indices: Tensor,
    queries: QueryPositions,
    scale: float,
    loss_scale: float,
) -> Tensor:
    """As ``model.indexer_loss.indexer_loss`` with ``sparse``, of a target that is there already.

    Args:
        inputs: ``IndexerInputs``, with their graph.
        target: fp32 [b, s, k], of any total; summed over all heads of all ranks.
        topk_indices: int32 [b, s, k], contiguous.
        queries: where the queries stand.
        scale: of the index products.
        loss_scale: of the sum over the queries.
    """
    return _SparseIndexerLoss.apply(*inputs, target, topk_indices, queries, scale, loss_scale)


class _SparseIndexerLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, weights, target, topk_indices, queries, scale, loss_scale):
        s, b, heads, dim = query.shape
        k = topk_indices.shape[-1]
        query, key, weights = (tensor.contiguous() for tensor in (query, key, weights))
        starts, positions = queries.spans()
        scores = torch.empty(target.shape, dtype=torch.float32, device=query.device)
        loss = torch.empty((b, s), dtype=torch.float32, device=query.device)
        d_query, d_key, d_weights = (
            torch.zeros(tensor.shape, dtype=torch.float32, device=tensor.device)
            for tensor in (query, key, weights)
        )
        deterministic = torch.are_deterministic_algorithms_enabled()

        def launch(first: int, end: int, keys: Tensor) -> None:
            _loss[((end - first) * b,)](
                query, key, weights, topk_indices, starts, positions, target, scores, loss,
                d_query, keys, d_weights,
                first, end, s, b, k, scale, loss_scale,
                HEADS=heads, DIM=dim, KEYS=64, ATOMIC=not deterministic,
                PRECISION=precision(query.dtype), EPS=_EPS, num_warps=4,
            )  # fmt: skip

        if deterministic:
            add_in_order(launch, topk_indices, starts, d_key, groups=1)
        else:
            launch(0, s, d_key)
        grads = (d_query, query), (d_key, key), (d_weights, weights)
        ctx.save_for_backward(*(grad.to(like.dtype) for grad, like in grads))
        return loss.sum() * loss_scale

    @staticmethod
    def backward(ctx, grad_output):
        grads = (grad * grad_output.to(grad.dtype) for grad in ctx.saved_tensors)
        return (*grads, None, None, None, None, None)
