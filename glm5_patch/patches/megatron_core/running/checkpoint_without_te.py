"""``CheckpointWithoutOutput``: selective recompute that does not look for fp8 state."""

from __future__ import annotations

from ....patching.patch import Finding, Patch
from ...probes.megatron_core import reads_unbound_fp8_state


class CheckpointWithoutTE(Patch):
    id = "checkpoint_without_te"
    module = "megatron.core.tensor_parallel.random"
    attribute = "CheckpointWithoutOutput.__init__"
    why = "Without Transformer Engine, layernorm recompute raises NameError."
    upstream = "none"
    remove_when = "CheckpointWithoutOutput(fp8=False).fp8 is False"

    def needed(self, module) -> Finding:
        if reads_unbound_fp8_state(module):
            return Finding(True, "fp8=False counts as fp8, and FP8GlobalStateManager is unbound")
        return Finding(False, "fp8=False means no fp8, or Transformer Engine is there")

    def apply(self, module, seams) -> None:
        seams.wrap(module.CheckpointWithoutOutput, "__init__", _init)

    def guards(self, config) -> bool:
        return config.recompute_granularity == "selective"


def _init(wrapped, instance, args, kwargs):
    wrapped(*args, **kwargs)
    instance.fp8 = False
