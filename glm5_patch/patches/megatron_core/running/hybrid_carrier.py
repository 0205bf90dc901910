"""``HybridStack.__call__``: a HybridModel's layers share their top-k as a GPTModel's do.

megatron-core 0.16 and 0.17 call the stack ``MambaStack``, in a module of its own.
"""

from __future__ import annotations

from ....patching.patch import Finding, Patch
from ..building.gate import gated
from ..carrying import opens_carriers, with_carrier


class HybridCarrier(Patch):
    id = "hybrid_carrier"
    module = "megatron.core.models.hybrid.hybrid_block"
    attribute = "HybridStack.__call__"
    why = "A skip layer of a HybridModel can't tell which top-k belongs to its own forward."
    upstream = "Megatron-LM #6793: the host stores the top-k on the mask or the config"
    remove_when = "the host carries the top-k per forward and through recompute"
    on_request = True

    def needed(self, module) -> Finding:
        return Finding(True, "the host has no store that belongs to one forward")

    def apply(self, module, seams) -> None:
        seams.wrap_call(module.HybridStack, with_carrier)
        seams.wrap(module.HybridStack, "__init__", gated, reads=("config",))

    def still_right(self, module) -> Finding | None:
        return opens_carriers(module.HybridStack)


class MambaCarrier(Patch):
    id = "mamba_carrier"
    module = "megatron.core.ssm.mamba_block"
    attribute = "MambaStack.__call__"
    why = "A skip layer of a MambaStack can't tell which top-k belongs to its own forward."
    upstream = "megatron-core 0.18 calls it HybridStack; see hybrid_carrier"
    remove_when = "no supported megatron-core is older than 0.18"
    on_request = True

    def needed(self, module) -> Finding:
        if module.MambaStack.__module__ == module.__name__:
            return Finding(True, "the host has no store that belongs to one forward")
        return Finding(False, f"MambaStack is {module.MambaStack.__qualname__} here")

    def apply(self, module, seams) -> None:
        seams.wrap_call(module.MambaStack, with_carrier)
        seams.wrap(module.MambaStack, "__init__", gated, reads=("config",))

    def still_right(self, module) -> Finding | None:
        return opens_carriers(module.MambaStack)
