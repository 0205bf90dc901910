"""``get_experimental_attention_variant_module_spec``: the dispatcher, and a right DSA spec."""

from __future__ import annotations

from typing import NamedTuple

from .... import env
from ....config.fields import (
    INDEXER_PRECISIONS,
    LOSS_LAYERS,
    PHASE,
    WITHOUT_GRAPHS,
    ZIGZAG,
    attends_to_every_key,
    captured_attention,
    is_dsa,
    is_glm5,
    learns_across_layers,
    set_conventions,
)
from ....config.schedule import IndexSchedule
from ....errors import GLM5PatchError
from ....patching.patch import Finding, Patch
from ....topk.mtp import shares_iterations
from ...probes.megatron_core import hangs_topk_on_arguments, why_dsa_spec_is_wrong
from .gate import check_gate


class Stack(NamedTuple):
    """Whose attention modules a GLM-5 is built of."""

    is_plugin: bool
    reason: str


class DSASpec(Patch):
    id = "dsa_spec"
    module = "megatron.core.models.gpt.experimental_attention_variant_module_specs"
    attribute = "get_experimental_attention_variant_module_spec"
    why = "A 'dsa' layer is refused, selects other keys than GLM-5, or shares them wrongly."
    upstream = "0.18.0 builds 'dsa'; 0.19.0 has GLM-5's spec, but its recompute is wrong (#6793)"
    remove_when = "the host's own modules are correct, also under recompute"

    def needed(self, module) -> Finding:
        wrong = why_dsa_spec_is_wrong(module)
        if wrong is None and hangs_topk_on_arguments(module):
            return Finding(True, "the host's index sharing is wrong under recompute")
        if wrong is None and env.attention() == "plugin":
            return Finding(True, f"{env.ATTENTION}=plugin")
        return Finding(wrong is not None, wrong or "the host's own spec is right")

    def apply(self, module, seams) -> None:
        wrong = why_dsa_spec_is_wrong(module)

        def dispatch(wrapped, instance, args, kwargs):
            return _dispatch(module, wrong, wrapped, *args, **kwargs)

        seams.wrap(module, self.attribute, dispatch, reads=("config", "backend"))

    def still_right(self, module) -> None:
        return None  # a probe through our dispatcher would ask here again


def attention_stack(config, wrong: str | None) -> Stack:
    """Whose modules a GLM-5 is built of, as ``GLM5_PATCH_ATTENTION`` asks.

    Args:
        config: the ``TransformerConfig`` of a GLM-5.
        wrong: why the host's modules can't be a GLM-5's; None if they can.

    Raises:
        GLM5PatchError: the host's modules are asked for, and can't do what the configuration says.
    """
    asked = env.attention()
    kernels = getattr(config, "dsa_kernel_backend", "none") or "none"
    if asked == "auto" and kernels != "none" and wrong is None:
        asked, reason = "host", f"dsa_kernel_backend={kernels}"
    else:
        reason = f"{env.ATTENTION}={asked}"
    if asked != "host":
        return Stack(True, reason)
    unset = f"unset {env.ATTENTION}, or set it to plugin"
    if wrong is not None:
        raise GLM5PatchError(f"{reason}: {wrong}; {unset}")
    captured = captured_attention(config)
    if captured is not None and IndexSchedule.from_megatron(config).shares:
        raise GLM5PatchError(
            f"{captured} with {reason} captures attention. Layers of megatron-core's own share "
            f"their top-k in Python, which a replayed graph skips: {WITHOUT_GRAPHS}"
        )
    if config.dsa_topk_across_stages and config.pipeline_model_parallel_size > 1:
        raise GLM5PatchError(
            f"dsa_topk_across_stages=True with {reason}: megatron-core's own sparse attention "
            f"shares no top-k between pipeline stages; {unset}"
        )
    if config.dsa_indexer_precision != INDEXER_PRECISIONS[0]:
        raise GLM5PatchError(
            f"dsa_indexer_precision={config.dsa_indexer_precision!r} with {reason}: "
            f"megatron-core's own sparse attention selects in the model's dtype alone; {unset}"
        )
    if config.dsa_topk_replay:
        raise GLM5PatchError(
            f"dsa_topk_replay=True with {reason}: megatron-core's own sparse attention replays no "
            f"recorded keys; {unset}"
        )
    if config.dsa_topk_offload:
        raise GLM5PatchError(
            f"dsa_topk_offload=True with {reason}: megatron-core's own sparse attention keeps its "
            f"top-k on the device; {unset}"
        )
    if attends_to_every_key(config):
        raise GLM5PatchError(
            f"{PHASE}={config.dsa_training_phase!r} with {reason}: megatron-core's own sparse "
            f"attention is never dense; {unset}"
        )
    if learns_across_layers(config):
        raise GLM5PatchError(
            f"{LOSS_LAYERS}={config.dsa_indexer_loss_layers!r} with {reason}: an indexer of "
            f"megatron-core's own sparse attention learns from its own layer alone; {unset}"
        )
    if shares_iterations(config):
        raise GLM5PatchError(
            f"dsa_indexer_share_for_mtp_iteration=True with {reason}: megatron-core's own sparse "
            f"attention selects anew in each iteration; {unset}"
        )
    order = config.dsa_context_parallel_order
    if order != ZIGZAG and config.context_parallel_size > 1:
        raise GLM5PatchError(
            f"dsa_context_parallel_order={order!r} with {reason}: megatron-core's own sparse "
            f"attention takes {ZIGZAG!r} alone; {unset}"
        )
    if env.tensor_parallel() == "tokens" and config.tensor_model_parallel_size > 1:
        raise GLM5PatchError(
            f"{env.TENSOR_PARALLEL}=tokens with {reason}: megatron-core's own sparse attention "
            f"shares out heads alone; {unset}, or set {env.TENSOR_PARALLEL}=auto"
        )
    return Stack(False, reason)


def _dispatch(module, wrong, wrapped, config, backend=None):
    if not is_glm5(config):
        try:
            return wrapped(config=config, backend=backend)
        except ValueError:
            if not is_dsa(config) or getattr(config, "dsa_is_glm5", None) is False:
                raise
            # The host builds no DSA model, and this one became one after it was validated.
            config.dsa_is_glm5 = True
    check_gate(config)
    set_conventions(config)
    if not attention_stack(config, wrong).is_plugin:
        return wrapped(config=config, backend=backend)
    from ....attention.spec import glm5_attention_spec  # imports torch and the host

    backend = backend or module._get_backend_spec_provider(config=config)
    try:
        host_spec = wrapped(config=config, backend=backend)
    except ValueError:
        # 0.16 and 0.17 have this builder and never call it.
        host_spec = module.get_dsa_module_spec_for_backend(config=config, backend=backend)
    return glm5_attention_spec(host_spec, config, backend)
