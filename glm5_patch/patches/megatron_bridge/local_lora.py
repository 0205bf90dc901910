"""``get_adapter_attributes_from_linear``: adapters on the down projections of a local model."""

from __future__ import annotations

from ...patching.patch import Finding, Patch, argument
from ..probes.megatron_bridge import knows_only_named_linears


class LocalLoRA(Patch):
    id = "bridge_local_lora"
    module = "megatron.bridge.peft.utils"
    attribute = "get_adapter_attributes_from_linear"
    why = "LoRA on the down projections of transformer_impl='local' raises NotImplementedError."
    upstream = "none"
    remove_when = "Bridge accepts any linear layer that is marked as not parallel"
    on_request = True

    def needed(self, module) -> Finding:
        if knows_only_named_linears(module):
            return Finding(True, "of whole linear layers only Transformer Engine's are known")
        return Finding(False, "a linear layer can say that it is not parallel")

    def apply(self, module, seams) -> None:
        def attributes(wrapped, instance, args, kwargs):
            from ...attention.local_backend import DuplicatedLinear

            linear = argument(wrapped, args, kwargs, "m")
            if not isinstance(linear, DuplicatedLinear):
                return wrapped(*args, **kwargs)
            out_features, in_features = linear.weight.shape
            return module.AdapterAttributes(
                input_is_parallel=False,
                in_features=in_features,
                out_features=out_features,
                disable_tensor_parallel_comm=False,
                disable_sequence_parallel_comm=not linear.config.sequence_parallel,
                base_linear_is_parallel=False,
            )

        seams.wrap(module, self.attribute, attributes, reads=("m",))

    def guards(self, config) -> bool:
        return config.transformer_impl == "local"
