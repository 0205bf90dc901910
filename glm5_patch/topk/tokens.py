"""Where the tokens of one batch stand: worked out once a forward, for all its layers.

Under context parallelism queries stay where they are. What the keys are made of is gathered: the
indexer's key, and the key-value latent with its rotary part (576 wide, where the keys and values of
64 heads are 32768).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from ..config.fields import CONTIGUOUS, ZIGZAG
from ..errors import GLM5PatchError
from ..ops.query_positions import (
    QueryPositions,
    document_bounds,
    document_starts,
    is_thd,
    longest_document,
)
from .carrier import current_carrier


class Layout(NamedTuple):
    """The tokens of this rank among those of the batch."""

    queries: QueryPositions
    split: ContextParallel | None = None
    """If the sequence is split between ranks."""
    real: Tensor | None = None
    """int64: the queries of this rank that are not padding; None: all of them."""

    @classmethod
    def of(cls, config, cp_group, packed_seq_params, local_length: int, device) -> Layout:
        """The layout of the forward that is running; bounds of a pack are read from the device
        once."""
        carrier = current_carrier()
        if carrier is not None and carrier.layout is not None:
            return carrier.layout
        if config.context_parallel_size > 1:
            order = config.dsa_context_parallel_order
            split = ContextParallel(cp_group, packed_seq_params, local_length, device, order)
            layout = cls(split.queries, split)
        else:
            layout = cls(QueryPositions.of(packed_seq_params, local_length, device))
        layout = layout._replace(real=real_queries(packed_seq_params, layout.queries))
        if carrier is not None:
            carrier.layout = layout
        return layout

    def gather(self, tensor: Tensor) -> Tensor:
        """[s / cp, ...] of every rank -> [s, ...] in natural order."""
        return tensor if self.split is None else self.split.gather(tensor)


def real_queries(packed_seq_params, queries: QueryPositions) -> Tensor | None:
    """The queries of a pack that are not padding, int64, or None where there is no padding.

    ``real_token_mask_q`` (bool [s], megatron-core 0.19's name) says which they are. Without it the
    lengths in ``cu_seqlens_q`` do, where ``cu_seqlens_q_padded`` says how documents are padded.

    Raises:
        GLM5PatchError: ``real_token_mask_q`` fits neither this rank's tokens nor the whole pack.
    """
    if not is_thd(packed_seq_params):
        return None
    mask = getattr(packed_seq_params, "real_token_mask_q", None)
    if mask is None:
        mask = _real_by_lengths(packed_seq_params, queries)
        if mask is None:
            return None
    else:
        mask = mask.flatten().bool().to(queries.starts.device)
        if len(mask) == queries.keys:
            mask = mask[queries.places]
        elif len(mask) != len(queries.starts):
            raise GLM5PatchError(
                f"real_token_mask_q has {len(mask)} entries for {len(queries.starts)} tokens on "
                f"this rank, {queries.keys} in the pack; give it one entry for each token"
            )
    real = mask.nonzero().squeeze(1)
    return None if len(real) == len(mask) else real


def _real_by_lengths(packed_seq_params, queries: QueryPositions) -> Tensor | None:
    padded = packed_seq_params.cu_seqlens_q_padded
    if padded is None:
        return None
    device = queries.starts.device
    lengths = packed_seq_params.cu_seqlens_q.diff().to(device)
    document = torch.searchsorted(padded.long().to(device), queries.places, right=True) - 1
    return queries.local_positions < lengths[document]


class ContextParallel:
    """How one batch is split between the ranks of ``group``."""

    def __init__(self, group, packed_seq_params, local_length: int, device, order: str = ZIGZAG):
        """Raises GLM5PatchError for a document that can't be cut into equal chunks (zigzag).

        Args:
            group: the context-parallel group.
            packed_seq_params: documents of a pack.
            local_length: tokens that each rank holds.
            device: of the indices made here.
            order: one of ``CONTEXT_PARALLEL_ORDERS``.
        """
        self.group = group
        length = local_length * group.size()
        bounds = document_bounds(packed_seq_params, length)
        held = {ZIGZAG: _zigzag, CONTIGUOUS: _contiguous}[order]
        positions = [held(bounds, rank, group.size()) for rank in range(group.size())]
        own = positions[group.rank()]
        self.queries = QueryPositions(
            document_starts(bounds)[own].to(device),
            own.to(device),
            length,
            longest_document(bounds),
        )
        """What the queries of this rank see."""
        self._order = torch.cat(positions).argsort().to(device)

    def gather(self, tensor: Tensor) -> Tensor:
        """[s / cp, ...] of every rank -> [s, ...] in natural order; gradients go back summed."""
        gathered = gather_from_sequence_parallel_region(tensor.contiguous(), group=self.group)
        return gathered.index_select(0, self._order)


def _contiguous(bounds: list[int], rank: int, size: int) -> Tensor:
    part = bounds[-1] // size
    return torch.arange(rank * part, (rank + 1) * part)


def _zigzag(bounds: list[int], rank: int, size: int) -> Tensor:
    parts = [torch.empty(0, dtype=torch.int64)]
    for begin, end in zip(bounds, bounds[1:]):
        chunk, rest = divmod(end - begin, 2 * size)
        if rest:
            raise GLM5PatchError(
                f"a document of {end - begin} tokens can't be split between context_parallel_size="
                f"{size} ranks; pad it to a multiple of {2 * size} (cu_seqlens_q_padded)"
            )
        for number in (rank, 2 * size - 1 - rank):
            parts.append(torch.arange(begin + number * chunk, begin + (number + 1) * chunk))
    return torch.cat(parts)
