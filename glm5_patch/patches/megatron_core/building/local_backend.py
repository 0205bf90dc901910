"""``_get_backend_spec_provider``: DSA models without Transformer Engine."""

from __future__ import annotations

from ....config.fields import is_glm5
from ....patching.patch import Finding, Patch, argument
from ...probes.megatron_core import lacks_te_linear, why_backend_refuses_local


class LocalBackend(Patch):
    id = "local_backend"
    module = "megatron.core.models.gpt.experimental_attention_variant_module_specs"
    attribute = "_get_backend_spec_provider"
    why = "transformer_impl='local' can't build a DSA model: it needs Transformer Engine and a GPU."
    upstream = "none"
    remove_when = "the experimental block spec accepts transformer_impl='local'"

    def needed(self, module) -> Finding:
        reason = why_backend_refuses_local(module)
        return Finding(reason is not None, reason or "the host builds local DSA models")

    def apply(self, module, seams) -> None:
        seams.wrap(module, self.attribute, _backend, reads=("config",))

    def guards(self, config) -> bool:
        return config.transformer_impl == "local"


class _Linear:
    """What the modules of MLA have in common: by the name ``TELinear`` they decide how a down
    projection is split."""

    attribute = "TELinear"
    upstream = "none"
    remove_when = "MLA accepts any backend's linear layer as a down projection"

    def needed(self, module) -> Finding:
        if lacks_te_linear(module):
            return Finding(True, "TELinear is no class, and MLA asks what is one")
        return Finding(False, "Transformer Engine's linear layer is there")

    def apply(self, module, seams) -> None:
        from ....attention.local_backend import DuplicatedLinear

        seams.replace(module, self.attribute, DuplicatedLinear)

    def guards(self, config) -> bool:
        return config.transformer_impl == "local"


class LocalLinear(_Linear, Patch):
    id = "local_linear"
    module = "megatron.core.transformer.multi_latent_attention"
    why = "Without Transformer Engine, MLA has no linear layer with its whole weight on each rank."


class LocalAbsorbedLinear(_Linear, Patch):
    id = "local_absorbed_linear"
    module = "megatron.core.transformer.experimental_attention_variant.absorbed_mla"
    may_be_absent = True
    why = "The same as local_linear, for the host's own absorbed attention (megatron-core 0.19)."


def _backend(wrapped, instance, args, kwargs):
    config = argument(wrapped, args, kwargs, "config")
    if config.transformer_impl != "local" or not is_glm5(config):
        return wrapped(*args, **kwargs)
    from ....attention.local_backend import local_spec_provider  # imports torch and the host

    return local_spec_provider()
