"""What sparse attention is computed from."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ..needs import Call
from ..query_positions import QueryPositions, visible_topk


class MLADims(NamedTuple):
    """Widths of one head, and of the latent that all heads share."""

    latent: int
    """``kv_lora_rank``."""
    nope: int
    """``qk_head_dim``: the part of a query without rotary position."""
    rope: int
    """``qk_pos_emb_head_dim``."""
    value: int
    """``v_head_dim``."""

    @classmethod
    def of(cls, config) -> MLADims:
        return cls(
            config.kv_lora_rank, config.qk_head_dim, config.qk_pos_emb_head_dim, config.v_head_dim
        )


class AttentionInputs(NamedTuple):
    """Queries, what keys and values are made of, and which keys each query attends to."""

    query: Tensor
    """[s, b, n, nope + rope]."""
    latent: Tensor
    """[t, b, 1, latent + rope]; t is s, or more under context parallelism."""
    up_projection: Tensor
    """Makes keys and values of the latent, [latent, n * (nope + value)]."""
    topk_indices: Tensor | None
    """int32 [b, s, k], see ``selected_keys``, with every visible key of a query that has no more
    than k; None: every visible key of all queries."""
    queries: QueryPositions
    """Where the queries stand among the keys."""
    dims: MLADims
    softmax_scale: float
    """Factor of the logits."""
    lse: Tensor | None = None
    """What the attention found over these keys: the log2-sum-exp2 of each query's logits, fp32
    [s, b, n]; None: not known."""
    make_query: Callable[[], Tensor] | None = None
    """Makes the query again, with the same bits, so that a backward need not keep it."""

    @property
    def call(self) -> Call:
        return Call.of(
            self.query,
            heads=self.query.shape[2],
            kv_lora_rank=self.dims.latent,
            qk_pos_emb_head_dim=self.dims.rope,
        )

    def detach(self) -> AttentionInputs:
        """The same without a way for gradients."""
        return self._replace(
            query=self.query.detach(),
            latent=self.latent.detach(),
            up_projection=self.up_projection.detach(),
            make_query=None,
        )

    def with_topk(self, multiple: int = 1) -> AttentionInputs:
        """The same with a top-k; every visible key's if it had none, see ``visible_topk``."""
        if self.topk_indices is not None:
            return self
        every_key = visible_topk(self.queries, self.query.shape[1], multiple)
        return self._replace(topk_indices=every_key)

    def of_queries(self, places: Tensor | slice) -> AttentionInputs:
        """Some queries alone, int64 or a slice; the keys stay."""
        topk_indices = self.topk_indices
        return self._replace(
            query=self.query[places],
            topk_indices=None if topk_indices is None else topk_indices[:, places],
            queries=self.queries.of_queries(places),
            lse=None if self.lse is None else self.lse[places],
            make_query=None,
        )


class AbsorbedInputs(NamedTuple):
    """Queries with the up-projection of keys folded in, which meet the latent itself."""

    query: Tensor
    """[s, b, n, latent + rope], contiguous."""
    latent: Tensor
    """[t, b, latent + rope], contiguous."""
    topk_indices: Tensor
    """int32 [b, s, k], contiguous, see ``selected_keys``; empty places come last."""
    starts: Tensor
    """int32 [s]: where each query's document starts."""
    positions: Tensor
    """int32 [s]: where each query stands."""
    latent_dim: int
    """How much of a key is its value; the rest is rotary."""
    softmax_scale: float
    """Factor of the logits."""

    @property
    def call(self) -> Call:
        return Call.of(
            self.query,
            heads=self.query.shape[2],
            kv_lora_rank=self.latent_dim,
            qk_pos_emb_head_dim=self.query.shape[3] - self.latent_dim,
        ).sized(
            dsa_indexer_topk=self.topk_indices.shape[-1],
            query_numbers=self.query.numel(),
            latent_numbers=self.latent.numel(),
        )
