"""The function that stands in a host's place: it survives pickle, copy and inspection; and what a
callable wraps or can call."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

Around = Callable[[Callable[..., Any], Any, tuple, dict], Any]

MISSING = object()
_DEEPEST = 100
"""Wrappers around each other, before it is taken for a circle."""


class Wrapping:
    """What one wrapper does. ``around`` is None once it is undone: then it only calls on."""

    def __init__(self, around: Around):
        self.around: Around | None = around
        self.over: Any = MISSING
        """The attribute, as it stands in its owner, whose place the wrapper took."""


WRAPPINGS: weakref.WeakKeyDictionary[Callable, Wrapping] = weakref.WeakKeyDictionary()
"""Every wrapper that is alive, undone or not."""


def host_wrapper(original: Callable, around: Around, *, method: bool = False) -> Callable:
    """A stand-in for ``original`` that calls ``around(wrapped, instance, args, kwargs)``.

    It is a plain function on purpose. A proxy object (``wrapt.FunctionWrapper``) only looks like
    one: pickle and deepcopy need special methods on it, Megatron-Bridge's YAML picks a
    representer by ``type(value)`` and would write this package's name into a user's file, and
    torch.compile looks through it and runs the original. A function that carries the host's
    ``__module__`` and ``__qualname__`` is pickled by that name, copied as itself, and unwraps
    with ``inspect.unwrap`` to the identical original.

    Somebody may keep it for ever (an alias in a class, a wrapper of theirs around it), so once
    ``Seams.undo`` has run it does what ``original`` does.

    Args:
        original: the host's function.
        around: receives the original, the instance (None for a function), and the arguments.
        method: the first positional argument is the instance, or the class of a class method.
    """
    wrapping = Wrapping(around)

    if method:

        @functools.wraps(original)
        def call(self, *args, **kwargs):
            around, wrapped = wrapping.around, original.__get__(self, type(self))
            if around is None:
                return wrapped(*args, **kwargs)
            return around(wrapped, self, args, kwargs)

    else:

        @functools.wraps(original)
        def call(*args, **kwargs):
            around = wrapping.around
            if around is None:
                return original(*args, **kwargs)
            return around(original, None, args, kwargs)

    WRAPPINGS[call] = wrapping
    return call


def is_undone(value: Any) -> bool:
    # A proxy of wrapt's equals what it wraps, also as a key.
    wrapping = WRAPPINGS.get(value) if type(value) is FunctionType else None
    return wrapping is not None and wrapping.around is None


def is_live(value: Any) -> bool:
    return not is_undone(value)


def without_undone(attribute: Any) -> Any:
    """The attribute itself, or what an undone wrapper of ours took the place of."""
    while True:
        inner = getattr(attribute, "__func__", getattr(attribute, "fget", attribute))
        if not is_undone(inner):
            return attribute
        attribute = WRAPPINGS[inner].over


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
            value = getattr(value, "__wrapped__", MISSING)
        if value is MISSING:
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
