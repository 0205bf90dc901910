"""``_get_backend_spec_provider``: DSA models without Transformer Engine."""

from __future__ import annotations

import sys

from ....config.fields import is_glm5
from ....patching.patch import Finding, Patch, argument
from ...probes.megatron_core import lacks_te_linear, why_backend_refuses_local

_MLA_MODULES = (
    "megatron.core.transformer.multi_latent_attention",
    "megatron.core.transformer.experimental_attention_variant.absorbed_mla",  # 0.17 on
)


class LocalBackend(Patch):
    id = "local_backend"
    module = "megatron.core.models.gpt.experimental_attention_variant_module_specs"
    attribute = "_get_backend_spec_provider"
    why = "transformer_impl='local' can't build a DSA model: no CPU, no CI, no other vendor's GPU."
    upstream = "none"
    remove_when = "the experimental block spec accepts transformer_impl='local'"

    def needed(self, module) -> Finding:
        reason = why_backend_refuses_local(module)
        return Finding(reason is not None, reason or "the host builds local DSA models")

    def apply(self, module, seams) -> None:
        seams.wrap(module, self.attribute, _backend, reads=("config",))
        # MLA decides by this name how a down projection is split; None is no class to ask for.
        from ....attention.local_backend import DuplicatedLinear

        for mla in filter(lacks_te_linear, map(sys.modules.get, _MLA_MODULES)):
            seams.replace(mla, "TELinear", DuplicatedLinear)

    def guards(self, config) -> bool:
        return config.transformer_impl == "local"


def _backend(wrapped, instance, args, kwargs):
    config = argument(wrapped, args, kwargs, "config")
    if config.transformer_impl != "local" or not is_glm5(config):
        return wrapped(*args, **kwargs)
    from ....attention.local_backend import LocalDSASpecProvider  # imports torch and the host

    return LocalDSASpecProvider()
