"""Packages that a client imports and no model is made of, where they are not installed."""

from __future__ import annotations

import importlib.machinery
import sys
from contextlib import contextmanager
from unittest.mock import MagicMock


@contextmanager
def made_up(*names: str):
    """Inside, modules of these packages can be imported; what is installed is taken."""
    finder = _MadeUp(names)
    sys.meta_path.append(finder)  # the last
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _MadeUp:
    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self._names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return MagicMock(__spec__=spec, __path__=[], __name__=spec.name, __version__="99")

    def exec_module(self, module):
        pass
