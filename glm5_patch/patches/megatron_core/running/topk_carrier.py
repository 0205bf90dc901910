"""``TransformerBlock.forward``: one top-k carrier for each forward."""

from __future__ import annotations

from ....config.fields import is_glm5
from ....errors import GLM5PatchError
from ....patching.ledger import State
from ....patching.patch import Finding, Patch


class BlockCarrier(Patch):
    id = "topk_carrier"
    module = "megatron.core.transformer.transformer_block"
    attribute = "TransformerBlock.forward"
    why = "Skip layers can't tell which forward's top-k is theirs."
    upstream = "Megatron-LM #6793: the host's own holder lives on the mask or the config"
    remove_when = "the host carries the top-k per forward and through recompute"

    def needed(self, module) -> Finding:
        return Finding(True, "the host has no store that belongs to one forward")

    def apply(self, module, seams) -> None:
        seams.wrap(module.TransformerBlock, "forward", _forward)


def _forward(wrapped, instance, args, kwargs):
    if not is_glm5(instance.config):
        return wrapped(*args, **kwargs)
    from ....topk.carrier import open_carrier
    from ...announce import announce_untrained_indexers
    from ..frozen_inputs import with_grad

    announce_untrained_indexers(instance)
    args, kwargs = with_grad(instance, args, kwargs)
    _refuse_unsafe_recompute(instance)
    with open_carrier():
        return wrapped(*args, **kwargs)


def _refuse_unsafe_recompute(block) -> None:
    if not block.training or block.config.recompute_granularity is None:
        return
    from ... import MACHINE

    row = MACHINE.row("checkpoint_recompute")
    if row.state is not State.APPLIED:
        raise GLM5PatchError(
            f"patch 'checkpoint_recompute' is {row.state.value} ({row.reason}), so a recompute "
            "would not find the top-k of its own microbatch; train without recompute "
            f"(recompute_granularity=None, now {block.config.recompute_granularity!r})"
        )
