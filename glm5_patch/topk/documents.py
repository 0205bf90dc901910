"""The documents of a batch, and which of their tokens are padding."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from ..errors import GLM5PatchError
from ..ops.query_positions import QueryPositions, document_bounds, is_thd

FP8_MULTIPLE = 128
"""What documents of a pack may be padded to under fp8."""


class Documents:
    """The documents of a pack, or the sequences of a batch that is not packed. What the device
    knows of them is read when it is first asked for: only recording and replay ask."""

    def __init__(self, config, packed_seq_params, queries: QueryPositions) -> None:
        """
        Args:
            config: of the model.
            packed_seq_params: documents of a pack.
            queries: of this rank.
        """
        self.packed = is_thd(packed_seq_params)
        self._config, self._pack, self._queries = config, packed_seq_params, queries

    @cached_property
    def _bounds(self) -> list[int]:
        """Where the documents of a pack begin and end among the keys, padding included."""
        return document_bounds(self._pack, self._queries.keys)

    @cached_property
    def _real_lengths(self) -> list[int] | None:
        """Tokens of each document of a pack without padding; None where nothing tells them. Some
        programs give the padded lengths twice, which tells nothing."""
        padded = self._pack.cu_seqlens_q_padded if self.packed else None
        if padded is None:
            return None
        lengths = self._pack.cu_seqlens_q.diff().tolist()
        return None if lengths == padded.diff().tolist() else lengths

    @property
    def _multiple(self) -> int:
        """What a document may be padded to a multiple of."""
        cp = self._config.context_parallel_size
        found = self._config.tensor_model_parallel_size * (2 * cp if cp > 1 else 1)
        return math.lcm(found, FP8_MULTIPLE) if self._config.fp8 else found

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each document of a pack, without padding where that is known; of a batch that
        is not packed, of a sequence."""
        if self._real_lengths is not None:
            return self._real_lengths
        return [end - begin for begin, end in zip(self._bounds, self._bounds[1:])]

    def least(self, number: int) -> int:
        """The fewest positions that a recording of a document may have. A rollout never feeds its
        last token to the model. What nothing marks as padding may end a sequence or the last
        document of a pack, and fills up each document to the multiple that the split needs; with
        ``real_token_mask_q`` it may be anywhere."""
        if self._real_lengths is not None:
            return self.lengths[number] - 1
        masked = getattr(self._pack, "real_token_mask_q", None) is not None
        if not self.packed or masked or number == len(self.lengths) - 1:
            return 0
        return self.lengths[number] - self._multiple

    def rows(self, b: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Of each sequence of a batch of b, or each document of a pack: which sequence, which of
        this rank's queries are of it, and their positions in it; int64, on the CPU."""
        if not self.packed and self._queries.positions is None:
            local = torch.arange(self._queries.keys)  # the host need not wait for a GPU
        else:
            local = self._queries.local_positions.cpu()
        if not self.packed:
            yield from ((batch, torch.arange(len(local)), local) for batch in range(b))
            return
        ends = torch.tensor(self._bounds[1:])
        document = torch.searchsorted(ends, self._queries.places.cpu(), right=True)
        for number in range(len(ends)):
            rows = (document == number).nonzero().squeeze(1)
            yield 0, rows, local[rows]


def real_queries(packed_seq_params, queries: QueryPositions) -> Tensor | None:
    """Which queries of a pack are not padding, bool [s], or None where nothing tells of padding.

    ``real_token_mask_q`` (bool [s], megatron-core 0.19's name) says which they are. Without it the
    lengths in ``cu_seqlens_q`` do, where ``cu_seqlens_q_padded`` says how documents are padded.

    Raises:
        GLM5PatchError: ``real_token_mask_q`` fits neither this rank's tokens nor the whole pack.
    """
    if not is_thd(packed_seq_params):
        return None
    mask = getattr(packed_seq_params, "real_token_mask_q", None)
    if mask is None:
        return _real_by_lengths(packed_seq_params, queries)
    mask = mask.flatten().bool().to(queries.starts.device)
    if len(mask) == queries.keys:
        return mask[queries.places]
    if len(mask) != len(queries.starts):
        raise GLM5PatchError(
            f"real_token_mask_q has {len(mask)} entries for {len(queries.starts)} tokens on "
            f"this rank, {queries.keys} in the pack; give it one entry for each token"
        )
    return mask


def _real_by_lengths(packed_seq_params, queries: QueryPositions) -> Tensor | None:
    padded = packed_seq_params.cu_seqlens_q_padded
    if padded is None:
        return None
    device = queries.starts.device
    lengths = packed_seq_params.cu_seqlens_q.diff().to(device)
    document = torch.searchsorted(padded.long().to(device), queries.places, right=True) - 1
    return queries.local_positions < lengths[document]
