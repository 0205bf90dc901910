"""``moe_utils``: a router that does not look for Transformer Engine's GEMM."""

from __future__ import annotations

from ....patching.patch import Finding, Patch
from ...probes.megatron_core import reads_unbound_gemm


class MoEWithoutTE(Patch):
    id = "moe_without_te"
    module = "megatron.core.transformer.moe.moe_utils"
    attribute = "te_general_gemm"
    why = "Without Transformer Engine, the router raises NameError."
    upstream = "megatron-core 0.17.0 binds it to None"
    remove_when = "no supported megatron-core leaves te_general_gemm unbound"

    def needed(self, module) -> Finding:
        if reads_unbound_gemm(module):
            return Finding(True, "te_general_gemm is unbound, and the router reads it")
        return Finding(False, "the name is bound, or nothing reads it")

    def apply(self, module, seams) -> None:
        seams.add(module, "te_general_gemm", None)

    def guards(self, config) -> bool:
        return config.num_moe_experts is not None
