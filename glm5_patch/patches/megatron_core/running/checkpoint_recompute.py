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

    def still_right(self, module) -> Finding:
        return finds_carriers_again(module)

    def guards(self, config) -> bool:
        return False  # TransformerBlock.forward refuses to recompute without it, and says why


def finds_carriers_again(module) -> Finding:
    """Whether a recompute sees the carrier of its own forward, tried with one scalar.

    ``needed`` of the answer is False where it does, whoever wrote what is called.
    """
    for checkpoint in (_run_checkpoint, _run_checkpoint_without_output):
        name = checkpoint.__name__.removeprefix("_run_")
        try:
            right = _sees_its_carrier(checkpoint, module)
        except Exception as error:
            return Finding(True, f"{name} could not be tried ({type(error).__name__}: {error})")
        if not right:
            return Finding(True, f"a recompute by {name} does not see its own forward's top-k")
    return Finding(False, "a recompute sees the top-k of its own forward")


def _sees_its_carrier(checkpoint, module) -> bool:
    import torch

    from ....topk.carrier import current_carrier, open_carrier

    seen = []

    def function(x):
        seen.append(current_carrier())
        return x * 2

    with torch.enable_grad():
        with open_carrier() as carrier:
            output = checkpoint(module, function, torch.ones((), requires_grad=True))
        with open_carrier():  # another forward, while the first goes backward
            output.backward()
    return len(seen) == 2 and all(one is carrier for one in seen)


def _run_checkpoint(module, function, x):
    return module.checkpoint(function, False, x)


def _run_checkpoint_without_output(module, function, x):
    run = module.CheckpointWithoutOutput()
    output = run.checkpoint(function, x)
    result = output * output
    run.discard_output_and_register_recompute(result)
    return result


def _checkpoint_forward(wrapped, instance, args, kwargs):
    from ....topk.carrier import carried

    ctx, run_function, *rest = args
    return wrapped(ctx, carried(run_function), *rest, **kwargs)


def _checkpoint(wrapped, instance, args, kwargs):
    from ....topk.carrier import carried

    run_function, *rest = args
    return wrapped(carried(run_function), *rest, **kwargs)
