"""``te_checkpoint``: the checkpoint that fp8 and fp4 training uses."""

from __future__ import annotations

from ....patching.patch import Finding, Patch
from ...probes.megatron_core import has_transformer_engine


class TECheckpoint(Patch):
    id = "te_checkpoint"
    module = "megatron.core.extensions.transformer_engine"
    attribute = "te_checkpoint"
    why = "Under fp8 or fp4, a recompute runs outside the forward and finds no top-k."
    upstream = "Megatron-LM #6793 (open)"
    remove_when = "the host carries the top-k through recompute"

    def needed(self, module) -> Finding:
        if has_transformer_engine():
            return Finding(True, "checkpoints know nothing of the top-k")
        return Finding(False, "no Transformer Engine here, so nothing calls it")

    def apply(self, module, seams) -> None:
        seams.wrap(module, self.attribute, _checkpoint, reads=("forward_func",))

    def guards(self, config) -> bool:
        return bool(config.recompute_granularity and (config.fp8 or config.fp4))


def _checkpoint(wrapped, instance, args, kwargs):
    from ....topk.carrier import carried

    forward_func, *rest = args
    return wrapped(carried(forward_func), *rest, **kwargs)
