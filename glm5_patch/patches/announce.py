"""The lines that rank 0 prints. The main one describes a GLM-5 when it is built."""

from __future__ import annotations

import logging
import sys
import weakref
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..config.fields import OFFLOAD
from ..env import logger

if TYPE_CHECKING:
    import torch

    from .built import Summary

_said: dict[tuple, str] = {}
"""What a model was built with -> the line of the first such model of this process."""
_other_dsa_announced = False
_untrained_announced = False
_asked_for_untrained: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


def announce(stack: torch.nn.Module, config: Any) -> None:
    """Print whose sparse attention a newly built stack of layers has.

    Models with the same settings, and the chunks of a pipeline, share one line.

    Args:
        stack: a ``TransformerBlock``, a ``HybridStack`` or a depth of multi-token prediction.
        config: its ``TransformerConfig``.

    Raises:
        GLM5PatchError: the stack is a GLM-5 with megatron-core's attention, which is wrong here.
        PipelineSplitError: the source of a skip layer is on another pipeline stage.
    """
    from ..config.fields import is_glm5
    from .built import (
        Summary,
        attentions_of,
        raise_unless_right,
        raise_unless_sources_are_here,
    )

    attentions = attentions_of(stack)
    if is_glm5(config):
        raise_unless_right(attentions, config)
        raise_unless_sources_are_here(stack, attentions, config)
    if not attentions or _rank() != 0:  # the description imports the backends
        return
    summary = Summary.of(attentions)
    if not is_glm5(config) and not summary.foreign:
        return  # megatron-core's own sparse attention in a model that is not GLM-5
    key = (summary.kinds, None if summary.foreign else _settings(config))
    if key not in _said:
        if summary.foreign:  # its configuration may have none of the settings that are described
            _said[key] = _foreign(summary)
        else:
            _said[key] = f"{describe(config, of_plugin=summary.of_plugin)}; {summary}"
        say(_said[key])


def built_models() -> dict[str, bool]:
    """The line of each model of this process -> whether the plugin knows its attention."""
    return {line: all(owner.vouched for owner, _ in kinds) for (kinds, _), line in _said.items()}


def _settings(config: Any) -> tuple:
    from ..config.schedule import IndexSchedule

    kernels = getattr(config, "dsa_kernel_backend", "none")
    split = config.tensor_model_parallel_size, config.sequence_parallel
    offloads = getattr(config, OFFLOAD, False)
    return IndexSchedule.from_megatron(config), config.params_dtype, kernels, split, offloads


def _foreign(summary: Summary) -> str:
    return (
        f"glm5-patch {__version__}: {summary}. The plugin does not check this attention; "
        "glm5_patch.require(model=model) refuses it"
    )


def announce_other_dsa(config: Any) -> None:
    """Print once that a DSA model keeps the host's code, and how to mark it as a GLM-5."""
    global _other_dsa_announced
    if _other_dsa_announced or _rank() != 0:
        return
    _other_dsa_announced = True
    why = "it has no setting of a GLM-5"
    if getattr(config, "dsa_is_glm5", None) is False:
        why = "dsa_is_glm5=False"
    say(
        f"glm5-patch {__version__}: this DSA model keeps megatron-core's own code ({why}). "
        "If it is a GLM-5, set dsa_is_glm5=True (--dsa-is-glm5) and its settings"
    )


def announce_untrained_indexers(stack: torch.nn.Module) -> None:
    """Print once that parameters of indexers are trainable but get no gradient.

    Adapters are added after the model is built, so the check runs in its forward.

    Args:
        stack: runs the layers of a GLM-5.
    """
    global _untrained_announced
    coefficient = getattr(stack.config, "dsa_indexer_loss_coeff", None)
    if _untrained_announced or not stack.training or coefficient:
        return
    if stack in _asked_for_untrained:
        return
    _asked_for_untrained.add(stack)
    from ..training.phases import kind_of

    kinds = {
        kind_of(name)
        for name, parameter in stack.named_parameters()
        if parameter.requires_grad and ".indexer." in name
    }
    if not kinds:
        return
    _untrained_announced = True
    what = "adapters on indexers" if "adapters" in kinds else "the indexers"
    say(
        f"glm5-patch {__version__}: {what} are trainable but get no gradient, only weight decay: "
        f"dsa_indexer_loss_coeff is {coefficient}. Set it (to 0.001, for example), or "
        "freeze them before the optimizer is made: set_phase(model, 'frozen_indexer')"
    )


def say(line: str) -> None:
    """Print a line on rank 0: to the log if INFO is enabled and has a handler, else to stderr."""
    if _rank() != 0:
        return
    if logger.isEnabledFor(logging.INFO) and logger.hasHandlers():
        logger.info(line)
    else:
        print(line, file=sys.stderr)


def describe(config: Any, *, of_plugin: bool = True) -> str:
    """The versions, patches, index schedule and kernels of a model.

    Args:
        config: its ``TransformerConfig``.
        of_plugin: whether its attention modules are the plugin's, not the host's.
    """
    from ..config.fields import describe_conventions
    from ..config.schedule import IndexSchedule
    from ..env import installed_version
    from ..patching.ledger import State
    from . import MACHINE

    states = [row.state for row in MACHINE.status()]
    core = installed_version("megatron-core") or "from a folder on the path"
    host_backend = None if of_plugin else getattr(config, "dsa_kernel_backend", "none")
    attention = sparse_attention_by(config.params_dtype, host_backend)
    return (
        f"glm5-patch {__version__}: a GLM-5 on megatron-core {core}; "
        f"{states.count(State.APPLIED)} patches applied, "
        f"{states.count(State.NOT_NEEDED)} not needed; {IndexSchedule.from_megatron(config)}; "
        f"{describe_conventions(config)}; "
        f"sparse attention by {attention}{_shared_out(config, of_plugin)}{_offload(config)}"
    )


def _offload(config: Any) -> str:
    return (
        "; top-k wait for their backward in host memory" if getattr(config, OFFLOAD, False) else ""
    )


def _shared_out(config: Any, of_plugin: bool) -> str:
    """What the ranks of tensor parallelism share out, and why."""
    if config.tensor_model_parallel_size == 1:
        return ""
    from ..topk.tokens import Shared, shared_out

    shared = shared_out(config) if of_plugin else Shared(False, "megatron-core's attention")
    what = "tokens" if shared.tokens else "heads"
    return f"; tensor parallelism shares out {what} ({shared.reason})"


def sparse_attention_by(dtype: torch.dtype, host_backend: str | None = None) -> str:
    """The backend that computes sparse attention here, and why no faster one does.

    Args:
        dtype: the model's.
        host_backend: ``dsa_kernel_backend`` of a model with the host's attention modules; None for
            a model with the plugin's.
    """
    from ..ops.registry import computed_by, triton_and_libraries, why_torch
    from ..patching.ledger import State
    from . import MACHINE

    device = _device()
    spec, hooks = MACHINE.row("dsa_spec"), MACHINE.row("dsa_kernels")
    if host_backend is None and spec.state is State.APPLIED:
        return computed_by(device, dtype)
    if hooks.state is not State.APPLIED:
        row = hooks if spec.state is State.NOT_NEEDED else spec
        reason = f"{row.id} {row.state.value}"
    elif host_backend not in (None, "none"):
        reason = f"dsa_kernel_backend={host_backend}"
    else:
        reason = why_torch(device, dtype)
    if reason is None:
        return triton_and_libraries(device, dtype)
    return f"megatron-core's own code ({reason})"


def _device() -> torch.device:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _rank() -> int:
    import torch

    distributed = torch.distributed
    initialized = distributed.is_available() and distributed.is_initialized()
    return distributed.get_rank() if initialized else 0
