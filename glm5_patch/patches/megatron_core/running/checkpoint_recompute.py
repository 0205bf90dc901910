"""``tensor_parallel.random``: a recompute finds the carrier of its own forward."""

from __future__ import annotations

from ....patching.patch import Finding, Patch


class CheckpointRecompute(Patch):
    id = "checkpoint_recompute"
    module = "megatron.core.tensor_parallel.random"
    attribute = "CheckpointFunction.forward"
    why = "A recompute runs outside the forward and finds no top-k, or another microbatch's."
    upstream = "Megatron-LM #6793 (open)"
    remove_when = "the host carries the top-k through recompute"

    def needed(self, module) -> Finding:
        return Finding(True, "checkpoints know nothing of the top-k")

    def apply(self, module, seams) -> None:
        # The autograd functions and not checkpoint() itself: no alias of it can be missed.
        seams.wrap(
            module.CheckpointFunction, "forward", _checkpoint_forward, reads=("run_function",)
        )
        seams.wrap(
            module.CheckpointWithoutOutput, "checkpoint", _checkpoint, reads=("run_function",)
        )

    def guards(self, config) -> bool:
        return False  # TransformerBlock.forward refuses to recompute without it, and says why


def _checkpoint_forward(wrapped, instance, args, kwargs):
    from ....topk.carrier import carried

    ctx, run_function, *rest = args
    return wrapped(ctx, carried(run_function), *rest, **kwargs)


def _checkpoint(wrapped, instance, args, kwargs):
    from ....topk.carrier import carried

    run_function, *rest = args
    return wrapped(carried(run_function), *rest, **kwargs)
