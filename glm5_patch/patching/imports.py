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
    """Whether the file of a module exists, found without importing anything."""
    top, *parts = name.split(".")
    spec = importlib.util.find_spec(top)
    for folder in (spec and spec.submodule_search_locations) or ():
        target = Path(folder, *parts)
        if target.is_dir() or target.with_suffix(".py").is_file():
            return True
    return False


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


def when_imported(name: str, finished: Callable[[ModuleType], None]) -> None:
    """Call ``finished`` once, at the end of the import of a module that is not loaded yet.

    It is called by the thread that imports, which holds the import lock of the module: no other
    thread sees the module before ``finished`` returns. It is also called where the import fails,
    which only a module that executes now can do: look in ``sys.modules`` again.
    """

    def executed(module: ModuleType) -> None:
        _at_the_end(module, lambda: finished(module))

    module = sys.modules.get(name)
    if module is not None:
        executed(module)  # a hook of wrapt would fire now, on a half-executed module
        return
    import wrapt  # 3 ms that only a process with torch pays

    try:
        wrapt.register_post_import_hook(executed, name)
    except KeyError:
        # wrapt 1.14 waits once for each name. The machine looks again when somebody asks.
        pass


def _at_the_end(module: ModuleType, callback: Callable[[], None]) -> None:
    """Call back when importlib is done with a module.

    importlib ends every import, good or bad, by setting ``spec._initializing = False`` (3.10 to
    3.14). A property of a swapped class sees that. A hook of wrapt comes earlier, and up to wrapt
    1.14 under a lock of wrapt's, in which a patch that imports would wait for ever for a thread
    that waits for that lock.
    """
    once = threading.Lock()

    def call_back() -> None:
        if once.acquire(blocking=False):
            callback()

    spec = module.__spec__
    if not half_imported(module):
        call_back()
        return
    plain = type(spec)

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

    spec.__class__ = WatchedSpec
    if not vars(spec).get("_initializing"):
        spec.__class__ = plain
        call_back()  # another thread ended the import just before the swap
