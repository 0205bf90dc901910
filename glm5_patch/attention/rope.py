"""Rotary positions counted from each document's start, whatever the layout of the batch."""

from __future__ import annotations

import copy
import inspect

from megatron.core.models.common.embeddings import apply_rotary_pos_emb
from torch import Tensor

from ..ops.query_positions import QueryPositions


class Rope:
    """Rotates the queries and keys of one module."""

    def __init__(self, config, rotary_pos_emb, cp_group, interleaved: bool = True) -> None:
        """Keeps the parts.

        Args:
            config: of the model.
            rotary_pos_emb: the host's embedding, that of this module.
            cp_group: context-parallel group, for the host's signature.
            interleaved: pairs are (0, 1), (2, 3), ... and not the two halves.
        """
        self._embedding, self._cp_group = rotary_pos_emb, cp_group
        # apply_rotary_pos_emb pairs neighbours for MLA and splits halves otherwise; from
        # megatron-core 0.19 on an argument tells it, and not the configuration.
        takes = inspect.signature(apply_rotary_pos_emb).parameters
        told_by_argument = "mla_rotary_interleaved" in takes
        self._pairing = {"mla_rotary_interleaved": interleaved} if told_by_argument else {}
        self._config = copy.copy(config)
        self._config.multi_latent_attention = interleaved
        self._config.rotary_interleaved = False
        self._config.apply_rope_fusion = False

    def frequencies(self, queries: QueryPositions) -> tuple[Tensor, float]:
        """Angles of the queries' positions, [s, 1, 1, d], and the factor of what is rotated."""
        # "packed" in the host's words: all positions, not only those of this rank.
        angles = self._embedding(queries.keys, packed_seq=True)
        angles, mscale = angles if self._config.rope_type == "yarn" else (angles, 1.0)
        return angles.index_select(0, queries.local_positions), mscale

    def rotate(self, tensor: Tensor, angles: Tensor, mscale: float) -> Tensor:
        """Rotate [s, b, heads, d]."""
        return apply_rotary_pos_emb(
            tensor,
            angles,
            config=self._config,
            mscale=mscale,
            cp_group=self._cp_group,
            **self._pairing,
        )
