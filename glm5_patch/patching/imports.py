"""Arming: each patch runs when its host module has finished importing, whatever the order."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from ..env import DISABLE, ENABLED, Switches, logger
from ..errors import GLM5PatchError
from .ledger import LEDGER, Entry, State
from .patch import Patch

_armed_modules: set[str] = set()
_switches: Switches | None = None


def enable() -> None:
    """Arm all patches of the table; those of imported modules are applied at once."""
    from ..patches import MODULES

    global _switches
    _switches = Switches.read()
    _switches.apply_log_level()
    LEDGER.when_asked(_fill_ledger)
    if not _switches.enabled:
        return
    for name in MODULES:
        _arm(name)
    # Last: where it raises, everything is armed all the same.
    if _switches.disabled_ids:
        _report_unknown_ids(_switches)


def _fill_ledger() -> None:
    """What the switches say of each patch, where nothing has happened to it yet."""
    from ..patches import PATCHES

    for patch in PATCHES:
        if not _switches.enabled:
            LEDGER.set(patch, State.DISABLED, f"{ENABLED}=0")
        elif patch.id in _switches.disabled_ids:
            LEDGER.set(patch, State.DISABLED, f"named in {DISABLE}")
        elif patch.id not in LEDGER or LEDGER[patch.id].state is State.DISABLED:
            LEDGER.set(patch, State.ARMED, f"waits for {patch.module}")


def disable() -> None:
    """Undo everything, in reverse. Import hooks stay registered and find nothing to do."""
    for entry in reversed(list(LEDGER)):
        if entry.seams is not None:
            entry.seams.undo()
        LEDGER.set(entry.patch, State.DISABLED, "disable() was called")


def require(ids: Iterable[str] = ()) -> None:
    """See ``glm5_patch.require``."""
    from ..patches import PATCHES

    by_id = {patch.id: patch for patch in PATCHES}
    unknown = set(ids) - by_id.keys()
    if unknown:
        raise ValueError(f"no patch is called {sorted(unknown)}; there are {list(by_id)}")
    enable()
    wanted = [by_id[i] for i in ids] or [
        patch for patch in PATCHES if not patch.on_request or patch.module in sys.modules
    ]
    present = [patch for patch in wanted if import_host(patch.module)]
    if not present:
        raise GLM5PatchError(
            "no host of glm5-patch is installed here: install megatron-core or transformers"
        )
    _refuse_half_a_host(wanted, present)
    raise_unless_in_place(present)


def raise_unless_in_place(patches: Iterable[Patch], config: Any = None) -> None:
    """Raise GLM5PatchError for the first patch that its imported host needs and does not have.

    Args:
        patches: which ones to look at.
        config: if given, only patches that guard this configuration count.
    """
    for patch in patches:
        if config is not None and not patch.guards(config):
            continue
        cause = why_not_in_place(patch)
        if cause:
            raise GLM5PatchError(
                f"patch {patch.id!r} is not in place on {patch.seam}: {cause}. "
                f"Without it: {patch.why} Run `glm5-patch doctor` for the whole picture."
            )


def why_not_in_place(patch: Patch) -> str | None:
    """What is wrong with a patch that its imported host needs; None if nothing is."""
    module = sys.modules.get(patch.module)
    if module is None or _half_imported(module) or patch.id not in LEDGER:
        return None  # a host that is not imported builds nothing
    entry = LEDGER[patch.id]
    if entry.state is State.APPLIED:
        lost = entry.seams.lost()
        return lost and f"{lost} was replaced after patching (a reload?); call glm5_patch.enable()"
    if entry.state is State.DISABLED:
        finding = patch.needed(module)
        return f"{entry.reason}, but needed: {finding.reason}" if finding.needed else None
    if entry.state is State.FAILED:
        return entry.reason
    return None


def _report_unknown_ids(switches: Switches) -> None:
    from ..patches import PATCHES

    known = {patch.id for patch in PATCHES}
    unknown = sorted(switches.disabled_ids - known)
    if unknown:
        message = f"{DISABLE} names unknown patches {unknown}; there are {sorted(known)}"
        if switches.strict:
            raise ValueError(message)
        warnings.warn(f"glm5-patch: {message}", RuntimeWarning, stacklevel=3)


def is_there(name: str) -> bool:
    """Whether a module could be imported, found without importing the packages that it is in."""
    from pathlib import Path  # here: `import torch` need not pay for it

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


def _refuse_half_a_host(wanted: list[Patch], present: list[Patch]) -> None:
    """A host that has some of the modules and not all is older than what it would have to be."""
    hosts = {patch.host for patch in present}
    for patch in wanted:
        if patch not in present and patch.host in hosts:
            raise GLM5PatchError(
                f"the host installed here has no module {patch.module}, so it can't build a GLM-5 "
                f"model: use megatron-core 0.16.0 or later"
            )


def _arm(name: str) -> None:
    module = sys.modules.get(name)
    if module is not None and not _half_imported(module):
        _run_patches(name, late=True)
        return
    if name in _armed_modules:
        return
    _armed_modules.add(name)
    if module is not None:
        # A naive hook would fire at once, on a half-executed module.
        _when_finished(module, lambda: _finished_importing(name, module))
    else:
        _register(name)


def _register(name: str) -> None:
    import wrapt  # 3 ms that only a process with torch pays

    wrapt.register_post_import_hook(lambda _: _run_patches(name, late=False), name)


def _finished_importing(name: str, module: ModuleType) -> None:
    if sys.modules.get(name) is module:
        _run_patches(name, late=True)  # the modules that were importing it may hold aliases
    else:
        _register(name)  # that import failed; the next one may not


def _half_imported(module: ModuleType) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


def _when_finished(module: ModuleType, callback: Callable[[], None]) -> None:
    """Call back when importlib is done with a module that is executing now.

    importlib ends every import, good or bad, by setting ``spec._initializing = False`` (3.10 to
    3.13). A property of a swapped class sees that, and is the only thing that does.
    """
    spec = module.__spec__
    plain = type(spec)

    class WatchedSpec(plain):
        @property
        def _initializing(self):
            return self.__dict__["_initializing"]

        @_initializing.setter
        def _initializing(self, value):
            self.__dict__["_initializing"] = value
            if not value:
                self.__class__ = plain
                callback()

    spec.__class__ = WatchedSpec


def _run_patches(name: str, *, late: bool) -> None:
    """Apply every armed patch of one imported module, and again what a reload has undone."""
    module = sys.modules[name]
    for entry in list(LEDGER):
        if entry.patch.module != name:
            continue
        lost = entry.state is State.APPLIED and entry.seams.lost()
        if lost:
            entry.seams.undo()
        if entry.state is State.ARMED or lost:
            _run(entry, module, late)


def _run(entry: Entry, module: ModuleType, late: bool) -> None:
    from .seams import Seams  # here: `import torch` need not pay for it

    patch = entry.patch
    seams = Seams(late=late)
    try:
        finding = patch.needed(module)
        if not finding.needed:
            LEDGER.set(patch, State.NOT_NEEDED, finding.reason)
        else:
            patch.apply(module, seams)
            LEDGER.set(patch, State.APPLIED, finding.reason, late=late, seams=seams)
    except Exception as error:
        seams.undo()
        cause = f"{type(error).__name__}: {error}"
        LEDGER.set(patch, State.FAILED, cause, late=late)
        message = f"glm5-patch: {patch.id} failed on {patch.seam}: {cause}"
        if _switches is not None and _switches.strict:
            raise GLM5PatchError(message) from error
        warnings.warn(
            f"{message}. The host is as it was; building a GLM-5 model will raise.",
            RuntimeWarning,
            stacklevel=2,
        )
    logger.debug("%s: %s (%s)", patch.id, LEDGER[patch.id].state.value, LEDGER[patch.id].reason)
