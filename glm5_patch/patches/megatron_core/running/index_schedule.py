"""``DSAttention.__init__``: the host's own index sharing, by any schedule."""

from __future__ import annotations

import copy

from ....patching.patch import Finding, Patch, argument, with_argument
from ...probes.megatron_core import shares_by_freq_only


class IndexShareSchedule(Patch):
    id = "index_share_schedule"
    module = "megatron.core.transformer.experimental_attention_variant.dsa"
    attribute = "DSAttention.__init__"
    why = "A per-layer list of indexer types has no effect: every layer computes its top-k."
    upstream = "none: megatron-core 0.19 has freq and offset only"
    remove_when = "the host reads a per-layer list of indexer types"

    def needed(self, module) -> Finding:
        if shares_by_freq_only(module):
            return Finding(True, "the host's schedule is freq and offset only")
        return Finding(False, "the host's DSAttention shares nothing; ours takes its place")

    def apply(self, module, seams) -> None:
        seams.wrap(module.DSAttention, "__init__", _init, reads=("config", "layer_number"))

    def guards(self, config) -> bool:
        if getattr(config, "dsa_indexer_types", None) is not None:
            return True
        return bool(config.mtp_num_layers) and (config.dsa_indexer_topk_freq or 1) > 1


def _init(wrapped, instance, args, kwargs):
    config = argument(wrapped, args, kwargs, "config")
    layer_number = argument(wrapped, args, kwargs, "layer_number")
    from ....topk.mtp import mtp_depth

    if mtp_depth(layer_number, config.num_layers) is not None:
        computes, shares, source = True, False, layer_number
    elif config.dsa_indexer_types is None:
        return wrapped(*args, **kwargs)
    else:
        from ....config.schedule import IndexSchedule

        schedule = IndexSchedule.from_megatron(config)
        computes, shares = schedule.computes(layer_number), schedule.shares
        source = schedule.source(layer_number)
    # A configuration under which the host itself makes this one layer compute, or skip.
    as_host = copy.copy(config)
    as_host.dsa_indexer_skip_topk_offset = 0
    as_host.dsa_indexer_topk_freq = 1 if computes else layer_number + 1
    args, kwargs = with_argument(wrapped, args, kwargs, "config", as_host)
    wrapped(*args, **kwargs)
    instance.config = config
    instance.index_share = shares
    instance.source_layer = source
