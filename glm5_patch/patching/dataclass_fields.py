"""Giving a host's dataclass fields that it does not have, so that they are real ones."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Iterator

from .seams import Seams


def extend_dataclass(cls: type, fields: list[dataclasses.Field], seams: Seams) -> None:
    """Add keyword fields with plain defaults to a dataclass and to all its subclasses.

    The constructor takes them and sets them before ``__post_init__`` runs; ``fields``,
    ``replace``, ``asdict`` and ``inspect.signature`` see them; a dataclass derived later inherits
    them like any other field.
    """
    for field in fields:
        seams.add(cls, field.name, field.default)
    for owner in _with_subclasses(cls):
        own = vars(owner).get("__dataclass_fields__", {})
        # A dataclass derived while these fields were there before has made them its own.
        missing = [field for field in fields if own and field.name not in own]
        for field in missing:
            seams.add_item(own, field.name, field)
        if missing and "__init__" in vars(owner):
            seams.replace(owner, "__init__", _accepting(vars(owner)["__init__"], missing))


def _with_subclasses(cls: type) -> Iterator[type]:
    yield cls
    for subclass in cls.__subclasses__():
        yield from _with_subclasses(subclass)


def _accepting(init, fields: list[dataclasses.Field]):
    @functools.wraps(init)
    def __init__(self, *args, **kwargs):
        for field in fields:
            setattr(self, field.name, kwargs.pop(field.name, field.default))
        init(self, *args, **kwargs)

    signature = inspect.signature(init)
    extra = [
        inspect.Parameter(
            f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type
        )
        for f in fields
    ]
    __init__.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *extra])
    return __init__
