"""The only place that looks at a host to learn what it can do. Shapes, never versions."""

from __future__ import annotations

import inspect
from typing import Any


def names_read_by(function: Any) -> tuple[str, ...]:
    """The attributes and globals that a function's own code mentions."""
    return inspect.unwrap(function).__code__.co_names
