"""Python's imports as the machine sees them: what is loaded, what is half-way, and when it ends."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType


def is_there(name: str) -> bool:
    """Whether the file of a module inside a package exists, found without importing anything."""
    top, *inner, last = name.split(".")
    spec = importlib.util.find_spec(top)
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    for part in inner:
        folders = [folder / part for folder in folders if (folder / part).is_dir()]
        # The first with an __init__.py is the package; without one, all are parts of it.
        whole = [folder for folder in folders if (folder / "__init__.py").is_file()]
        folders = whole[:1] or folders
    return any((folder / last).is_dir() or (folder / f"{last}.py").is_file() for folder in folders)


def import_host(name: str) -> bool:
    """Import a host module if its distribution is there; a broken host raises its own error."""
    try:
        if importlib.util.find_spec(name) is None:
            return False
    except ModuleNotFoundError:
        return False
    importlib.import_module(name)
    return True


def half_imported(module: ModuleType) -> bool:
    """Whether some thread still executes the module."""
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


def inside_an_import() -> bool:
    """Whether this thread executes a module, and so holds one of Python's import locks."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def when_imported(name: str, finished: Callable[[], None]) -> None:
    """Call ``finished`` at the end of every import of a module, also of one that runs now.

    It is called by the thread that imports, which holds the import lock of the module: no other
    thread sees the module before ``finished`` returns. It is also called where the import fails:
    look in ``sys.modules``. A reload is not an import.
    """
    _FINDER.waiting[name] = finished
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    module = sys.modules.get(name)
    if module is not None and half_imported(module):
        _watch(module.__spec__, finished)


class _Finder:
    """Finds nothing by itself: it watches what the finders after it find.

    ``wrapt.register_post_import_hook`` can't do this. Its finder imports the parent of a module
    while Python (up to 3.11) holds its global import lock, and a thread that executes the parent
    waits for that lock. Its hooks run before the import has ended, in wrapt 1.14 under a lock of
    wrapt's, and once for each name.
    """

    def __init__(self) -> None:
        self.waiting: dict[str, Callable[[], None]] = {}

    def find_spec(self, name: str, path=None, target=None):
        finished = self.waiting.get(name)
        if finished is None or target is not None:
            return None
        finders = list(sys.meta_path)
        for finder in finders[finders.index(self) + 1 :] if self in finders else ():
            find_spec = getattr(finder, "find_spec", None)
            spec = find_spec and find_spec(name, path, target)
            if spec is not None:
                _watch(spec, finished)
                return spec
        return None


_FINDER = _Finder()


def _watch(spec, finished: Callable[[], None]) -> None:
    """Call back when importlib is done with a module.

    importlib ends every import, good or bad, by setting ``spec._initializing = False`` (3.10 to
    3.14). A property of a swapped class sees that, and nothing else does.
    """
    plain = type(spec)
    if hasattr(plain, "_initializing"):
        return  # watched already
    once = threading.Lock()

    def call_back() -> None:
        if once.acquire(blocking=False):
            finished()

    class WatchedSpec(plain):
        @property
        def _initializing(self):
            return vars(self).get("_initializing", False)

        @_initializing.setter
        def _initializing(self, value):
            if value:
                vars(self)["_initializing"] = value
                return
            self.__class__ = plain
            try:
                call_back()
            finally:
                # Last: threads that import the module wait for its lock until this is false.
                self._initializing = value

    executing = vars(spec).get("_initializing", False)
    spec.__class__ = WatchedSpec
    if executing and not vars(spec).get("_initializing"):
        call_back()  # another thread ended the import just before the swap
