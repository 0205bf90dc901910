"""The indexer's loss in Triton, with its gradients, in one pass over its keys.

Nothing larger than the top-k itself is kept: the attention's probabilities summed over the heads,
and the index scores, are [b, s, k]. The loss over all visible keys is that over a top-k which names
them all, in blocks of queries. The kernels are imported inside the functions: they need triton,
this record of them does not.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import tiles
from ..exact_sums import ExactSums
from ..fallback import compute
from ..index_topk.reference import IndexerInputs
from ..needs import Width, of_triton
from ..registry import backend
from ..sparse_attention.absorption import absorbed_inputs, in_blocks
from ..sparse_attention.inputs import AbsorbedInputs, AttentionInputs
from ..sparse_attention.reference import LOG2_E
from ..sparse_attention.triton import TRITON, heads_of_a_program, precision
from .reference import EPSILON, LossSettings, SelectedKeys, sum_over_ranks

VISIBLE_PLACES = 1 << 24
"""Places of the target of one block of queries where it is over all visible keys, 64 MiB."""


def load() -> None:
    importlib.import_module(".triton_kernels", __package__)


INDEXER_WIDTHS = {
    "dsa_indexer_n_heads": Width(power_of_two=True, at_least=16),
    "dsa_indexer_head_dim": Width(power_of_two=True, at_least=16),
}


@backend(
    "index_loss",
    name="triton",
    rank=1,
    needs=of_triton({**TRITON.widths, **INDEXER_WIDTHS}),
    load=load,
    optional=True,
)
def index_loss(inputs: IndexerInputs, attention: AttentionInputs, settings: LossSettings) -> Tensor:
    """As ``reference.index_loss``."""
    return _Loss.apply(*inputs, _targets(attention, settings), settings)


def selected_loss(
    inputs: IndexerInputs, absorbed: AbsorbedInputs, settings: LossSettings
) -> Tensor:
    """As ``index_loss`` over the selected keys, of queries that are absorbed already."""
    return _Loss.apply(*inputs, [_target(absorbed, None, settings.tp_group)], settings)


class _Target(NamedTuple):
    """What the indexer learns of some queries; its fields have their s."""

    topk_indices: Tensor
    """int32 [b, s, k], contiguous."""
    starts: Tensor
    """int32 [s], see ``QueryPositions.spans``."""
    positions: Tensor
    """int32 [s]."""
    probabilities: Tensor
    """fp32 [b, s, k], of any sum."""


def _targets(attention: AttentionInputs, settings: LossSettings) -> Iterator[_Target]:
    """Of all queries, in blocks, in their order."""
    if not settings.sparse and attention.topk_indices is not None:
        attention = attention._replace(topk_indices=None, lse=None)
    for _, part in in_blocks(attention, VISIBLE_PLACES):
        yield _target(absorbed_inputs(part.with_topk()), part.lse, settings.tp_group)


def _target(absorbed: AbsorbedInputs, lse: Tensor | None, tp_group: ProcessGroup | None) -> _Target:
    sizes = dict(absorbed.call.sizes) | {"known_lse": int(lse is not None)}
    probabilities = compute("index_loss.head_sums", absorbed.call.sized(**sizes), absorbed, lse)
    sum_over_ranks(probabilities, tp_group)
    return _Target(absorbed.topk_indices, absorbed.starts, absorbed.positions, probabilities)


@backend(
    "index_loss.target",
    name="triton",
    rank=1,
    needs=TRITON,
    load=load,
    optional=True,
)
def attention_target(attention: AttentionInputs, tp_group: ProcessGroup | None) -> Tensor:
    """As ``reference.attention_target``."""
    parts = [
        _target(absorbed_inputs(part), part.lse, tp_group).probabilities
        for _, part in in_blocks(attention, VISIBLE_PLACES)
    ]
    target = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return target.div_(target.sum(-1, keepdim=True).clamp_min_(EPSILON))


@backend(
    "index_loss.of_target",
    name="triton",
    rank=1,
    needs=of_triton(INDEXER_WIDTHS),
    load=load,
    optional=True,
)
def loss_of_target(
    inputs: IndexerInputs, keys: SelectedKeys, target: Tensor, settings: LossSettings
) -> Tensor:
    """As ``reference.loss_of_target``."""
    selected = _Target(keys.topk_indices.contiguous(), *keys.queries.spans(), target)
    return _Loss.apply(*inputs, [selected], settings)


@backend(
    "index_loss.head_sums",
    name="triton",
    rank=1,
    needs=TRITON,
    load=load,
    optional=True,
)
def head_sums(absorbed: AbsorbedInputs, lse: Tensor | None) -> Tensor:
    """As ``reference.head_sums``."""
    from . import triton_kernels as kernels

    query, latent, topk_indices, starts, positions, latent_dim, softmax_scale = absorbed
    s, b, heads, width = query.shape
    sums = torch.zeros(topk_indices.shape, dtype=torch.float32, device=query.device)
    block = heads_of_a_program(heads, tiles.of_device(query.device).target_heads)
    for first in range(0, heads, block):
        kernels.head_sums[(s * b,)](
            query, latent, topk_indices, starts, positions, lse, sums,
            s, b, first, heads, topk_indices.shape[-1], softmax_scale * LOG2_E,
            LATENT=latent_dim, ROPE=width - latent_dim, HEADS=block, KEYS=64, ADD=first > 0,
            PRECISION=precision(query.dtype), num_warps=8 if block > 32 else 4,
        )  # fmt: skip
    return sums


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, weights, targets: Iterable[_Target], settings: LossSettings):
        inputs = IndexerInputs(*(tensor.contiguous() for tensor in (query, key, weights)))
        d_query = torch.zeros_like(inputs.query)
        d_key, d_weights = (torch.zeros_like(t, dtype=torch.float32) for t in inputs[1:])
        exact = None
        if torch.are_deterministic_algorithms_enabled():
            exact = ExactSums.zeros(key.shape, _bound(inputs, settings))
            d_key = exact.integers
        units = None if exact is None else exact.units
        loss, first = torch.zeros((), dtype=torch.float32, device=query.device), 0
        for target in targets:
            rows = slice(first, first + len(target.starts))
            # Of a million queries, gradients in fp32 would take 16 GiB.
            in_fp32 = torch.zeros_like(inputs.query[rows], dtype=torch.float32)
            gradients = IndexerInputs(in_fp32, d_key, d_weights[rows])
            loss += _add_loss(_of_rows(inputs, rows), target, settings, gradients, units)
            d_query[rows] = in_fp32
            first = rows.stop
        if exact is not None:
            d_key = exact.value()
        ctx.save_for_backward(d_query, d_key.to(key.dtype), d_weights.to(weights.dtype))
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        grads = (grad * grad_output.to(grad.dtype) for grad in ctx.saved_tensors)
        return (*grads, None, None)


def _of_rows(inputs: IndexerInputs, rows: slice) -> IndexerInputs:
    return inputs._replace(query=inputs.query[rows], weights=inputs.weights[rows])


def _bound(inputs: IndexerInputs, settings: LossSettings) -> Tensor:
    """No number of the key's gradient gets larger, fp32 []: the gradient of a score, before
    ``loss_scale``, is a difference of two probabilities."""
    norm = torch.linalg.vector_norm(inputs.query, math.inf, dim=-1, dtype=torch.float32)
    of_heads = norm * inputs.weights.abs()  # [s, b, heads]
    return of_heads.sum((0, 2)).amax() * abs(settings.index_scale * settings.loss_scale)


def _add_loss(
    inputs: IndexerInputs,
    target: _Target,
    settings: LossSettings,
    gradients: IndexerInputs,
    units: Tensor | None,
) -> Tensor:
    """The loss of some queries, a scalar; its gradients are added to ``gradients``, that of the key
    in ``units``, see ``ExactSums``."""
    from . import triton_kernels as kernels

    (s, b, heads, dim), k = inputs.query.shape, target.topk_indices.shape[-1]
    scores = torch.empty_like(target.probabilities)
    loss = torch.empty((b, s), dtype=torch.float32, device=scores.device)
    kernels.loss[(s * b,)](
        *inputs, *target, scores, loss, *gradients, units,
        s, b, k, settings.index_scale, settings.loss_scale,
        HEADS=heads, DIM=dim, KEYS=64, PRECISION=precision(inputs.query.dtype), EPS=EPSILON,
        num_warps=4,
    )  # fmt: skip
    return loss.sum() * settings.loss_scale
