"""Every stack of layers: one top-k carrier for each of its forwards.

A client may replace ``forward`` (mcore-bridge does), so the carrier is opened around ``__call__``.
megatron-core 0.16 and 0.17 call the ``HybridStack`` of later releases ``MambaStack``.
"""

from __future__ import annotations

import inspect

from ....config.fields import is_glm5
from ....errors import GLM5PatchError
from ....patching.patch import Finding, Patch
from ..building.gate import gated
from ..building.hybrid_layers import with_glm5_layers
from ..carrying import opens_carriers, with_carrier, with_stage_carrier


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
        seams.wrap(module.TransformerBlock, "__call__", with_stage_carrier)

    def still_right(self, module) -> Finding | None:
        return opens_carriers(module.TransformerBlock)


class _Stack:
    """What stacks without a ``__call__`` of their own have in common: a carrier around the call,
    the gate around the construction."""

    def needed(self, module) -> Finding:
        return Finding(True, "the host has no store that belongs to one forward")

    def apply(self, module, seams) -> None:
        seams.wrap_call(self._stack(module), self._call)
        seams.wrap(self._stack(module), "__init__", self._init, reads=self._reads)

    def still_right(self, module) -> Finding | None:
        return opens_carriers(self._stack(module))

    def _stack(self, module) -> type:
        return getattr(module, self.attribute.partition(".")[0])

    _init = staticmethod(gated)
    _reads: tuple[str, ...] = ("config",)
    _call = staticmethod(with_stage_carrier)


class HybridCarrier(_Stack, Patch):
    id = "hybrid_carrier"
    module = "megatron.core.models.hybrid.hybrid_block"
    attribute = "HybridStack.__call__"
    why = "A HybridModel's DSA layer is not GLM-5's, and its skip layers mix up forwards."
    upstream = "Megatron-LM #6793: the host stores the top-k on the mask or the config"
    remove_when = "the host's dsa_layer is correct, also under recompute"
    may_be_absent = True

    _init = staticmethod(with_glm5_layers)
    _reads = ("config", "submodules")


class MambaCarrier(_Stack, Patch):
    id = "mamba_carrier"
    module = "megatron.core.ssm.mamba_block"
    attribute = "MambaStack.__call__"
    why = "A skip layer of a MambaStack can't tell which top-k belongs to its own forward."
    upstream = "megatron-core 0.18 calls it HybridStack; see hybrid_carrier"
    remove_when = "no supported megatron-core is older than 0.18"
    may_be_absent = True

    def needed(self, module) -> Finding:
        if module.MambaStack.__module__ == module.__name__:
            return super().needed(module)
        return Finding(False, f"MambaStack is {module.MambaStack.__qualname__} here")


def _building_mtp(wrapped, instance, args, kwargs):
    from ....topk.mtp import building_mtp

    with building_mtp(instance):
        return gated(wrapped, instance, args, kwargs)


def _with_iteration(wrapped, instance, args, kwargs):
    from ....topk.carrier import current_carrier
    from ....topk.mtp import link_iteration

    def linked(*args, **kwargs):
        carrier = current_carrier()
        if carrier is not None:
            link_iteration(carrier)
        return wrapped(*args, **kwargs)

    return with_carrier(linked, instance, args, kwargs)


def _all_iterations(wrapped, instance, args, kwargs):
    from ....topk.mtp import is_repeated, iterations

    if not is_repeated(instance.config):
        return wrapped(*args, **kwargs)
    with iterations(instance.config):
        return wrapped(*args, **kwargs)


def _with_pack_bound(wrapped, instance, args, kwargs):
    """Full recompute of an MTP layer of packed documents. megatron-core 0.16 and 0.17 hand the pack
    to a function that saves tensors alone, and end in a TypeError of every model."""
    pack = kwargs.get("packed_seq_params")
    if not is_glm5(instance.config) or pack is None:
        return wrapped(*args, **kwargs)
    forward, *tensors = args
    place = len(tensors) + list(kwargs).index("packed_seq_params")

    def with_pack(*args, **kwargs):
        if "packed_seq_params" in kwargs:
            return forward(*args, **{**kwargs, "packed_seq_params": pack})
        return forward(*args[:place], pack, *args[place + 1 :], **kwargs)

    return wrapped(with_pack, *tensors, **{**kwargs, "packed_seq_params": None})


def _without_padding_mask(wrapped, instance, args, kwargs):
    """Full recompute of an MTP layer. megatron-core 0.18 calls it with ``padding_mask``, which it
    does not take, and ends in a TypeError of every model."""
    if not is_glm5(instance.config) or "padding_mask" not in kwargs:
        return wrapped(*args, **kwargs)
    if kwargs["padding_mask"] is not None:
        raise GLM5PatchError(
            "recompute_granularity='full' with a padding_mask: this megatron-core can't recompute "
            "an MTP layer with one; set recompute_granularity='selective'"
        )
    return wrapped(*args, **{k: v for k, v in kwargs.items() if k != "padding_mask"})


class MTPCarrier(_Stack, Patch):
    id = "mtp_carrier"
    module = "megatron.core.transformer.multi_token_prediction"
    attribute = "MultiTokenPredictionLayer.__call__"
    why = "A multi-token-prediction layer overwrites or reads the top-k of a decoder layer."
    upstream = "Megatron-LM #6472 (open) gives these layers their own index sharing"
    remove_when = "the host has a separate top-k for multi-token prediction"

    def needed(self, module) -> Finding:
        return Finding(True, "these layers are numbered, and keep their top-k, as the decoder's")

    def apply(self, module, seams) -> None:
        super().apply(module, seams)
        seams.wrap_call(module.MultiTokenPredictionBlock, _all_iterations)
        layer = module.MultiTokenPredictionLayer
        parameters = inspect.signature(layer._checkpointed_forward).parameters.values()
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            seams.wrap(layer, "_checkpointed_forward", _with_pack_bound)
        elif not any(parameter.name == "padding_mask" for parameter in parameters):
            seams.wrap(layer, "_checkpointed_forward", _without_padding_mask)

    def guards(self, config) -> bool:
        return bool(config.mtp_num_layers)

    _init = staticmethod(_building_mtp)
    _call = staticmethod(_with_iteration)
