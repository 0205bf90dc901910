"""Where the tokens of one batch stand: worked out once a forward, for all its layers."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .blocks import Rows
from .context_parallel import ContextParallel
from .topk_carrier import current_carrier


class Layout(NamedTuple):
    """The tokens of this rank among those of the batch."""

    rows: Rows
    split: ContextParallel | None = None
    """If the sequence is split between ranks."""

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
            layout = cls(split.rows, split)
        else:
            layout = cls(Rows.of(packed_seq_params, local_length, device))
        if carrier is not None:
            carrier.layout = layout
        return layout

    def gather(self, tensor: Tensor) -> Tensor:
        """[s / cp, ...] of every rank -> [s, ...] in natural order."""
        return tensor if self.split is None else self.split.gather(tensor)
