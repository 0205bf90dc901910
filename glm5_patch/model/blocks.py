"""What one query sees, and how many queries are worked on at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatron.core.packed_seq_params import PackedSeqParams

BLOCK_BYTES = 256 << 20
"""Upper bound of one fp32 logits tensor of a block of queries."""


class Rows(NamedTuple):
    """Where each query stands among the keys; it sees those from its document's start to itself."""

    starts: Tensor
    """int64 [s], see ``document_starts``."""
    positions: Tensor | None = None
    """int64 [s], or None: query i stands at key i."""
    num_keys: int | None = None
    """How many keys there are, if positions are given."""

    @classmethod
    def of(cls, packed_seq_params: PackedSeqParams | None, seqlen: int, device) -> Rows:
        """All queries of a sequence, each at its own key."""
        return cls(document_starts(packed_seq_params, seqlen, device))

    @property
    def keys(self) -> int:
        return len(self.starts) if self.num_keys is None else self.num_keys

    def end(self, block: slice) -> int:
        """No query of the block sees a key from here on."""
        return block.stop if self.positions is None else self.keys


def document_starts(packed_seq_params: PackedSeqParams | None, seqlen: int, device) -> Tensor:
    """The position where each token's document starts, int64 [s]; zeros unless packed (thd).

    A query sees the keys from its document's start up to itself. Padding inside a pack
    (``cu_seqlens_q_padded``) comes after the tokens it pads, so no real token sees it.

    Raises:
        ValueError: ``cu_seqlens_q`` does not cover the pack exactly.
    """
    if not is_thd(packed_seq_params):
        return torch.zeros(seqlen, dtype=torch.int64, device=device)
    cu_seqlens = document_bounds(packed_seq_params)
    lengths = cu_seqlens.diff().to(device=device, dtype=torch.int64)
    starts = cu_seqlens[:-1].to(device=device, dtype=torch.int64).repeat_interleave(lengths)
    if starts.numel() != seqlen:
        raise ValueError(
            f"cu_seqlens_q ends at {starts.numel()}, but the pack has {seqlen} tokens; "
            "count padding at the end of the pack as part of its last document"
        )
    return starts


def document_bounds(packed_seq_params: PackedSeqParams) -> Tensor:
    """Where the documents of a pack begin and end, [documents + 1]; padding counts as theirs."""
    padded = packed_seq_params.cu_seqlens_q_padded
    return packed_seq_params.cu_seqlens_q if padded is None else padded


def is_thd(packed_seq_params: PackedSeqParams | None) -> bool:
    """Whether the batch is packed: documents one after another, without a batch dimension."""
    return packed_seq_params is not None and packed_seq_params.qkv_format == "thd"


def query_blocks(seqlen: int, bytes_per_query: int) -> Iterator[slice]:
    """Slices over the queries, each at most ``BLOCK_BYTES`` of logits (but one query at least)."""
    rows = max(1, BLOCK_BYTES // max(1, bytes_per_query))
    for begin in range(0, seqlen, rows):
        yield slice(begin, min(begin + rows, seqlen))


def visible_keys(block: slice, rows: Rows) -> Tensor:
    """Causal and document mask of a block of queries, bool [block, rows.end(block)]."""
    device = rows.starts.device
    if rows.positions is None:
        queries = torch.arange(block.start, block.stop, device=device)[:, None]
    else:
        queries = rows.positions[block, None]
    keys = torch.arange(rows.end(block), device=device)[None, :]
    return (keys <= queries) & (keys >= rows.starts[block, None])


def selected_keys(block: slice, rows: Rows, topk_indices: Tensor) -> Tensor:
    """The keys that a top-k names for a block of queries, bool [b, block, rows.end(block)].

    Args:
        block: the queries.
        rows: where they stand.
        topk_indices: int32 [b, s, k], positions counted from the query's document start, -1 for
            an empty place.
    """
    chosen = topk_indices[:, block].long()
    spare = rows.end(block)  # one more column takes the empty places
    columns = torch.where(chosen < 0, spare, chosen + rows.starts[block, None])
    mask = torch.zeros((*chosen.shape[:2], spare + 1), dtype=torch.bool, device=topk_indices.device)
    return mask.scatter_(-1, columns, True)[..., :spare]
