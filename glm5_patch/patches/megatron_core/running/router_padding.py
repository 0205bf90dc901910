"""``TopKRouter._apply_expert_bias``: padding is not counted as load of the experts."""

from __future__ import annotations

from ....config.fields import is_glm5
from ....patching.patch import Finding, Patch, argument
from ...probes.megatron_core import why_padding_is_counted


class RouterPadding(Patch):
    id = "router_padding"
    module = "megatron.core.transformer.moe.router"
    attribute = "TopKRouter._apply_expert_bias"
    why = "A padding_mask raises RuntimeError in the router of a model with an expert bias."
    upstream = "megatron-core 0.20"
    remove_when = "no supported megatron-core is older than 0.20"

    def needed(self, module) -> Finding:
        cause = why_padding_is_counted(module.TopKRouter)
        return Finding(cause is not None, cause or "the router leaves padded tokens out")

    def apply(self, module, seams) -> None:
        seams.wrap(
            module.TopKRouter,
            "_apply_expert_bias",
            _apply_expert_bias,
            reads=("routing_map", "padding_mask"),
        )

    def still_right(self, module) -> Finding | None:
        return self.needed(module)

    def guards(self, config) -> bool:
        # Not an error alone: with as many tokens as experts the host counts wrong ones.
        return bool(config.moe_router_enable_expert_bias)


def _apply_expert_bias(wrapped, instance, args, kwargs):
    padding_mask = argument(wrapped, args, kwargs, "padding_mask")
    if padding_mask is None or not is_glm5(instance.config):
        return wrapped(*args, **kwargs)
    routing_map = argument(wrapped, args, kwargs, "routing_map")  # bool [tokens, experts]
    return wrapped(routing_map & ~padding_mask.reshape(-1, 1))
