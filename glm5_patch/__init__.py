"""GLM-5 on the megatron-core you already have.

Installing this package is enough: torch loads it through the ``torch.backends`` entry point, and
each patch adds what the installed host lacks. The functions below are for programs that check the
plugin or build a model themselves. Importing this module imports only the standard library; the
other names are loaded when they are first used.

PYTEST_DONT_REWRITE: nothing here asserts, and torch may import it before pytest does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from .attention.build import gpt_model, set_latent_norm_epsilon, transformer_config
    from .attention.hybrid import hybrid_model
    from .checkpoint.bridge_report import report
    from .checkpoint.reader import HFCheckpoint
    from .checkpoint.writer import save
    from .config.huggingface import HFConfig
    from .errors import (
        CheckpointError,
        GLM5PatchError,
        MissingTopkError,
        PipelineSplitError,
        ScheduleError,
    )
    from .patching.ledger import Status
    from .testing.cpu_host import single_process
    from .testing.parity import recorded, topk_overlap
    from .topk.record import TopkRecording, record_topk
    from .topk.recordings.formats import (
        topk_from_array,
        topk_from_sglang,
        topk_from_sglang_log,
        topk_from_vllm,
    )
    from .topk.replay import replay_topk
    from .training.figures import (
        IndexerCallback,
        SelectionProbe,
        indexer_losses,
        write_figures,
    )
    from .training.phases import audit, set_phase

__version__ = "0.1.0"
__all__ = [
    "CheckpointError",
    "GLM5PatchError",
    "HFCheckpoint",
    "HFConfig",
    "IndexerCallback",
    "MissingTopkError",
    "PipelineSplitError",
    "ScheduleError",
    "SelectionProbe",
    "Status",
    "TopkRecording",
    "__version__",
    "audit",
    "disable",
    "enable",
    "gpt_model",
    "hybrid_model",
    "indexer_losses",
    "record_topk",
    "recorded",
    "replay_topk",
    "report",
    "require",
    "save",
    "set_latent_norm_epsilon",
    "set_phase",
    "single_process",
    "status",
    "topk_from_array",
    "topk_from_sglang",
    "topk_from_sglang_log",
    "topk_from_vllm",
    "topk_overlap",
    "transformer_config",
    "write_figures",
]

_LAZY = {
    "CheckpointError": "errors",
    "GLM5PatchError": "errors",
    "HFCheckpoint": "checkpoint.reader",
    "HFConfig": "config.huggingface",
    "IndexerCallback": "training.figures",
    "MissingTopkError": "errors",
    "PipelineSplitError": "errors",
    "ScheduleError": "errors",
    "SelectionProbe": "training.figures",
    "Status": "patching.ledger",
    "TopkRecording": "topk.record",
    "audit": "training.phases",
    "gpt_model": "attention.build",
    "hybrid_model": "attention.hybrid",
    "indexer_losses": "training.figures",
    "record_topk": "topk.record",
    "recorded": "testing.parity",
    "replay_topk": "topk.replay",
    "report": "checkpoint.bridge_report",
    "save": "checkpoint.writer",
    "set_latent_norm_epsilon": "attention.build",
    "set_phase": "training.phases",
    "single_process": "testing.cpu_host",
    "topk_from_array": "topk.recordings.formats",
    "topk_from_sglang": "topk.recordings.formats",
    "topk_from_sglang_log": "topk.recordings.formats",
    "topk_from_vllm": "topk.recordings.formats",
    "topk_overlap": "testing.parity",
    "transformer_config": "attention.build",
    "write_figures": "training.figures",
}
"""Public name -> the module of this package that defines it."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


def enable() -> Status:
    """Arm every patch, and apply at once those whose host module is already imported.

    Each call reads the ``GLM5_PATCH*`` environment variables (``glm5_patch.env``) again. With
    ``GLM5_PATCH=0`` it undoes every patch. It undoes the patches in ``GLM5_PATCH_DISABLE`` and
    applies the others. Changing a variable has no effect before the next call.

    A second call with the same variables changes nothing, with one exception: if a program has
    replaced a patched attribute with one that does not do the job, it is wrapped again, with a
    warning.

    Returns:
        The state of each patch.

    Raises:
        GLM5PatchError: a patch failed, under ``GLM5_PATCH_STRICT=1``.
        ValueError: a switch is wrong, under ``GLM5_PATCH_STRICT=1``; otherwise it is a warning.
    """
    from .patches import MACHINE

    MACHINE.enable()
    return MACHINE.status()


def disable() -> Status:
    """Restore every original object of every host, and arm nothing until ``enable()``.

    Another program's wrapper around a patched function stays. The function inside it then does
    what the original does.
    """
    from .patches import MACHINE

    MACHINE.disable()
    return MACHINE.status()


def status() -> Status:
    """The state of each patch in this process, with the reason.

    The call also patches a host module that bypassed the import hook or was reloaded.
    """
    from .patches import MACHINE

    return MACHINE.status()


def require(*ids: str, model: nn.Module | None = None) -> Status:
    """Import the installed hosts, call ``enable()``, and check that every patch is in place.

    Without ``model`` this checks the patches only. A model that is built from another spec may
    have other attention.

    Args:
        ids: the patches to check; all of them by default.
        model: a built model, or a pipeline chunk of one. Every sparse layer of it must have the
            plugin's attention, or megatron-core's if that is correct, by itself or with patches.

    Raises:
        GLM5PatchError: a patch that this host needs is not in place; the message names the
            patch, its seam and the cause. A layer of the model has attention that the plugin does
            not know; the message names its class. No host is installed. An environment variable
            of this package is wrong.
        ValueError: an id is unknown.
    """
    from .patches import MACHINE

    MACHINE.require(ids)
    if model is not None:
        from .patches.built import require_attention

        require_attention(model)
    return MACHINE.status()
