"""``_get_backend_spec_provider``: DSA models without Transformer Engine."""

from __future__ import annotations

from ...core.host import why_backend_refuses_local
from ...core.patch import Finding, Patch, argument


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
        seams.wrap(module, "get_dsa_module_spec_for_backend", _dsa_spec, reads=("config",))

    def guards(self, config) -> bool:
        return config.transformer_impl == "local"


def _backend(wrapped, instance, args, kwargs):
    config = argument(wrapped, args, kwargs, "config")
    if config.transformer_impl != "local":
        return wrapped(*args, **kwargs)
    from ...model.local import LocalDSASpecProvider  # imports torch and the host

    return LocalDSASpecProvider()


def _dsa_spec(wrapped, instance, args, kwargs):
    """The host's own spec, with down projections of a class that its MLA accepts."""
    spec = wrapped(*args, **kwargs)
    config = argument(wrapped, args, kwargs, "config")
    if config.transformer_impl == "local":
        from megatron.core.tensor_parallel.layers import ColumnParallelLinear

        spec.submodules.linear_q_down_proj = ColumnParallelLinear
        spec.submodules.linear_kv_down_proj = ColumnParallelLinear
    return spec
