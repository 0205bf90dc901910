"""``MultiTokenPredictionLayer``: each depth has a carrier of its own, and shares with no layer."""

from __future__ import annotations

from ....patching.patch import Finding, Patch
from ..building.gate import gated
from ..carrying import opens_carriers, with_carrier


class MTPCarrier(Patch):
    id = "mtp_carrier"
    module = "megatron.core.transformer.multi_token_prediction"
    attribute = "MultiTokenPredictionLayer.__call__"
    why = "A multi-token-prediction layer overwrites or reads the top-k of a decoder layer."
    upstream = "Megatron-LM #6472 (open) gives these layers their own index sharing"
    remove_when = "the host has a separate top-k for multi-token prediction"

    def needed(self, module) -> Finding:
        return Finding(True, "these layers are numbered, and keep their top-k, as the decoder's")

    def apply(self, module, seams) -> None:
        seams.wrap_call(module.MultiTokenPredictionLayer, with_carrier)
        seams.wrap(module.MultiTokenPredictionLayer, "__init__", _init, reads=("config",))

    def guards(self, config) -> bool:
        return bool(config.mtp_num_layers)

    def still_right(self, module) -> Finding | None:
        return opens_carriers(module.MultiTokenPredictionLayer)


def _init(wrapped, instance, args, kwargs):
    from ....topk.mtp import building_mtp

    with building_mtp():
        return gated(wrapped, instance, args, kwargs)
