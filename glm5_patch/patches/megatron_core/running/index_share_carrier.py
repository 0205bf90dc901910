"""``DSAttention._get_index_share_carrier``: the host's own index sharing, made per forward."""

from __future__ import annotations

from ....patching.patch import Finding, Patch
from ...probes.megatron_core import hangs_topk_on_arguments


class IndexShareCarrier(Patch):
    id = "index_share_carrier"
    module = "megatron.core.transformer.experimental_attention_variant.dsa"
    attribute = "DSAttention._get_index_share_carrier"
    why = "A recompute reads the top-k of whichever microbatch ran last: 77 % wrong gradients."
    upstream = "Megatron-LM #6793 (open)"
    remove_when = "the host keeps the shared top-k of each forward apart"

    def needed(self, module) -> Finding:
        if hangs_topk_on_arguments(module):
            return Finding(True, "the shared top-k hangs on the mask, the pack or the config")
        return Finding(False, "the host's DSAttention shares nothing; ours takes its place")

    def apply(self, module, seams) -> None:
        seams.wrap(module.DSAttention, "_get_index_share_carrier", _carrier)


def _carrier(wrapped, instance, args, kwargs):
    from ....topk.carrier import TopkCarrier, current_carrier

    # Outside a block (a layer of multi-token prediction) nothing may be shared.
    carrier = current_carrier()
    return TopkCarrier() if carrier is None else carrier
