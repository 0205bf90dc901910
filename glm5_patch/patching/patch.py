"""What a patch is: data first, then a probe and the change itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

if TYPE_CHECKING:
    from .seams import Seams


class Finding(NamedTuple):
    """A probe's answer: whether the host lacks the thing, and what was seen."""

    needed: bool
    reason: str


def argument(wrapped: Callable, args: tuple, kwargs: dict, name: str) -> Any:
    """An argument of a wrapped call, however the caller passed it, or its default."""
    call = inspect.signature(wrapped).bind(*args, **kwargs)
    call.apply_defaults()
    return call.arguments[name]


def with_argument(
    wrapped: Callable, args: tuple, kwargs: dict, name: str, value: Any
) -> tuple[tuple, dict]:
    """The arguments of a wrapped call with another value of one, however the caller passed it."""
    call = inspect.signature(wrapped).bind(*args, **kwargs)
    call.arguments[name] = value
    return call.args, call.kwargs


class Patch:
    """One change to one seam of one host.

    The class attributes are the record that people read; ``needed`` looks at the host's shape and
    never at its version; ``apply`` makes the change through ``seams``, which knows how to undo it.
    """

    id: ClassVar[str]
    module: ClassVar[str]
    """The host module whose import triggers the patch."""
    attribute: ClassVar[str]
    """The attribute of that module which is changed; dots reach into classes."""
    why: ClassVar[str]
    """One line: what goes wrong without it."""
    upstream: ClassVar[str]
    """Where the host mends, or could mend, this itself."""
    remove_when: ClassVar[str]
    """The condition under which this file can be deleted."""
    on_request: ClassVar[bool] = False
    """``require`` imports its module only where the patch is named: the host takes long to
    import."""
    may_be_absent: ClassVar[bool] = False
    """Some supported releases have no such module, and need no patch of it."""

    @property
    def host(self) -> str:
        """The package that is patched: "megatron.core", "megatron.bridge" or "transformers"."""
        parts = self.module.split(".")
        return ".".join(parts[: 2 if parts[0] == "megatron" else 1])

    @property
    def distribution(self) -> str:
        """What pip calls the host."""
        return self.host.replace(".", "-")

    @property
    def seam(self) -> str:
        return f"{self.module}:{self.attribute}"

    def needed(self, module: ModuleType) -> Finding:
        """Probe the imported host module. An exception counts as a failed patch."""
        raise NotImplementedError

    def apply(self, module: ModuleType, seams: Seams) -> None:
        """Make the change. Whatever was done before an exception is undone by the caller."""
        raise NotImplementedError

    def still_right(self, module: ModuleType) -> Finding | None:
        """Probe the host module again after somebody replaced what this patch had changed.

        By default ``needed`` is asked again; what it wants changed tells nothing then, since it
        may want that of every host.

        Returns:
            ``Finding(False, reason)`` if what is there now does this patch's job: then it counts as
            not needed, and nobody replaces it. ``Finding(True, reason)`` if it does not, None if
            that can't be told: then what is there counts if it holds this patch's wrapper. What
            does not count refuses a GLM-5 model, and ``enable()`` wraps it.
        """
        try:
            finding = self.needed(module)
        except Exception:
            return None
        return None if finding.needed else finding

    def guards(self, config: Any) -> bool:
        """Whether a model of this configuration is wrong without the patch."""
        return True
