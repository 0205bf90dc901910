"""``GLM5Bridge``'s conversions: a strict report of what was read and written."""

from __future__ import annotations

from ...patching.patch import Finding, Patch, argument
from ...patching.wrapper import host_wrapper


class Conversion(Patch):
    id = "bridge_conversion"
    module = "megatron.bridge.models.glm_moe_dsa.glm5_bridge"
    attribute = "GLM5Bridge.load_weights_hf_to_megatron"
    why = "A missing tensor is a warning, and its parameter stays random; float8 loses its scales."
    upstream = "none"
    remove_when = "Bridge reads float8 and refuses a checkpoint with a missing tensor"
    on_request = True

    def needed(self, module) -> Finding:
        return Finding(True, "no release looks at what it read")

    def apply(self, module, seams) -> None:
        for name, around in (
            ("load_weights_hf_to_megatron", _load),
            ("stream_weights_hf_to_megatron", _stream_in),
            ("stream_weights_megatron_to_hf", _stream),
        ):
            inherited = getattr(module.GLM5Bridge, name)
            seams.add(module.GLM5Bridge, name, host_wrapper(inherited, around, method=True))


def _load(wrapped, instance, args, kwargs):
    from ...checkpoint.bridge_report import check_before_loading, dequantizing, describe_loading
    from ..announce import say

    hf_pretrained = argument(wrapped, args, kwargs, "hf_pretrained")
    survey = check_before_loading(hf_pretrained, argument(wrapped, args, kwargs, "megatron_model"))
    with dequantizing(hf_pretrained) as float8:
        loaded = wrapped(*args, **kwargs)
    if survey is not None:
        say(f"glm5-patch: {describe_loading(survey, len(float8))}")
    return loaded


def _stream_in(wrapped, instance, args, kwargs):
    from ...checkpoint.bridge_report import dequantizing

    hf_pretrained = argument(wrapped, args, kwargs, "hf_pretrained")

    def tensors():
        with dequantizing(hf_pretrained):
            yield from wrapped(*args, **kwargs)

    return tensors()


def _stream(wrapped, instance, args, kwargs):
    from ...checkpoint.bridge_report import checked
    from ..announce import say

    tensors = wrapped(*args, **kwargs)
    if argument(wrapped, args, kwargs, "conversion_tasks") is not None:
        return tensors  # a part that the caller chose
    hf_pretrained = argument(wrapped, args, kwargs, "hf_pretrained")
    model = argument(wrapped, args, kwargs, "megatron_model")
    return checked(tensors, hf_pretrained, model, lambda text: say(f"glm5-patch: {text}"))
