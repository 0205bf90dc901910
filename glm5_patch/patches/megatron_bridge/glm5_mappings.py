"""``GLM5Bridge.mapping_registry``: names of experts one by one, and of the MTP layer."""

from __future__ import annotations

from ...patching.patch import Finding, Patch
from ..probes.megatron_bridge import unmapped_glm5_parameters


class GLM5Mappings(Patch):
    id = "bridge_mappings"
    module = "megatron.bridge.models.glm_moe_dsa.glm5_bridge"
    attribute = "GLM5Bridge.mapping_registry"
    why = "Experts outside a grouped GEMM and the MTP layer are not converted."
    upstream = "Megatron-Bridge 0.6.0"
    remove_when = "no supported Bridge is older than 0.6"
    on_request = True

    def needed(self, module) -> Finding:
        absent = unmapped_glm5_parameters(module)
        if absent:
            return Finding(True, f"no mapping for {', '.join(absent)}")
        return Finding(False, "every parameter of a GLM-5 has a mapping")

    def apply(self, module, seams) -> None:
        def mapping_registry(wrapped, instance, args, kwargs):
            registry = wrapped(*args, **kwargs)
            # Those of quantizers are derived, and will be again.
            present = [m for m in registry.mappings if not m.megatron_param.endswith("._amax")]
            names = {mapping.megatron_param for mapping in present}
            absent = [m for m in _mappings(module, instance) if m.megatron_param not in names]
            return type(registry)(*present, *absent)

        seams.wrap(module.GLM5Bridge, "mapping_registry", mapping_registry)


def _mappings(module, bridge):
    """Everything that a release may lack, by Bridge's own classes."""
    from ...checkpoint.names import LAYER_NAMES, MTP_LAYERS, MTP_NAMES

    yield from _experts(module, "decoder.layers.*.mlp", "model.layers.*.mlp")
    config = bridge.hf_config
    for number in range(getattr(config, "num_nextn_predict_layers", None) or 0):
        mtp, hf = f"mtp.layers.{number}", f"model.layers.{config.num_hidden_layers + number}"
        for ours, (theirs,) in MTP_NAMES.items():
            yield module.AutoMapping(megatron_param=f"{mtp}.{ours}", hf_param=f"{hf}.{theirs}")
        for layer in MTP_LAYERS:
            for ours, (theirs,) in LAYER_NAMES.items():
                yield module.AutoMapping(
                    megatron_param=f"{mtp}.{layer}.{ours}", hf_param=f"{hf}.{theirs}"
                )
            for mlp in ("mlp", "mlp.shared_experts"):
                ours = f"{mtp}.{layer}.{mlp}.{{fc}}.weight"
                yield from _gated(module, ours, f"{hf}.{mlp}")
            yield from _experts(module, f"{mtp}.{layer}.mlp", f"{hf}.mlp")


def _experts(module, ours: str, theirs: str):
    for layout in ("{fc}.weight*", "local_experts.*.{fc}.weight"):
        yield from _gated(module, f"{ours}.experts.{layout}", f"{theirs}.experts.*")


def _gated(module, ours: str, theirs: str):
    """The two layers of a gated MLP; ``ours`` has a place for the layer's name."""
    yield module.GatedMLPMapping(
        megatron_param=ours.format(fc="linear_fc1"),
        gate=f"{theirs}.gate_proj.weight",
        up=f"{theirs}.up_proj.weight",
    )
    yield module.AutoMapping(
        megatron_param=ours.format(fc="linear_fc2"), hf_param=f"{theirs}.down_proj.weight"
    )
