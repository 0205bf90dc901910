"""Replacing attributes of a host so that nobody can tell, and putting them back."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import Any

from .imports import half_imported
from .wrapper import (
    MISSING,
    WRAPPINGS,
    Around,
    beneath,
    callable_from,
    host_wrapper,
    is_live,
    is_undone,
    without_undone,
)


class _Change:
    """One attribute, or one key of a dictionary, that was given another value."""

    def __init__(self, owner: Any, name: Any, value: Any, original: Any, wrapper: Callable | None):
        self.owner, self.name, self.value, self.original = owner, name, value, original
        self.wrapper = wrapper

    def held(self) -> Any:
        items = self.owner if isinstance(self.owner, dict) else vars(self.owner)
        return items.get(self.name, MISSING)

    def is_in_place(self) -> bool:
        """Also where somebody put a wrapper of theirs around it."""
        held = self.held()
        if held is self.value:
            return True
        return self.wrapper is not None and any(part is self.wrapper for part in beneath(held))

    def is_called(self) -> bool:
        """Whether it is in place, or whatever replaced it holds or names the wrapper."""
        if self.is_in_place():
            return True
        return self.wrapper is not None and any(
            part is self.wrapper for part in callable_from(self.held(), self.owner)
        )

    def undo(self) -> None:
        if self.wrapper is not None:
            WRAPPINGS[self.wrapper].around = None
        if self.held() is not self.value:
            return  # reloaded, or replaced or wrapped by somebody else: theirs stays
        original = without_undone(self.original)
        if original is MISSING:
            if isinstance(self.owner, dict):
                del self.owner[self.name]
            else:
                delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, original)


class Seams:
    """The attributes that one patch replaced, in order, with what they held before."""

    def __init__(self, *, late: bool = False, outlived: Seams | None = None):
        """
        Args:
            late: the target was imported before, so others anywhere may hold aliases of it.
            outlived: what the patch changed in an earlier execution of the module.
        """
        self._late = late
        self._changes: list[_Change] = []
        self._outlived = outlived

    def wrap(self, owner: Any, name: str, around: Around, *, reads: tuple[str, ...] = ()) -> None:
        """Wrap a function, or a method, class method, static method or property of a class.

        What it is stays what it is, and modules that hold the same function by another name get
        the wrapper as well. An undone wrapper of ours that somebody wrapped is used again.

        Args:
            owner: the module or class that has it.
            name: what it is called there.
            around: see ``host_wrapper``.
            reads: the parameters that ``around`` looks at.

        Raises:
            AttributeError: the host calls it otherwise now.
            TypeError: a parameter of ``reads`` is gone; better now than in the user's call.
        """
        held = _own(owner, name)
        function, rebuild, method = _taken_apart(owner, name, held)
        _insist_on_parameters(function, name, reads)
        undone = next((part for part in beneath(function) if is_undone(part)), None)
        if undone is not None:
            wrapping = WRAPPINGS[undone]
            original = wrapping.over if undone is function else held
            self._changes.append(_Change(owner, name, held, original, undone))
            wrapping.around, wrapper = around, undone
        else:
            wrapper = host_wrapper(function, around, method=method)
            WRAPPINGS[wrapper].over = held
            self._set(owner, name, rebuild(wrapper), held, wrapper)
        others = _modules() if self._late else _modules_near(owner)
        _rebind(wrapper.__wrapped__, wrapper, others)

    def wrap_call(self, owner: type, around: Around) -> None:
        """Wrap ``owner.__call__``, also where the class only inherits it.

        Then it gets one of its own for as long as the seam is there. Its bases keep theirs, and
        what a base's is at the time of a call counts.
        """
        if "__call__" in vars(owner):
            self.wrap(owner, "__call__", around)
            return

        def __call__(self, *args, **kwargs):
            return around(super(owner, self).__call__, self, args, kwargs)

        __call__.__module__ = owner.__module__
        __call__.__qualname__ = f"{owner.__qualname__}.__call__"
        self.add(owner, "__call__", __call__)

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Put ``value`` in the place of an existing attribute of ``owner`` itself."""
        self._set(owner, name, value, _own(owner, name))

    def add(self, owner: Any, name: str, value: Any) -> None:
        """Give ``owner`` an attribute that it does not have of its own."""
        if name in vars(owner):
            raise AttributeError(f"{owner!r} already has {name!r}")
        inner = getattr(value, "__func__", value)
        ours = type(inner) is FunctionType and inner in WRAPPINGS
        self._set(owner, name, value, MISSING, inner if ours else None)

    def add_item(self, mapping: dict, key: Any, value: Any) -> None:
        """Give a mapping of the host a key that it lacks."""
        if key in mapping:
            raise KeyError(f"{key!r} is already there")
        mapping[key] = value
        self._changes.append(_Change(mapping, key, value, MISSING, None))

    def lost(self) -> str | None:
        """The first attribute that no longer leads to what was put there, or None."""
        for change in list(self._changes):
            if not change.is_in_place():
                return change.name
        return None

    def is_called(self) -> bool:
        """Whether every attribute that was replaced since leads on to the wrapper it held."""
        return all(change.is_called() for change in list(self._changes))

    def missed_aliases(self) -> Iterator[tuple[str, str]]:
        """Modules, and their names, that still hold a function which was replaced elsewhere."""
        for change in list(self._changes):
            if change.wrapper is None or change.original is MISSING:
                continue
            for module, alias in _names_of(change.wrapper.__wrapped__, _modules()):
                if (module, alias) != (change.owner, change.name):
                    yield module.__name__, alias

    def undo(self) -> None:
        """Put the identical originals back, last change first, in aliases as well.

        Where somebody else has replaced or wrapped the attribute since, theirs stays, and a
        wrapper of ours beneath it does what the original does.
        """
        while self._changes:
            change = self._changes.pop()
            change.undo()
            if change.wrapper is not None:
                _rebind(change.wrapper, inspect.unwrap(change.wrapper, stop=is_live), _modules())
        if self._outlived is not None:
            self._outlived.undo()

    def outlive(self) -> Seams:
        """Undo what a new execution of the module would find, and keep the rest.

        A reload leaves old classes and functions behind that others hold. They stay patched until
        the ``Seams`` that is returned is undone.
        """
        kept = Seams(outlived=self._outlived)
        again = Seams()
        for change in self._changes:
            shared = isinstance(change.owner, ModuleType) and _is_loaded(change.owner)
            (again if shared and change.is_in_place() else kept)._changes.append(change)
        again.undo()
        return kept

    def _set(self, owner, name: str, value, original, wrapper: Callable | None = None) -> None:
        setattr(owner, name, value)
        self._changes.append(_Change(owner, name, value, original, wrapper))


def _taken_apart(owner: Any, name: str, held: Any) -> tuple[Callable, Callable, bool]:
    """The function of an attribute, how to make such an attribute of another, and whether its
    first argument is an instance or a class."""
    if isinstance(held, staticmethod):
        return held.__func__, staticmethod, False
    if isinstance(held, classmethod):
        return held.__func__, classmethod, True
    if isinstance(held, property):
        kind, doc = type(held), held.__doc__
        return held.fget, lambda get: kind(get, held.fset, held.fdel, doc), True
    if isinstance(held, functools.cached_property):

        def rebuild(function: Callable) -> functools.cached_property:
            rebuilt = type(held)(function)
            rebuilt.__set_name__(owner, name)
            return rebuilt

        return held.func, rebuild, True
    if isinstance(owner, type) and not hasattr(held, "__get__"):
        return held, staticmethod, False  # Python passes no instance to such a callable
    return held, lambda function: function, isinstance(owner, type)


def _modules() -> list[ModuleType]:
    return [module for module in list(sys.modules.values()) if hasattr(module, "__dict__")]


def _modules_near(owner: Any) -> list[ModuleType]:
    """Those that may hold an alias of what a module defines that has only just been executed: its
    own package's, and all that are being executed."""
    name = owner.__name__ if isinstance(owner, ModuleType) else owner.__module__
    top = name.partition(".")[0]
    return [
        module
        for key, module in list(sys.modules.items())
        if (key.partition(".")[0] == top or half_imported(module)) and hasattr(module, "__dict__")
    ]


def _is_loaded(module: ModuleType) -> bool:
    return sys.modules.get(module.__name__) is module


def _names_of(value: Any, modules: list[ModuleType]) -> list[tuple[ModuleType, str]]:
    """The names that modules have for this very object."""
    return [
        (module, name)
        for module in modules
        # vars() and not getattr(): lazy modules import on attribute access. A copy: other threads
        # import meanwhile.
        for name, held in vars(module).copy().items()
        if held is value
    ]


def _rebind(old: Any, new: Any, modules: list[ModuleType]) -> None:
    """Put ``new`` where modules hold this very object, as ``from x import f`` leaves it."""
    for module, name in _names_of(old, modules):
        setattr(module, name, new)


def _insist_on_parameters(function: Any, name: str, reads: tuple[str, ...]) -> None:
    if not reads:
        return
    parameters = inspect.signature(function).parameters
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
