"""``TransformerBlock.__call__``: one top-k carrier for each forward.

A client may replace ``forward`` (mcore-bridge does), so the carrier is opened around it.
"""

from __future__ import annotations

from ....patching.patch import Finding, Patch
from ..carrying import opens_carriers, with_carrier


class BlockCarrier(Patch):
    id = "topk_carrier"
    module = "megatron.core.transformer.transformer_block"
    attribute = "TransformerBlock.__call__"
    why = "A skip layer can't tell which top-k belongs to its own forward."
    upstream = "Megatron-LM #6793: the host stores the top-k on the mask or the config"
    remove_when = "the host carries the top-k per forward and through recompute"

    def needed(self, module) -> Finding:
        return Finding(True, "the host has no store that belongs to one forward")

    def apply(self, module, seams) -> None:
        seams.wrap(module.TransformerBlock, "__call__", with_carrier)

    def still_right(self, module) -> Finding | None:
        return opens_carriers(module.TransformerBlock)
