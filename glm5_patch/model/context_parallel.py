"""A sequence split between the ranks of a context-parallel group, in megatron-core's zigzag order.

The whole, or in a pack each document, is cut into ``2 * size`` chunks; rank r holds chunk r and
chunk ``2 * size - 1 - r``, so that all ranks see equally many keys. Queries stay where they are.
What the keys are made of is gathered: the indexer's key, and the key-value latent with its rotary
part (576 wide, where the keys and values of 64 heads are 32768).
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from ..errors import GLM5PatchError
from .blocks import Rows, document_bounds, document_starts, is_thd


class ContextParallel:
    """How one batch is split between the ranks of ``group``."""

    def __init__(self, group, packed_seq_params, local_length: int, device):
        """Raises GLM5PatchError for a document that can't be cut into equal chunks."""
        self.group = group
        self.length = local_length * group.size()
        bounds = [0, self.length]
        if is_thd(packed_seq_params):
            bounds = document_bounds(packed_seq_params).tolist()
        self._positions = [
            _zigzag(bounds, rank, group.size()).to(device) for rank in range(group.size())
        ]
        starts = document_starts(packed_seq_params, self.length, device)
        own = self._positions[group.rank()]
        self.rows = Rows(starts[own], own, self.length)
        """What the queries of this rank see."""

    def gather(self, tensor: Tensor) -> Tensor:
        """[s / cp, ...] of every rank -> [s, ...] in natural order; gradients go back summed."""
        return self.gather_shards(tensor).index_select(0, self.order())

    def gather_shards(self, tensor: Tensor) -> Tensor:
        """As ``gather``, for [s / cp / tp, ...] under sequence parallelism; not yet in order: see
        ``order``, which fits once the tensor-parallel ranks have been gathered too."""
        return gather_from_sequence_parallel_region(tensor.contiguous(), group=self.group)

    def order(self, tp_size: int = 1) -> Tensor:
        """Index that puts gathered tokens in natural order.

        Args:
            tp_size: 1, or how many shards each rank's tokens were cut into before.
        """
        shards = [positions.chunk(tp_size) for positions in self._positions]
        gathered = [shard for tp_rank in zip(*shards) for shard in tp_rank]
        return torch.cat(gathered).argsort()


def _zigzag(bounds: list[int], rank: int, size: int) -> Tensor:
    """The positions that a rank holds of documents with these bounds, int64."""
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
