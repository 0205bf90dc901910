"""A recompute trains what is trainable, also behind parameters that are frozen.

Megatron's checkpoints are reentrant: autograd runs one backward only if an input of it needs a
gradient. With a frozen embedding no input of the first layer does, and nothing inside a checkpoint
would train, without an error.
"""

from __future__ import annotations

import inspect


def with_grad(stack, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The arguments of a stack's call, with hidden states that need a gradient if it must.

    They become a leaf: no gradient goes on into the embedding, which would have none to keep.
    A stage after the first takes its input from the schedule, which lets it need a gradient.

    Args:
        stack: runs layers in order, some of them under recompute.
        args, kwargs: of its call.
    """
    import torch

    if not (stack.training and torch.is_grad_enabled() and stack.config.recompute_granularity):
        return args, kwargs
    call = inspect.signature(stack.forward).bind(*args, **kwargs)
    hidden_states = call.arguments.get("hidden_states")
    if not isinstance(hidden_states, torch.Tensor) or hidden_states.requires_grad:
        return args, kwargs
    if not any(parameter.requires_grad for parameter in stack.parameters()):
        return args, kwargs
    call.arguments["hidden_states"] = hidden_states.detach().requires_grad_()
    return call.args, call.kwargs
