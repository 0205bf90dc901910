"""Giving a host's dataclass fields that it does not have, so that they are real ones."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Iterable, Iterator
from types import MappingProxyType
from typing import Any

from .seams import Seams


def extend_dataclass(
    cls: type,
    fields: list[dataclasses.Field],
    seams: Seams,
    *,
    instead: Iterable[dataclasses.Field] = (),
) -> None:
    """Add keyword fields with plain defaults to a dataclass and to all its subclasses.

    The constructor takes them and sets them before ``__post_init__`` runs; ``fields``,
    ``replace``, ``asdict``, ``inspect.signature`` and ``typing.get_type_hints`` see them; a
    dataclass derived later inherits them like any other field.

    Args:
        fields: their types must be types, not strings; they must be keyword-only, or the
            positional arguments of a class derived later would change places.
        instead: descriptions that take the place of fields which are there, with the same name,
            type and default.
    """
    for field in fields:
        seams.add(cls, field.name, field.default)
        seams.add_item(cls.__annotations__, field.name, field.type)
    replacements = {field.name: field for field in instead}
    for owner in _with_subclasses(cls):
        own = vars(owner).get("__dataclass_fields__")
        if not own:
            continue
        # A dataclass derived while these fields were there before has made them its own.
        missing = [field for field in fields if field.name not in own]
        described = {
            name: new for name, new in replacements.items() if own[name].default == new.default
        }
        added = {field.name: field for field in missing}
        seams.replace(owner, "__dataclass_fields__", {**own, **described, **added})
        # Only a generated constructor sets fields; one written by hand calls one that does.
        if missing and owner.__dataclass_params__.init:
            seams.replace(owner, "__init__", _accepting(vars(owner)["__init__"], missing))


def described_anew(field: dataclasses.Field, **metadata: Any) -> dataclasses.Field:
    """A copy of a field with more metadata."""
    described = copy.copy(field)
    described.metadata = MappingProxyType({**field.metadata, **metadata})
    return described


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
