"""How a top-k crosses pipeline stages: beside the hidden states, as bits that nothing computes on.

A chunk that is followed by a skip layer sends ``[s, b, h + extra]`` instead of ``[s, b, h]``. The
extra columns are the positions of the top-k, in 16 bits where every document has at most 65,536
tokens and in 32 bits otherwise, viewed as the dtype of the hidden states. Many such values are NaN
patterns. They are only copied, and copied as integers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from ..config.costs import LONGEST_OF_16_BITS, position_bytes
from ..errors import MissingTopkError
from .tokens import Layout

_EMPTY_16 = LONGEST_OF_16_BITS - 1
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class StageTopk(NamedTuple):
    """A top-k as it crosses."""

    bits: Tensor
    """[s, b, extra], integers as wide as the pipeline's dtype. Under sequence parallelism of this
    rank's tokens, [s / tp, b, extra]."""
    tp_group: torch.distributed.ProcessGroup | None
    """The ranks that hold the other tokens."""

    @classmethod
    def encode(cls, topk_indices: Tensor, hidden_states: Tensor, layout: Layout, tp_group):
        """Of a top-k, int32 [b, s, k], and the hidden states that it travels with, [s, b, h] or
        [s / tp, b, h]."""
        positions = topk_indices.transpose(0, 1)  # [s, b, k]
        rows = len(hidden_states)
        if rows != len(positions):
            positions = positions.narrow(0, tp_group.rank() * rows, rows)
        dtype = _position_dtype(layout.queries.most_keys)
        itemsize = hidden_states.element_size()
        columns = -(-positions.shape[-1] * dtype.itemsize // itemsize)
        packed = positions.new_empty(
            (*positions.shape[:2], columns * itemsize // dtype.itemsize), dtype=dtype
        )
        packed[..., : positions.shape[-1]] = positions  # -1 becomes 65,535 in 16 bits
        packed[..., positions.shape[-1] :] = -1
        return cls(packed.view(_INTEGERS[itemsize]), tp_group)

    def decode(self, layout: Layout, index_topk: int) -> Tensor:
        """The top-k of this rank's queries, int32 [b, s, index_topk].

        Raises:
            MissingTopkError: the stage before sent another number of columns or tokens.
        """
        dtype = _position_dtype(layout.queries.most_keys)
        itemsize = self.bits.element_size()
        columns = -(-index_topk * dtype.itemsize // itemsize)
        queries = len(layout.queries.starts)
        bits = self.bits
        if len(bits) != queries and self.tp_group is not None:
            bits = _gather(bits, self.tp_group)
        if len(bits) != queries or bits.shape[-1] != columns:
            raise MissingTopkError(
                f"the stage before sent a top-k of {len(bits)} tokens and {bits.shape[-1]} "
                f"columns, where {queries} and {columns} are needed; all stages must have the "
                f"same batch and dsa_indexer_topk={index_topk}"
            )
        positions = bits.view(dtype)[..., :index_topk].transpose(0, 1).to(torch.int32)
        if dtype is torch.int16:
            positions &= _EMPTY_16
            # A query at position 65,535 sees more keys than it selects, and has no empty place.
            may_be_empty = layout.queries.local_positions < _EMPTY_16
            positions.masked_fill_((positions == _EMPTY_16) & may_be_empty[:, None], -1)
        return positions.contiguous()


def widen(hidden_states: Tensor, topk: StageTopk, narrow_gradient: bool) -> Tensor:
    """[s, b, h] -> [s, b, h + extra].

    Args:
        hidden_states: the output of a stage.
        topk: what to send beside it.
        narrow_gradient: the gradient that comes back is [s, b, h]. Autograd takes that only from a
            caller that does not compare it with the output (``deallocate_pipeline_outputs``).
            Otherwise it is [s, b, h + extra], and the rest is ignored.
    """
    if not narrow_gradient:
        return _Widen.apply(hidden_states, topk.bits)
    output = _Alias.apply(hidden_states)
    output.data = _beside(hidden_states.detach(), topk.bits)
    return output


def split(received: Tensor, width: int, narrow_gradient: bool) -> tuple[Tensor, Tensor]:
    """[s, b, h + extra] -> hidden states [s, b, h] and the bits of a top-k.

    Args:
        received: the input of a stage, a leaf whose gradient goes back to the stage before.
        width: h.
        narrow_gradient: as of ``widen``; then ``received`` itself becomes [s, b, h].
    """
    bits = _bits(received)[..., width:].contiguous()
    if not narrow_gradient:
        return _Narrow.apply(received, width), bits
    received.data = received.data[..., :width].contiguous()
    return received, bits


def _position_dtype(longest_document: int) -> torch.dtype:
    return torch.int16 if position_bytes(longest_document) == 2 else torch.int32


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view(_INTEGERS[tensor.element_size()])


def _gather(bits: Tensor, group) -> Tensor:
    """As bytes: NCCL and gloo have no integers of 16 bits."""
    gathered = gather_from_sequence_parallel_region(bits.view(torch.uint8), group=group)
    return gathered.view(bits.dtype)


def _beside(hidden_states: Tensor, bits: Tensor) -> Tensor:
    width = hidden_states.shape[-1]
    wide = hidden_states.new_empty((*hidden_states.shape[:-1], width + bits.shape[-1]))
    wide[..., :width] = hidden_states
    _bits(wide)[..., width:] = bits
    return wide


class _Widen(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, bits):
        ctx.width = hidden_states.shape[-1]
        return _beside(hidden_states, bits)

    @staticmethod
    def backward(ctx, gradient):
        return gradient[..., : ctx.width].contiguous(), None


class _Alias(torch.autograd.Function):
    """The same values in a tensor that is no view: a schedule frees the data of what it sent."""

    @staticmethod
    def forward(ctx, hidden_states):
        output = hidden_states.new_empty(1)
        output.data = hidden_states.data
        return output

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class _Narrow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, received, width):
        ctx.extra = received.shape[-1] - width
        return received[..., :width].contiguous()

    @staticmethod
    def backward(ctx, gradient):
        return torch.nn.functional.pad(gradient, (0, ctx.extra)), None
