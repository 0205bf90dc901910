"""The rope of the attention and of the indexer: positions are counted from each document's start,
whatever the layout of the batch."""

from __future__ import annotations

import torch

from ..ops.query_positions import QueryPositions
from ..ops.rotation.reference import Rotation
from ..topk.tokens import Layout


class Rope:
    """What turns the queries and keys of one module, and of its like in every layer."""

    def __init__(self, config, rotary_pos_emb, kind: str, interleaved: bool = True) -> None:
        """Keeps the parts.

        Args:
            config: of the model.
            kind: names the modules that turn alike.
            rotary_pos_emb: the host's embedding, that of this module.
            interleaved: see ``Rotation``.
        """
        self._is_yarn = config.rope_type == "yarn"
        self._embedding, self._interleaved = rotary_pos_emb, interleaved
        self._key = kind, id(config)

    def rotation(self, layout: Layout, dtype: torch.dtype) -> Rotation:
        """By the positions of this rank's queries.

        Args:
            layout: where they stand.
            dtype: of what is turned.
        """
        return layout.once((*self._key, dtype), lambda: self._rotation(layout.queries, dtype))

    def _rotation(self, queries: QueryPositions, dtype: torch.dtype) -> Rotation:
        # "packed" in the host's words: all positions, not only those of this rank.
        angles = self._embedding(queries.keys, packed_seq=True)  # [t, 1, 1, rope]
        angles, factor = angles if self._is_yarn else (angles, 1.0)
        angles = angles.flatten(1).index_select(0, queries.local_positions)  # [s, rope]
        cos, sin = ((part * factor).to(dtype) for part in (angles.cos(), angles.sin()))
        return Rotation(cos, sin, self._interleaved)
