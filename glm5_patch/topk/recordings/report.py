"""How many of the recorded keys a model's own indexers would have selected."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.fallback import compute
from ...ops.index_topk.reference import IndexerInputs
from ...ops.query_positions import QueryPositions, query_blocks
from ..ahead import Decoded
from ..record import LayerName


class ReplayReport:
    """Counts of recorded keys by layer, over the forwards of one ``replay_topk`` block and of this
    rank's queries. Only queries that have a choice count."""

    def __init__(self) -> None:
        self._counts: dict[LayerName, Tensor] = {}  # int64 [2]: kept, all

    @property
    def counts(self) -> dict[int, tuple[int, int]]:
        """Layer number -> how many recorded keys the layer's indexer would have selected, and how
        many there are. To sum them up over ranks, add them up first and divide then."""
        return self._counts_of(is_mtp=False)

    @property
    def mtp_counts(self) -> dict[int, tuple[int, int]]:
        """Likewise by the depth of multi-token prediction."""
        return self._counts_of(is_mtp=True)

    @property
    def shares(self) -> dict[int, float]:
        """Layer number -> share of the recorded keys that its indexer would have selected; 1.0
        where no query has a choice."""
        return _shares(self.counts)

    @property
    def mtp_shares(self) -> dict[int, float]:
        """Likewise by the depth of multi-token prediction."""
        return _shares(self.mtp_counts)

    def _counts_of(self, is_mtp: bool) -> dict[int, tuple[int, int]]:
        found = sorted((name.number, n) for name, n in self._counts.items() if name[0] == is_mtp)
        return {number: tuple(counts.tolist()) for number, counts in found}

    @torch.no_grad()
    def add(
        self,
        name: LayerName,
        inputs: IndexerInputs,
        scale: float,
        queries: QueryPositions,
        decoded: Decoded,
        real: Tensor | None = None,
    ) -> None:
        """Compare the recorded keys of one layer with its scores.

        A key counts as selected if its score is at least the lowest that would be selected: of
        equal scores, mostly 0 after ReLU, it says nothing which are selected.

        Args:
            name: of the layer.
            inputs: what the scores of its indexer are made of.
            scale: of the products of the indexer's queries and keys.
            queries: of this rank.
            decoded: the recorded keys.
            real: int64, the queries that are not padding; None: all of them.
        """
        inputs = IndexerInputs(*(tensor.detach().contiguous() for tensor in inputs))
        topk_indices = decoded.topk_indices
        b, s, k = topk_indices.shape
        counted = (queries.local_positions >= k).expand(b, -1)
        if decoded.missing is not None:
            counted = counted & ~decoded.missing
        if real is not None:
            is_real = torch.zeros(s, dtype=torch.bool, device=counted.device)
            is_real[real] = True
            counted = counted & is_real
        keys = torch.arange(queries.keys, device=counted.device)
        found = topk_indices.new_zeros(2, dtype=torch.int64)
        for block in query_blocks(s, b * queries.keys * 4):
            scores = compute("index_scores", inputs.call, inputs, queries, block, scale)
            starts, places = queries.starts[block, None], queries.places[block, None]
            visible = (keys >= starts) & (keys <= places)
            scores = scores.masked_fill(~visible, float("-inf"))  # [b, block, t]
            lowest = scores.topk(k, sorted=False)[0].amin(-1, keepdim=True)
            columns = topk_indices[:, block].clamp_min(0).long() + starts
            recorded = counted[:, block, None] & (topk_indices[:, block] >= 0)
            kept = (scores.gather(-1, columns) >= lowest) & recorded
            found += torch.stack([kept.sum(), recorded.sum()])
        self._counts[name] = self._counts[name] + found if name in self._counts else found


def _shares(counts: dict[int, tuple[int, int]]) -> dict[int, float]:
    return {n: kept / all_ if all_ else 1.0 for n, (kept, all_) in counts.items()}
