"""``TopKRouter._apply``: the expert bias of a GLM-5 stays fp32 when the model becomes bf16."""

from __future__ import annotations

from ....config.fields import is_glm5
from ....patching.patch import Finding, Patch
from ....patching.wrapper import host_wrapper
from ...probes.megatron_core import rounds_expert_bias


class RouterBias(Patch):
    id = "router_bias"
    module = "megatron.core.transformer.moe.router"
    attribute = "TopKRouter._apply"
    why = "Float16Module rounds e_score_correction_bias, so tokens go to other experts."
    upstream = "none: the next forward makes the bias fp32 again, after it was rounded"
    remove_when = "Float16Module leaves the expert bias in fp32"

    def needed(self, module) -> Finding:
        if rounds_expert_bias(module.TopKRouter):
            return Finding(True, "a cast of the model rounds the expert bias")
        return Finding(False, "a cast of the model leaves the expert bias in fp32")

    def apply(self, module, seams) -> None:
        inherited = module.TopKRouter._apply
        seams.add(module.TopKRouter, "_apply", host_wrapper(inherited, _apply, method=True))

    def guards(self, config) -> bool:
        return bool(config.num_moe_experts and config.moe_router_enable_expert_bias)


def _apply(wrapped, instance, args, kwargs):
    import torch

    before = getattr(instance, "expert_bias", None)
    module = wrapped(*args, **kwargs)
    after = getattr(instance, "expert_bias", None)
    rounded = (
        before is not None
        and before.dtype == torch.float32
        and after.dtype in (torch.bfloat16, torch.float16)
    )
    if rounded and is_glm5(instance.config):
        after.data = before.to(after.device)
    return module
