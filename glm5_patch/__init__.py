"""GLM-5 on the megatron-core you already have.

Installing this package is enough: torch loads it through the ``torch.backends`` entry point and
each patch fills in what the host at hand lacks. These functions are for looking, asserting and
switching by hand, from any thread; importing this module imports nothing but the standard library.

PYTEST_DONT_REWRITE: nothing here asserts, and torch may import it before pytest does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from .patching.ledger import Status

__version__ = "0.1.0"
__all__ = ["__version__", "disable", "enable", "require", "status"]


def enable() -> Status:
    """Arm every patch, and apply at once those whose host module is already imported.

    Reads the ``GLM5_PATCH*`` environment variables (``glm5_patch.env``) again and does as they say
    now: with ``GLM5_PATCH=0`` everything that was applied is undone, a patch that is new in
    ``GLM5_PATCH_DISABLE`` is undone, one that is no longer there is applied. Changing a variable
    has no effect before the next call. A second call changes nothing, except where somebody
    replaced a patched attribute since by something that does not do the job: that is wrapped
    again, with a warning.

    Returns:
        What became of each patch.

    Raises:
        GLM5PatchError: a patch failed, under ``GLM5_PATCH_STRICT=1``.
        ValueError: a switch is wrong, under ``GLM5_PATCH_STRICT=1``; else it is a warning.
    """
    from .patches import MACHINE

    MACHINE.enable()
    return MACHINE.status()


def disable() -> Status:
    """Put every original object of every host back, and arm nothing until ``enable()``.

    A wrapper that somebody put around a patched function stays, and the function beneath it does
    what the original does.
    """
    from .patches import MACHINE

    MACHINE.disable()
    return MACHINE.status()


def status() -> Status:
    """What became of each patch in this process, and why.

    A host module that was loaded past the import hook, or reloaded, is patched now.
    """
    from .patches import MACHINE

    return MACHINE.status()


def require(*ids: str, model: nn.Module | None = None) -> Status:
    """Import the hosts that are installed, ``enable()``, and insist that they are patched.

    Without a model this says that the patches are in place, and nothing of a model: one that is
    built from a spec of your own may have other attention.

    Args:
        ids: patches to insist on; all of them by default.
        model: a built model, or a pipeline chunk of one. Every sparse layer of it must have the
            plugin's attention, or megatron-core's where the plugin finds or makes that right.

    Raises:
        GLM5PatchError: a patch that this host needs is not in place; the message names the
            patch, its seam and the cause. A layer of the model has attention that the plugin does
            not know; the message names its class. An uninstalled host is no error, unless none is
            there. Also where an environment variable of this package is wrong.
        ValueError: an id that no patch has.
    """
    from .patches import MACHINE

    MACHINE.require(ids)
    if model is not None:
        from .patches.built import require_attention

        require_attention(model)
    return MACHINE.status()
