"""Replacing attributes of a host so that nobody can tell, and putting them back."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

Around = Callable[[Callable[..., Any], Any, tuple, dict], Any]

_MISSING = object()


def host_wrapper(original: Callable, around: Around, *, method: bool = False) -> Callable:
    """A stand-in for ``original`` that calls ``around(wrapped, instance, args, kwargs)``.

    It is a plain function on purpose. A proxy object (``wrapt.FunctionWrapper``) only looks like
    one: pickle and deepcopy need special methods on it, Megatron-Bridge's YAML picks a
    representer by ``type(value)`` and would write this package's name into a user's file, and
    torch.compile looks through it and runs the original. A function that carries the host's
    ``__module__`` and ``__qualname__`` is pickled by that name, copied as itself, and unwraps
    with ``inspect.unwrap`` to the identical original.

    Args:
        original: the host's function.
        around: receives the original, the instance (None for a function), and the arguments.
        method: the first positional argument is the instance.
    """

    if method:

        @functools.wraps(original)
        def call(self, *args, **kwargs):
            return around(functools.partial(original, self), self, args, kwargs)

    else:

        @functools.wraps(original)
        def call(*args, **kwargs):
            return around(original, None, args, kwargs)

    return call


def aliases(original: Any) -> Iterator[tuple[Any, str]]:
    """Every ``(module, name)`` that holds this very object, as ``from x import f`` leaves it."""
    for module in list(sys.modules.values()):
        # vars() and not getattr(): lazy modules import on attribute access.
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is original:
                yield module, name


class Seams:
    """The attributes that one patch replaced, in order, with what they held before."""

    def __init__(self, *, late: bool = False):
        """``late``: the target was imported before, so others may hold aliases to rebind."""
        self._late = late
        self._changes: list[tuple[Any, str, Any, Any]] = []

    def wrap(self, owner: Any, name: str, around: Around, *, reads: tuple[str, ...] = ()) -> None:
        """Wrap a function, or a method if ``owner`` is a class.

        Args:
            owner: the module or class that has it.
            name: what it is called there.
            around: see ``host_wrapper``.
            reads: the parameters that ``around`` looks at.

        Raises:
            AttributeError: the host calls it otherwise now.
            TypeError: a parameter of ``reads`` is gone; better now than in the user's call.
        """
        original = _own(owner, name)
        _insist_on_parameters(original, name, reads)
        if isinstance(original, staticmethod):
            self._set(owner, name, staticmethod(host_wrapper(original.__func__, around)), original)
            return
        wrapper = host_wrapper(original, around, method=isinstance(owner, type))
        if self._late:
            for module, alias in aliases(original):
                if (module, alias) != (owner, name):
                    self._set(module, alias, wrapper, original)
        self._set(owner, name, wrapper, original)

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Put ``value`` in the place of an existing attribute of ``owner`` itself."""
        self._set(owner, name, value, _own(owner, name))

    def add(self, owner: Any, name: str, value: Any) -> None:
        """Give ``owner`` an attribute that it does not have of its own."""
        if name in vars(owner):
            raise AttributeError(f"{owner!r} already has {name!r}")
        self._set(owner, name, value, _MISSING)

    def add_item(self, mapping: dict, key: Any, value: Any) -> None:
        """Give a mapping of the host a key that it lacks."""
        if key in mapping:
            raise KeyError(f"{key!r} is already there")
        mapping[key] = value
        self._changes.append((mapping, key, value, _MISSING))

    def lost(self) -> str | None:
        """The first replacement that is no longer in place (the host was reloaded), or None."""
        for owner, name, value, _ in self._changes:
            held = owner.get(name) if isinstance(owner, dict) else vars(owner).get(name)
            if held is not value:
                return name
            if isinstance(owner, type) and _superseded(owner):
                return f"{owner.__qualname__}.{name}"
        return None

    def missed_aliases(self) -> Iterator[tuple[str, str]]:
        """Modules, and their names, that still hold a function which was replaced elsewhere."""
        for owner, name, _, original in self._changes:
            if isinstance(owner, dict) or original is _MISSING:
                continue
            for module, alias in aliases(original):
                if inspect.isroutine(original) and (module, alias) != (owner, name):
                    yield module.__name__, alias

    def undo(self) -> None:
        """Put the identical originals back, last change first."""
        while self._changes:
            owner, name, value, original = self._changes.pop()
            if isinstance(owner, dict):
                owner.pop(name, None)
            elif vars(owner).get(name) is not value:
                continue  # reloaded, or replaced again by someone else: theirs stays
            elif original is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, original)

    def _set(self, owner: Any, name: str, value: Any, original: Any) -> None:
        setattr(owner, name, value)
        self._changes.append((owner, name, value, original))


def _superseded(cls: type) -> bool:
    """Whether the module of a class now has another class by its name, as after a reload."""
    found = sys.modules.get(cls.__module__)
    for part in cls.__qualname__.split("."):
        found = getattr(found, "__dict__", {}).get(part)
    return isinstance(found, type) and found is not cls


def _insist_on_parameters(original: Any, name: str, reads: tuple[str, ...]) -> None:
    parameters = inspect.signature(getattr(original, "__func__", original)).parameters
    for parameter in reads:
        if parameter not in parameters:
            raise TypeError(f"{name}({', '.join(parameters)}) has no parameter {parameter!r}")


def _own(owner: Any, name: str) -> Any:
    # vars() keeps a staticmethod what it is; an inherited method must not be copied down.
    try:
        return vars(owner)[name]
    except KeyError:
        label = getattr(owner, "__qualname__", None) or getattr(owner, "__name__", repr(owner))
        raise AttributeError(f"{label} has no attribute {name!r} of its own") from None
