"""What one query sees, and how many queries are worked on at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..errors import GLM5PatchError

if TYPE_CHECKING:
    from megatron.core.packed_seq_params import PackedSeqParams

BLOCK_BYTES = 256 << 20
"""Upper bound of one fp32 logits tensor of a block of queries, or of a window and one sequence."""
WINDOW = 64
"""Most queries of one window, see ``windows``."""


@dataclass(frozen=True, eq=False)
class QueryPositions:
    """Where each query stands among the keys; it sees those from its document's start to itself.

    What is worked out from it is kept: every layer asks for it.
    """

    starts: Tensor
    """int64 [s]: the position where each query's document starts; zeros unless packed."""
    positions: Tensor | None = None
    """int64 [s], or None: query i stands at key i."""
    num_keys: int | None = None
    """How many keys there are, if positions are given."""
    longest: int | None = None
    """Keys of the longest document; None: of the whole sequence."""

    @classmethod
    def of(cls, packed_seq_params: PackedSeqParams | None, seqlen: int, device) -> QueryPositions:
        """All queries of a sequence, each at its own key.

        Padding inside a pack (``cu_seqlens_q_padded``) comes after the tokens it pads, so no real
        token sees it.
        """
        bounds = document_bounds(packed_seq_params, seqlen)
        return cls(document_starts(bounds, device), longest=longest_document(bounds))

    @property
    def keys(self) -> int:
        return len(self.starts) if self.num_keys is None else self.num_keys

    @property
    def most_keys(self) -> int:
        """No query sees more keys."""
        return self.keys if self.longest is None else self.longest

    @cached_property
    def places(self) -> Tensor:
        """int64 [s]: the key at which each query stands."""
        if self.positions is None:
            return torch.arange(len(self.starts), device=self.starts.device)
        return self.positions

    @cached_property
    def local_positions(self) -> Tensor:
        """int64 [s]: each query's position in its document."""
        return self.places - self.starts

    def spans(self) -> tuple[Tensor, Tensor]:
        """``starts`` and ``places`` in int32: the first and the last key that each query sees."""
        return self._spans

    @cached_property
    def _spans(self) -> tuple[Tensor, Tensor]:
        return self.starts.int(), self.places.int()

    def of_queries(self, queries: Tensor | slice) -> QueryPositions:
        """Some queries alone, int64 or a slice; the keys stay."""
        return QueryPositions(self.starts[queries], self.places[queries], self.keys, self.longest)

    @property
    def is_one_sequence(self) -> bool:
        """Query i stands at key i, and sees all keys up to it."""
        return self.positions is None and self.longest == self.keys

    def all_fit(self, index_topk: int) -> bool:
        """Whether a top-k of that size holds every key that any query sees."""
        return self.most_keys <= index_topk

    def end(self, block: slice) -> int:
        """No query of the block sees a key from here on."""
        return block.stop if self.positions is None else self.keys


def document_bounds(packed_seq_params: PackedSeqParams | None, seqlen: int) -> list[int]:
    """Where the documents of a pack of ``seqlen`` tokens begin and end; padding counts as theirs.
    Not packed, all is one document.

    Raises:
        GLM5PatchError: ``cu_seqlens_q`` does not cover the pack exactly.
    """
    if not is_thd(packed_seq_params):
        return [0, seqlen]
    bounds = packed_seq_params.cu_seqlens_q_padded
    if bounds is None:
        bounds = packed_seq_params.cu_seqlens_q
    bounds = bounds.tolist()
    if bounds[-1] != seqlen:
        raise GLM5PatchError(
            f"cu_seqlens_q ends at {bounds[-1]}, but the pack has {seqlen} tokens; "
            "count padding at the end of the pack as part of its last document"
        )
    return bounds


def document_starts(bounds: list[int], device="cpu") -> Tensor:
    """The position where each token's document starts, int64 [s]."""
    if len(bounds) == 2:  # made on the device, so that the host need not wait for a copy
        return torch.zeros(bounds[1], dtype=torch.int64, device=device)
    bounds = torch.tensor(bounds)
    return bounds[:-1].repeat_interleave(bounds.diff()).to(device)


def longest_document(bounds: list[int]) -> int:
    return max(end - begin for begin, end in zip(bounds, bounds[1:]))


def is_thd(packed_seq_params: PackedSeqParams | None) -> bool:
    """Whether the batch is packed: documents one after another, without a batch dimension."""
    return packed_seq_params is not None and packed_seq_params.qkv_format == "thd"


def query_blocks(seqlen: int, bytes_per_query: int, at_least: int = 1) -> Iterator[slice]:
    """Slices over the queries, each at most ``BLOCK_BYTES`` of logits, but some at least."""
    rows = max(at_least, BLOCK_BYTES // max(1, bytes_per_query))
    for begin in range(0, seqlen, rows):
        yield slice(begin, min(begin + rows, seqlen))


class Window(NamedTuple):
    """Queries at certain positions of one document, and the keys that the last of them sees.

    The positions where windows begin are the same in every document. A query is therefore computed
    in tensors of the same shapes, at the same place of them, whatever else is in the batch and
    whichever queries of the document a rank has. A BLAS may round another shape in another way.
    """

    rows: Tensor
    """int64: which of the queries."""
    slots: Tensor
    """int64: their places in the window, ascending."""
    size: int
    """Places of the window."""
    width: int
    """Positions of the document that the window sees: 0 to width - 1."""
    keys: slice
    """Where these are among the keys; fewer where the keys end before."""

    def of_queries(self, tensor: Tensor) -> Tensor:
        """[s, ...] -> [size, ...], zeros in places without a query."""
        if len(self.rows) == self.size:
            return tensor.index_select(0, self.rows)
        placed = tensor.new_zeros((self.size, *tensor.shape[1:]))
        return placed.index_copy(0, self.slots, tensor.index_select(0, self.rows))

    def of_keys(self, tensor: Tensor) -> Tensor:
        """[t, ...] -> [width, ...], zeros after the last key."""
        seen = tensor[self.keys]
        if len(seen) == self.width:
            return seen.clone(memory_format=torch.contiguous_format)
        padded = tensor.new_zeros((self.width, *tensor.shape[1:]))
        padded[: len(seen)] = seen
        return padded

    @property
    def visible(self) -> Tensor:
        """Which positions each place sees, bool [size, width]; none in places without a query."""
        device = self.slots.device
        first = self.width - self.size
        positions = torch.full((self.size,), -1, dtype=torch.int64, device=device)
        positions[self.slots] = self.slots + first
        return torch.arange(self.width, device=device) <= positions[:, None]

    def selected(self, topk_indices: Tensor | None) -> Tensor:
        """The keys that each place attends to, bool [b or 1, size, width].

        Args:
            topk_indices: int32 [b, s, k], see ``selected_keys``; None: every visible key.
        """
        if topk_indices is None:
            return self.visible[None]
        chosen = topk_indices.index_select(1, self.rows).long()  # [b, rows, k]
        columns = torch.where(chosen < 0, self.width, chosen)  # one more takes the empty places
        shape = len(chosen), self.size, self.width + 1
        mask = torch.zeros(shape, dtype=torch.bool, device=chosen.device)
        if len(self.rows) == self.size:
            mask.scatter_(-1, columns, True)
        else:
            mask[:, self.slots] = mask[:, : len(self.rows)].scatter(-1, columns, True)
        return mask[..., : self.width]


def windows(queries: QueryPositions, bytes_of_a_pair: int) -> Iterator[Window]:
    """All queries, in windows.

    Args:
        queries: where they stand among the keys.
        bytes_of_a_pair: what a query and a key take, of the ``BLOCK_BYTES`` that a window may.
    """
    device = queries.starts.device
    if queries.is_one_sequence:
        edges = _edges(queries.keys, bytes_of_a_pair)
        for first, width in zip(edges, edges[1:]):
            end = min(width, queries.keys)
            rows = torch.arange(first, end, device=device)
            yield Window(rows, rows - first, width - first, width, slice(0, end))
        return
    starts, local = queries.starts.cpu(), queries.local_positions.cpu()
    if not len(starts):
        return
    edges = torch.tensor(_edges(int(local.max()) + 1, bytes_of_a_pair))
    numbers = torch.searchsorted(edges, local, right=True) - 1
    groups, which = torch.unique(starts * len(edges) + numbers, return_inverse=True)
    order = (which * (edges[-1] + 1) + local).argsort()  # in a window by position
    counts = torch.bincount(which, minlength=len(groups)).tolist()
    for group, rows in zip(groups.tolist(), order.split(counts)):
        start, number = divmod(group, len(edges))
        first, width = edges[number : number + 2].tolist()
        keys = slice(start, min(start + width, queries.keys))
        slots = local[rows] - first
        yield Window(rows.to(device), slots.to(device), width - first, width, keys)


def _edges(length: int, bytes_of_a_pair: int) -> list[int]:
    """Where windows begin, up to one that begins at ``length`` or later."""
    edges = [0]
    while edges[-1] < length:
        fit = BLOCK_BYTES // (bytes_of_a_pair * (edges[-1] + WINDOW))
        edges.append(edges[-1] + max(1, min(WINDOW, fit)))
    return edges


def sequences(b: int, device: torch.device) -> list[slice]:
    """Which sequences of a batch of b are computed together. All on a CPU, whose BLAS computes each
    product of a batch by itself; one on a GPU, where a kernel is chosen by their number."""
    return [slice(0, b)] if device.type == "cpu" else [slice(n, n + 1) for n in range(b)]


def visible_keys(block: slice, queries: QueryPositions) -> Tensor:
    """Causal and document mask of a block of queries, bool [block, queries.end(block)]."""
    device = queries.starts.device
    if queries.positions is None:
        places = torch.arange(block.start, block.stop, device=device)[:, None]
    else:
        places = queries.positions[block, None]
    keys = torch.arange(queries.end(block), device=device)[None, :]
    return (keys <= places) & (keys >= queries.starts[block, None])


def selected_keys(block: slice, queries: QueryPositions, topk_indices: Tensor | None) -> Tensor:
    """The keys that a block of queries attends to, bool [b or 1, block, queries.end(block)].

    Args:
        block: the queries.
        queries: where they stand.
        topk_indices: int32 [b, s, k], positions counted from the query's document start, -1 for
            an empty place, those last; None: every visible key.
    """
    if topk_indices is None:
        return visible_keys(block, queries)[None]
    chosen = topk_indices[:, block].long()
    spare = queries.end(block)  # one more column takes the empty places
    columns = torch.where(chosen < 0, spare, chosen + queries.starts[block, None])
    mask = torch.zeros((*chosen.shape[:2], spare + 1), dtype=torch.bool, device=topk_indices.device)
    return mask.scatter_(-1, columns, True)[..., :spare]


def visible_topk(queries: QueryPositions, batch: int, multiple: int = 1) -> Tensor:
    """Every visible key of each query in the form of a top-k, int32 [b, s, longest document]; the
    last dimension is rounded up to a multiple."""
    width = -(-queries.most_keys // multiple) * multiple
    local = torch.arange(width, dtype=torch.int32, device=queries.starts.device)
    last = queries.local_positions[:, None]
    return torch.where(local <= last, local, -1).expand(batch, -1, -1)


def common_keys(topk_indices: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """How many keys two selections share, and how many the second has: fp32 scalars.

    Both int32 [b, s, k] of the same queries; -1 is an empty place.
    """
    width = max(int(part.max()) if part.numel() else -1 for part in (topk_indices, others)) + 1
    shared, of = (torch.zeros((), device=topk_indices.device) for _ in range(2))
    for block in query_blocks(topk_indices.shape[1], len(topk_indices) * (width + 1)):
        ours, theirs = (_named(part[:, block], width) for part in (topk_indices, others))
        shared += (ours & theirs).sum()
        of += theirs.sum()
    return shared, of


def _named(topk_indices: Tensor, width: int) -> Tensor:
    """Which positions a top-k names, bool [b, s, width]."""
    named = topk_indices.new_zeros((*topk_indices.shape[:2], width + 1), dtype=torch.bool)
    columns = topk_indices.long() % (width + 1)  # -1 goes to the spare last column
    return named.scatter_(-1, columns, True)[..., :width]
