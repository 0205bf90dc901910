"""``dsa_kernels``: fused kernels for a model that asks the host for none."""

from __future__ import annotations

from ....config.fields import is_glm5
from ....patching.patch import Finding, Patch, argument
from ...probes.megatron_core import has_dsa_kernel_hooks


class DSAKernels(Patch):
    id = "dsa_kernels"
    module = "megatron.core.transformer.experimental_attention_variant.dsa"
    attribute = "dsa_kernels.use_fused_dsa_kernels"
    why = "Without TileLang or cuDNN, attention takes memory quadratic in the sequence length."
    upstream = "megatron-core 0.19 has hooks; its kernels for them need other packages"
    remove_when = "the host has fused kernels that need only torch"

    def needed(self, module) -> Finding:
        if has_dsa_kernel_hooks(module):
            return Finding(True, "without dsa_kernel_backend the host's attention is unfused")
        return Finding(False, "the host has no hooks for kernels; ours are in our attention")

    def apply(self, module, seams) -> None:
        hooks = module.dsa_kernels
        seams.wrap(hooks, "use_fused_dsa_kernels", _use_fused, reads=("config",))
        seams.wrap(hooks, "_load_backend", _load_backend, reads=("config",))

    def guards(self, config) -> bool:
        return False  # right without it, only slow


def _use_fused(wrapped, instance, args, kwargs):
    return wrapped(*args, **kwargs) or _serves(argument(wrapped, args, kwargs, "config"))


def _load_backend(wrapped, instance, args, kwargs):
    if _serves(argument(wrapped, args, kwargs, "config")):
        from ....attention import host_dsa as dsa_backend

        return dsa_backend
    return wrapped(*args, **kwargs)


def _serves(config) -> bool:
    if not is_glm5(config):
        return False
    from ....attention.host_dsa import serves

    return serves(config)
