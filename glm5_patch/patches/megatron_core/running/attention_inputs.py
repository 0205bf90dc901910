"""``DSAttention.forward``: the host's own sparse attention, told of masks and of padding."""

from __future__ import annotations

import copy
import inspect

from ....config.fields import is_glm5
from ....patching.patch import Finding, Patch, argument
from ...probes.megatron_core import shares_topk

READS = ("query", "attention_mask", "attn_mask_type", "packed_seq_params")


class AttentionInputs(Patch):
    id = "attention_inputs"
    module = "megatron.core.transformer.experimental_attention_variant.dsa"
    attribute = "DSAttention.forward"
    why = "A mask that is not causal is ignored, and padding inside a pack trains the indexer."
    upstream = "none: megatron-core 0.19 reads real_token_mask_q, but nothing sets it"
    remove_when = "the host refuses such a mask and reads cu_seqlens_q_padded for its indexer loss"

    def needed(self, module) -> Finding:
        if shares_topk(module):
            return Finding(True, "the host ignores attention_mask, and cu_seqlens_q_padded in part")
        return Finding(False, "the host's DSAttention shares nothing; ours takes its place")

    def apply(self, module, seams) -> None:
        seams.wrap(module.DSAttention, "forward", _forward, reads=READS)


def _forward(wrapped, instance, args, kwargs):
    read = {name: argument(wrapped, args, kwargs, name) for name in READS}
    mask, pack = read["attention_mask"], read["packed_seq_params"]
    if read["attn_mask_type"] is None:
        mask = None  # the one case in which the host applies it
    if not is_glm5(instance.config) or (mask is None and not _tells_padding_by_lengths(pack)):
        return wrapped(*args, **kwargs)
    from ....attention.mask import require_causal
    from ....topk.tokens import Layout

    query, cp_group = read["query"], instance.pg_collection.cp
    layout = Layout.of(instance.config, cp_group, pack, len(query), query.device)
    require_causal(mask, layout.queries)
    if layout.real is None:
        return wrapped(*args, **kwargs)
    # A copy: the user's object may serve another model next.
    pack = copy.copy(pack)
    real = layout.real.new_zeros(len(query)).index_fill_(0, layout.real, 1)
    pack.real_token_mask_q = real.bool()
    call = inspect.signature(wrapped).bind(*args, **kwargs)
    call.arguments["packed_seq_params"] = pack
    return wrapped(*call.args, **call.kwargs)


def _tells_padding_by_lengths(pack) -> bool:
    if getattr(pack, "real_token_mask_q", None) is not None:
        return False
    return getattr(pack, "cu_seqlens_q_padded", None) is not None
