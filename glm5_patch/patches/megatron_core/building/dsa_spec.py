"""``get_experimental_attention_variant_module_spec``: the dispatcher, and a right DSA spec."""

from __future__ import annotations

from ....config.fields import is_dsa, is_glm5, set_conventions
from ....patching.patch import Finding, Patch
from ...probes.megatron_core import why_dsa_spec_is_wrong
from .gate import check_gate


class DSASpec(Patch):
    id = "dsa_spec"
    module = "megatron.core.models.gpt.experimental_attention_variant_module_specs"
    attribute = "get_experimental_attention_variant_module_spec"
    why = "A 'dsa' layer is refused, or selects other keys than GLM-5 (57 % right at best)."
    upstream = "megatron-core 0.18.0 knows 'dsa'; 0.19.0 has the right spec and index sharing"
    remove_when = "no supported megatron-core is older than 0.19"

    def needed(self, module) -> Finding:
        reason = why_dsa_spec_is_wrong(module) or "forced"
        return Finding(reason is not None, reason or "the host's own spec is right")

    def apply(self, module, seams) -> None:
        def dispatch(wrapped, instance, args, kwargs):
            return _dispatch(module, wrapped, *args, **kwargs)

        seams.wrap(module, self.attribute, dispatch, reads=("config", "backend"))


def _dispatch(module, wrapped, config, backend=None):
    if not is_glm5(config):
        try:
            return wrapped(config=config, backend=backend)
        except ValueError:
            if not is_dsa(config) or config.dsa_is_glm5 is False:
                raise
            # The host builds no DSA model, and this one became one after it was validated.
            config.dsa_is_glm5 = True
    check_gate(config)
    set_conventions(config)
    from ....attention.spec import glm5_attention_spec  # imports torch and the host

    backend = backend or module._get_backend_spec_provider(config=config)
    try:
        host_spec = wrapped(config=config, backend=backend)
    except ValueError:
        # 0.16 and 0.17 have this builder and never call it.
        host_spec = module.get_dsa_module_spec_for_backend(config=config, backend=backend)
    return glm5_attention_spec(host_spec, config, backend)
