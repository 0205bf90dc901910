"""The rope of the attention and of the indexer: positions are counted from each document's start,
whatever the layout of the batch."""

from __future__ import annotations

import copy
import inspect
from typing import NamedTuple

from megatron.core.models.common.embeddings import apply_rotary_pos_emb
from torch import Tensor

from ..ops.query_positions import QueryPositions


class Rotation(NamedTuple):
    """What the queries' positions turn a tensor by."""

    angles: Tensor
    """[s, 1, 1, rope]."""
    mscale: float
    """Factor of what is rotated: YaRN's, else 1."""


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

    def rotation(self, queries: QueryPositions) -> Rotation:
        """To rotate by, at the queries' positions."""
        # "packed" in the host's words: all positions, not only those of this rank.
        angles = self._embedding(queries.keys, packed_seq=True)  # [t, 1, 1, rope]
        angles, mscale = angles if self._config.rope_type == "yarn" else (angles, 1.0)
        return Rotation(angles.index_select(0, queries.local_positions), mscale)  # [s, 1, 1, rope]

    def rotate(self, tensor: Tensor, rotation: Rotation) -> Tensor:
        """Rotate [s, b, heads, rope]."""
        return apply_rotary_pos_emb(
            tensor,
            rotation.angles,
            config=self._config,
            mscale=rotation.mscale,
            cp_group=self._cp_group,
            **self._pairing,
        )
