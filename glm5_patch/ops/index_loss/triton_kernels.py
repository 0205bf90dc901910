"""Triton kernels of the indexer's loss over the selected keys. A program works on one query.

Shapes: s queries (``rows``), t keys, b sequences (``batch``), n attention heads, k places of a
top-k.

==================== ======================================================================
Q, LATENTS           [s, b, n, LATENT + ROPE] and [t, b, LATENT + ROPE], of ``head_sums``:
                     absorbed queries of the attention, and keys
LSE                  fp32 [s, b, n], see ``AttentionInputs.lse``; None: not known
Q, K, WEIGHTS        [s, b, HEADS, DIM], [t, b, DIM] and fp32 [s, b, HEADS], of ``loss``: the
                     indexer's
TOPK                 int32 [b, s, k], counted from the query's document start, -1: no key
STARTS, POSITIONS    int32 [s], the first and the last key that each query sees
SUMS, TARGET, SCORES fp32 [b, s, k]
LOSS                 fp32 [b, s]
D_Q, D_WEIGHTS       fp32, as Q and WEIGHTS
D_K                  fp32, or int64 with UNITS, as K
UNITS                fp32 [], of ``ExactSums``; or None
==================== ======================================================================

Tiles: HEADS x KEYS (of one step).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..sparse_attention.triton_kernels import (
    gather_columns,
    keys_of_query,
    load_columns,
    logits_of,
    tile_of_keys,
)


@triton.jit
def _logits(
    LATENTS, q_0, q_1, q_rope, key, scale_log2,
    LATENT: tl.constexpr, ROPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[HEADS, KEYS], times log2(e), of queries in pieces [HEADS, HALF] and [HEADS, ROPE]."""
    HALF: tl.constexpr = LATENT // 2
    latent_0 = gather_columns(LATENTS, key, 0, HALF)
    latent_1 = gather_columns(LATENTS, key, HALF, HALF)
    rope = gather_columns(LATENTS, key, LATENT, ROPE)
    return logits_of(q_0, q_1, q_rope, latent_0, latent_1, rope, PRECISION) * scale_log2


@triton.jit
def head_sums(
    Q, LATENTS, TOPK, STARTS, POSITIONS, LSE, SUMS,
    rows, batch, first_head, heads, k, scale_log2,
    LATENT: tl.constexpr, ROPE: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr,
    ADD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention probabilities of one query, summed over HEADS heads; ADD: to those of others."""
    WIDTH: tl.constexpr = LATENT + ROPE
    HALF: tl.constexpr = LATENT // 2
    row = rows - 1 - tl.program_id(0) // batch
    b = tl.program_id(0) % batch
    head = first_head + tl.arange(0, HEADS)
    own = head < heads
    query = (row * batch + b).to(tl.int64) * heads + head
    q_0 = load_columns(Q, query * WIDTH, 0, HALF, own)
    q_1 = load_columns(Q, query * WIDTH, HALF, HALF, own)
    q_rope = load_columns(Q, query * WIDTH, LATENT, ROPE, own)
    start, count, line = keys_of_query(STARTS, POSITIONS, row, b, rows, k)
    if LSE is not None:
        lse = tl.load(LSE + query, mask=own, other=0.0)
    else:  # a pass for the softmax's sum
        largest = tl.full([HEADS], -1e30, tl.float32)
        total = tl.zeros([HEADS], tl.float32)
        for first in range(0, count, KEYS):
            key, valid = tile_of_keys(TOPK + line, first, count, start, batch, b, KEYS, WIDTH)
            logits = _logits(LATENTS, q_0, q_1, q_rope, key, scale_log2, LATENT, ROPE, PRECISION)
            logits = tl.where(valid[None, :], logits, -1e30)
            larger = tl.maximum(largest, tl.max(logits, 1))
            probs = tl.where(valid[None, :], tl.exp2(logits - larger[:, None]), 0.0)
            total = total * tl.exp2(largest - larger) + tl.sum(probs, 1)
            largest = larger
        lse = largest + tl.log2(tl.where(total > 0, total, 1.0))
    for first in range(0, count, KEYS):
        key, valid = tile_of_keys(TOPK + line, first, count, start, batch, b, KEYS, WIDTH)
        logits = _logits(LATENTS, q_0, q_1, q_rope, key, scale_log2, LATENT, ROPE, PRECISION)
        probs = tl.exp2(logits - lse[:, None])
        probs = tl.where(valid[None, :] & own[:, None], probs, 0.0)
        place = first + tl.arange(0, KEYS)
        sums = tl.sum(probs, 0)
        if ADD:
            sums += tl.load(SUMS + line + place, mask=place < count)
        tl.store(SUMS + line + place, sums, mask=place < count)


@triton.jit
def loss(
    Q, K, WEIGHTS, TOPK, STARTS, POSITIONS, TARGET, SCORES, LOSS, D_Q, D_K, D_WEIGHTS, UNITS,
    rows, batch, k, scale, loss_scale,
    HEADS: tl.constexpr, DIM: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """KL(target || softmax(index scores)) of one query over its keys, and its gradients."""
    row = rows - 1 - tl.program_id(0) // batch
    b = tl.program_id(0) % batch
    query = (row * batch + b).to(tl.int64) * HEADS + tl.arange(0, HEADS)
    everyone = tl.arange(0, HEADS) >= 0
    q = load_columns(Q, query * DIM, 0, DIM, everyone)
    weights = tl.load(WEIGHTS + query) * scale
    start, count, line = keys_of_query(STARTS, POSITIONS, row, b, rows, k)
    largest, total, mass = -1e30, 0.0, 0.0
    # Two passes: the scores and their softmax's sum, then the loss and its gradients.
    for first in range(0, count, KEYS):
        key, valid = tile_of_keys(TOPK + line, first, count, start, batch, b, KEYS, DIM)
        index_key = gather_columns(K, key, 0, DIM)  # [KEYS, DIM]
        products = tl.dot(q, tl.trans(index_key), input_precision=PRECISION)  # [HEADS, KEYS]
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
        if UNITS is not None:
            part = (part * tl.load(UNITS)).to(tl.int64)
        place = D_K + key[:, None] + tl.arange(0, DIM)[None, :]
        tl.atomic_add(place, part, mask=valid[:, None], sem="relaxed")
    tl.store(LOSS + b.to(tl.int64) * rows + row, loss)
    columns = tl.arange(0, DIM)
    tl.store(D_Q + query[:, None] * DIM + columns[None, :], d_q * loss_scale)
    tl.store(D_WEIGHTS + query, d_weights * loss_scale)
