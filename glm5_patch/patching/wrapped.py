"""What a callable wraps, and what it can call."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import FunctionType
from typing import Any

_MISSING = object()
_DEEPEST = 100
"""Wrappers around each other, before it is taken for a circle."""


def beneath(value: Any) -> Iterator[Any]:
    """``value``, and whatever it wraps, from the outside in: ``functools.wraps``, wrapt, partials,
    and the descriptors of a class."""
    for _ in range(_DEEPEST):
        yield value
        if isinstance(value, property):
            value = value.fget
        elif isinstance(value, (functools.partial, functools.cached_property)):
            value = value.func
        else:
            value = getattr(value, "__wrapped__", _MISSING)
        if value is _MISSING:
            return


def callable_from(value: Any, owner: Any) -> Iterator[Any]:
    """Everything that the code of a function can call by what it holds or names.

    A wrapper without ``functools.wraps`` keeps the original in its closure, a default, a partial,
    a global of its module or an attribute of the class. What it holds is searched in the same
    way; what it only names is not, since that leads through the whole program.

    Args:
        owner: the module or class that has ``value``.
    """
    waiting, seen = [value], 0
    while waiting and seen < _DEEPEST:
        seen += 1
        for part in beneath(waiting.pop()):
            yield part
            if isinstance(part, functools.partial):
                waiting += [*part.args, *part.keywords.values()]
            function = getattr(part, "__func__", part)
            if not isinstance(function, FunctionType):
                continue
            waiting += _held(function)
            for name in function.__code__.co_names:
                for holder in (function.__globals__, vars(owner)):
                    yield from beneath(holder.get(name))


def _held(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            held = cell.cell_contents
        except ValueError:
            continue  # not filled yet
        if callable(held):
            yield held
    for held in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
        if callable(held):
            yield held
