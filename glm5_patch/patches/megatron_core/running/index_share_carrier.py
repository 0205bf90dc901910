"""``DSAttention._get_index_share_topk_holder``: the host's own index sharing, made per forward.

The holders are answered from the carrier, and not what they hang on: clients replace or override
``_get_index_share_carrier`` (SkyRL, mcore-bridge), and theirs need not be undone for that.
"""

from __future__ import annotations

from types import SimpleNamespace

from ....errors import GLM5PatchError
from ....patching.patch import Finding, Patch
from ...probes.megatron_core import hangs_topk_on_arguments

HOLDERS = {
    "_get_index_share_topk_holder": "host_topk",
    "_get_index_share_topk_length_holder": "host_topk_lengths",
}
"""Method of the host -> attribute of ``TopkCarrier``."""
CARRIED = "_glm5_patch_carried"
"""Set on an attention module whose last forward had a carrier."""


class IndexShareCarrier(Patch):
    id = "index_share_carrier"
    module = "megatron.core.transformer.experimental_attention_variant.dsa"
    attribute = "DSAttention._get_index_share_topk_holder"
    why = "A recompute reads the top-k of the microbatch that ran last: 74 % wrong gradients."
    upstream = "Megatron-LM #6793 (open)"
    remove_when = "the host has a separate shared top-k for each forward"

    def needed(self, module) -> Finding:
        if hangs_topk_on_arguments(module):
            return Finding(True, "the shared top-k hangs on the mask, the pack or the config")
        return Finding(False, "the host's DSAttention shares nothing; ours takes its place")

    def apply(self, module, seams) -> None:
        for method, kept_in in HOLDERS.items():
            seams.wrap(module.DSAttention, method, _answered_from(kept_in))

    def still_right(self, module) -> Finding | None:
        import torch

        attention = object.__new__(module.DSAttention)
        torch.nn.Module.__init__(attention)
        attention.config = SimpleNamespace()
        return keeps_forwards_apart(attention)


def keeps_forwards_apart(attention) -> Finding:
    """Whether the top-k that layers share belongs to one forward, tried on an instance.

    Two forwards are opened as a stack does, and the first is entered again as its recompute does.
    ``needed`` of the answer is False where each finds its own holders, whoever gives them.
    """
    from ....topk.carrier import TopkCarrier, open_carrier

    mask = SimpleNamespace()  # one that outlives both forwards, as a data loader's may
    one, two = TopkCarrier(), TopkCarrier()
    for method in HOLDERS:
        name = f"{type(attention).__qualname__}.{method}"
        try:
            held = []
            for carrier in (one, two, one):
                with open_carrier(carrier):
                    held.append(getattr(attention, method)(None, mask))
        except Exception as error:
            return Finding(True, f"{name} could not be tried ({type(error).__name__}: {error})")
        finally:
            vars(attention).pop(CARRIED, None)  # this was no forward
        first, second, again = held
        if first is second:
            return Finding(True, f"{name} gives two forwards one holder")
        if first is not again:
            return Finding(True, f"{name} gives a recompute another holder than its forward")
    return Finding(False, f"the holders of {type(attention).__qualname__} belong to one forward")


def _answered_from(kept_in: str):
    def holder(wrapped, instance, args, kwargs):
        from ....topk.carrier import current_carrier

        carrier = current_carrier()
        if carrier is not None:
            setattr(instance, CARRIED, True)
            return getattr(carrier, kept_in)
        _refuse_unknown_recompute(instance)
        return wrapped(*args, **kwargs)

    return holder


def _refuse_unknown_recompute(attention) -> None:
    """The forward had a carrier, and its recompute has none: the host's answer would be wrong."""
    import torch

    in_backward = torch._C._current_graph_task_id() != -1
    if in_backward and getattr(attention, CARRIED, False):
        raise GLM5PatchError(
            f"layer {attention.layer_number} is recomputed by a checkpoint that glm5-patch does "
            "not know, so it would not find the top-k of its own microbatch; recompute by "
            "megatron.core.tensor_parallel.checkpoint, or run the checkpointed function through "
            "glm5_patch.topk.carrier.carried(function)"
        )
