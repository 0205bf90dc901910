"""The only place that looks at a host to learn what it can do. Shapes, never versions."""

from __future__ import annotations

import inspect
from typing import Any


def names_read_by(function: Any) -> tuple[str, ...]:
    """The attributes and globals that a function's own code mentions."""
    return inspect.unwrap(function).__code__.co_names


def strings_in(function: Any) -> tuple[str, ...]:
    """The literal strings of a function's own code, without those of functions inside it."""
    constants = inspect.unwrap(function).__code__.co_consts
    return tuple(value for value in constants if isinstance(value, str))
