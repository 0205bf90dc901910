"""``multi_latent_attention``: a HAVE_TE flag that is true only with Transformer Engine."""

from __future__ import annotations

from ...core.patch import Finding, Patch


class MLAWithoutTE(Patch):
    id = "mla_without_te"
    module = "megatron.core.transformer.multi_latent_attention"
    attribute = "HAVE_TE"
    why = "Without Transformer Engine the MLA constructor does isinstance(..., None)."
    upstream = "none"
    remove_when = "HAVE_TE is False wherever TELinear is None"

    def needed(self, module) -> Finding:
        if getattr(module, "HAVE_TE", False) and not isinstance(module.TELinear, type):
            return Finding(True, f"HAVE_TE is true and TELinear is {module.TELinear!r}")
        return Finding(False, "HAVE_TE and TELinear agree")

    def apply(self, module, seams) -> None:
        seams.replace(module, self.attribute, False)
