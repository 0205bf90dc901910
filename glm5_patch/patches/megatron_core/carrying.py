"""What every stack of layers gets around its call: a top-k carrier for each forward."""

from __future__ import annotations

import sys
from types import SimpleNamespace

from ...config.fields import ACROSS_STAGES, OFFLOAD, is_glm5
from ...errors import GLM5PatchError
from ...patching.ledger import State
from ...patching.patch import Finding

OUR_ATTENTION = "glm5_patch.attention.attention"
HOST_MLA = "megatron.core.transformer.experimental_attention_variant.absorbed_mla"


def with_carrier(wrapped, instance, args, kwargs, crosses_stages: bool = False):
    """Call a stack with a carrier open, where its layers share their top-k.

    Args:
        wrapped, instance, args, kwargs: the call.
        crosses_stages: the stack is what a pipeline stage has of the decoder.
    """
    if not carries(instance):
        return wrapped(*args, **kwargs)
    from ...topk.carrier import open_carrier
    from ..announce import announce_untrained_indexers
    from .frozen_inputs import with_grad

    announce_untrained_indexers(instance)
    args, kwargs = with_grad(instance, args, kwargs)
    _refuse_unsafe_recompute(instance)
    _refuse_adapters_without_effect(instance)
    if crosses_stages:
        _open_loss_log(instance)
    crosses_stages = crosses_stages and getattr(instance.config, ACROSS_STAGES, False)
    with open_carrier() as carrier:
        if getattr(instance.config, OFFLOAD, False):
            from ...topk.offload import HostMemory

            carrier.host_memory = HostMemory()
        if carrier.replay is not None or carrier.recorder is not None:
            _refuse_to_replay_other_attention(instance)
        if carrier.replay is not None:
            carrier.replay.layers = _computing_layers(instance)
        if not crosses_stages:
            return wrapped(*args, **kwargs)
        from .stage_ends import send, take

        take(instance, carrier)
        return send(instance, carrier, wrapped(*args, **kwargs))


def with_stage_carrier(wrapped, instance, args, kwargs):
    """``with_carrier`` of a stack that may take a top-k from the pipeline stage before, and may
    send one on."""
    return with_carrier(wrapped, instance, args, kwargs, crosses_stages=True)


def carries(stack) -> bool:
    """Whether layers of this stack may share their top-k.

    The configuration of a model that was built from a spec of the user's may not say so; then its
    layers do.
    """
    if is_glm5(stack.config) or shares(stack.config):
        return True
    ours = sys.modules.get(OUR_ATTENTION)
    if ours is None:
        return False
    return any(isinstance(core, ours.CrossLayerDSAttention) for _, core in _cores(stack))


def _cores(stack) -> list[tuple]:
    """Each layer that has a core attention, and that."""
    layers = getattr(stack, "layers", ())
    attentions = (getattr(layer, "self_attention", None) for layer in layers)
    cores = (getattr(attention, "core_attention", None) for attention in attentions)
    return [(layer, core) for layer, core in zip(layers, cores) if core is not None]


def shares(config) -> bool:
    """Whether a configuration asks for index sharing, which no model but GLM-5 has."""
    return (getattr(config, "dsa_indexer_topk_freq", None) or 1) > 1


def opens_carriers(stack_class: type) -> Finding:
    """Whether each call of this class has a carrier of its own, tried on a stand-in.

    ``needed`` of the answer is False where it does, whoever wrote what is called.
    """
    import torch

    from ...topk.carrier import current_carrier

    class Stack(stack_class):
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.config = SimpleNamespace(
                experimental_attention_variant="dsa",
                dsa_indexer_topk_freq=2,
                recompute_granularity=None,
                cuda_graph_impl="none",
                enable_cuda_graph=False,
            )

        def forward(self):
            return current_carrier()

    stack = Stack()
    first, second = stack(), stack()
    name = f"{stack_class.__name__}.__call__"
    if first is None or second is None:
        return Finding(True, f"what replaced {name} opens no top-k carrier")
    if first is second:
        return Finding(True, f"what replaced {name} gives two forwards one top-k carrier")
    return Finding(False, f"what replaced {name} opens a top-k carrier for each forward")


def _computing_layers(stack) -> list:
    """Names of the computing layers of a stack, and of multi-token prediction if it follows or is
    the stack."""
    from ...topk.record import LayerName

    sources = [core.topk_source for _, core in _cores(stack)]
    names = [source.name for source in sources if source.computes]
    if getattr(stack, "post_process", True):
        depths = getattr(stack.config, "mtp_num_layers", None) or 0
        names += [LayerName(True, depth) for depth in range(1, depths + 1)]
    return names


def _open_loss_log(stack) -> None:
    """Have a log of indexer losses on every stage of a model of our attention modules."""
    if getattr(stack.config, "pipeline_model_parallel_size", 1) == 1 or not is_glm5(stack.config):
        return
    from ...attention.attention import CrossLayerDSAttention
    from ...attention.loss_log import open_log

    if all(isinstance(core, CrossLayerDSAttention) for _, core in _cores(stack)):
        open_log(stack)


def _refuse_unsafe_recompute(stack) -> None:
    if not stack.training or stack.config.recompute_granularity is None:
        return
    from .. import MACHINE

    row = MACHINE.row("checkpoint_recompute")
    if row.state not in (State.APPLIED, State.NOT_NEEDED):
        raise GLM5PatchError(
            f"patch 'checkpoint_recompute' is {row.state.value} ({row.reason}), so a recompute "
            "would not find the top-k of its own microbatch; train without recompute "
            f"(recompute_granularity=None, now {stack.config.recompute_granularity!r})"
        )


def _refuse_to_replay_other_attention(stack) -> None:
    """megatron-core's own sparse attention asks neither a recording nor a recorder."""
    from ...attention.attention import CrossLayerDSAttention

    for layer, core in _cores(stack):
        if not isinstance(core, CrossLayerDSAttention):
            raise GLM5PatchError(
                f"layer {layer.layer_number} has {type(core).__name__} as its attention, which "
                "record_topk and replay_topk do not reach; build the model with "
                "GLM5_PATCH_ATTENTION=plugin"
            )


def _refuse_adapters_without_effect(stack) -> None:
    """megatron-core's own MLA of a GLM-5 reads the weight of the latent's up projection, and an
    adapter around that is never called. Adapters come after the model is built."""
    host = sys.modules.get(HOST_MLA)
    if host is None:
        return
    from ...training.phases import kind_of

    for layer in getattr(stack, "layers", ()):
        attention = getattr(layer, "self_attention", None)
        if not isinstance(attention, host.AbsorbedMLASelfAttention):
            continue
        for name, _ in attention.linear_kv_up_proj.named_parameters():
            if kind_of(f"linear_kv_up_proj.{name}") == "adapters":
                raise GLM5PatchError(
                    f"layer {layer.layer_number} has an adapter on linear_kv_up_proj, which "
                    "megatron-core's own attention never calls: leave linear_kv_up_proj out of "
                    "the adapter's target_modules, or build the model with "
                    "GLM5_PATCH_ATTENTION=plugin"
                )
