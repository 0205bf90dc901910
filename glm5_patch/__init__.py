"""GLM-5 on the megatron-core you already have.

Installing this package is enough: torch loads it through the ``torch.backends`` entry point and
each patch fills in what the host at hand lacks. These functions are for looking, asserting and
switching by hand; importing this module imports nothing but the standard library.

PYTEST_DONT_REWRITE: nothing here asserts, and torch may import it before pytest does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .patching.ledger import Status

__version__ = "0.1.0"
__all__ = ["__version__", "disable", "enable", "require", "status"]


def enable() -> Status:
    """Arm every patch, and apply at once those whose host module is already imported.

    Idempotent. Obeys the ``GLM5_PATCH*`` environment variables (``glm5_patch.env``).
    """
    from .patching import imports as hooks

    hooks.enable()
    return status()


def disable() -> Status:
    """Put every original object of every host back, and arm nothing until ``enable()``."""
    from .patching import imports as hooks

    hooks.disable()
    return status()


def status() -> Status:
    """What became of each patch in this process, and why."""
    from .patching.ledger import LEDGER

    return LEDGER.status()


def require(*ids: str) -> Status:
    """Import the hosts that are installed and insist that they are patched.

    Args:
        ids: patches to insist on; all of them by default.

    Raises:
        GLM5PatchError: a patch that this host needs is not in place; the message names the
            patch, its seam and the cause. An uninstalled host is no error, unless none is there.
        ValueError: an id that no patch has.
    """
    from .patching import imports as hooks

    hooks.require(ids)
    return status()
