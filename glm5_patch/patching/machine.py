"""What runs the patches: it arms them, applies them, undoes them, and knows what became of each."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

from ..env import DISABLE, ENABLED, Switches, logger, problems
from ..errors import GLM5PatchError
from .imports import half_imported, import_host, inside_an_import, when_imported
from .ledger import Record, Row, State, Status
from .patch import Patch


class Machine:
    """Keeps the hosts as ``enable()`` or ``disable()`` last asked, from whatever thread.

    A host module is *settled* by one thread at a time: its patches are run, or undone, until the
    module is as it was last asked for. ``_settle`` is the one place that does it. A record of what
    a patch changed is written after its last change and goes only with the undoing of it; what a
    patch without a record is (armed, disabled) follows from the switches.

    The lock guards this object's own fields and is held for a few statements, never while a patch
    runs or something is imported: Python's import locks would be taken in another order by another
    thread. A thread that finds a module in the hands of another waits for it, unless it holds an
    import lock or settles a module itself, which the other may need; it then leaves word, and the
    other looks again.

    Args:
        modules: the host modules that patches change.
        load: gives the patches, in the order in which those of one module are applied. It is
            called when such a module has been imported, or somebody asks about patches.
    """

    def __init__(self, modules: Iterable[str], load: Callable[[], Iterable[Patch]]):
        self.modules = tuple(modules)
        self._load = load
        self._patches: tuple[Patch, ...] | None = None
        self._wanted: Switches | None = None
        self._why_off = "never enabled in this process (torch not imported, or GLM5_PATCH=0)"
        self._records: dict[str, Record] = {}
        self._reported: set[str] = set()
        self._after_fork()
        os.register_at_fork(after_in_child=self._after_fork)

    def _after_fork(self) -> None:
        """The threads that held these stayed in the parent."""
        self._lock = threading.RLock()
        self._free = threading.Condition(self._lock)
        self._settling: dict[str, int] = {}  # module -> thread
        self._again: dict[str, bool] = {}  # module -> whether to wrap again what was replaced
        self._watched: set[str] = getattr(self, "_watched", set())

    @property
    def patches(self) -> tuple[Patch, ...]:
        if self._patches is None:
            self._patches = tuple(self._load())
        return self._patches

    def enable(self) -> None:
        """See ``glm5_patch.enable``."""
        switches = Switches.read()
        with self._lock:
            self._wanted = switches
            switches.apply_log_level()
        self._settle_all(self.modules, rewrap=True)
        # Last: where it raises, everything is armed all the same.
        if switches.enabled:
            self._report(switches)

    def disable(self) -> None:
        """See ``glm5_patch.disable``. Import hooks stay registered and find nothing to do."""
        with self._lock:
            self._wanted, self._why_off = None, "disable() was called"
        self._settle_all(reversed(self.modules))

    def status(self) -> Status:
        """See ``glm5_patch.status``."""
        self._settle_all(self.modules)
        return Status(tuple(self._row(patch) for patch in self.patches), tuple(self.problems()))

    def row(self, patch_id: str) -> Row:
        """The line of one patch.

        Raises:
            KeyError: no patch has this id.
        """
        patch = self._by_id()[patch_id]
        self._settle(patch.module)
        return self._row(patch)

    def problems(self) -> list[str]:
        """What is wrong with the environment variables; see ``env.problems``."""
        ids = self._by_id() if os.environ.get(DISABLE) else None
        return problems(ids)

    def require(self, ids: Iterable[str] = ()) -> None:
        """See ``glm5_patch.require``."""
        by_id = self._by_id()
        unknown = set(ids) - by_id.keys()
        if unknown:
            raise ValueError(f"no patch is called {sorted(unknown)}; there are {list(by_id)}")
        self.enable()
        wrong = self.problems()
        if wrong:
            raise GLM5PatchError("; ".join(wrong))
        wanted = [by_id[i] for i in ids] or [
            patch for patch in self.patches if not patch.on_request or patch.module in sys.modules
        ]
        present = [patch for patch in wanted if import_host(patch.module)]
        if not present:
            raise GLM5PatchError(
                "no host of glm5-patch is installed here: install megatron-core or transformers"
            )
        _refuse_half_a_host([p for p in wanted if not p.may_be_absent], present)
        self.raise_unless_in_place(present)

    def raise_unless_in_place(
        self, patches: Iterable[Patch] | None = None, config: Any = None
    ) -> None:
        """Raise GLM5PatchError for the first patch that its imported host needs and does not have.

        Args:
            patches: which ones to look at; by default all.
            config: if given, only patches that guard this configuration count.
        """
        for patch in self.patches if patches is None else patches:
            if config is not None and not patch.guards(config):
                continue
            cause = self.why_not_in_place(patch)
            if cause:
                raise GLM5PatchError(
                    f"patch {patch.id!r} is not in place on {patch.seam}: {cause}. "
                    f"Without it: {patch.why} Run `glm5-patch doctor` for the whole picture."
                )

    def why_not_in_place(self, patch: Patch) -> str | None:
        """What is wrong with a patch that its imported host needs; None if nothing is."""
        module = sys.modules.get(patch.module)
        if module is None or half_imported(module):
            return None  # a host that is not imported builds nothing
        self._settle(patch.module)
        row = self._row(patch)
        if row.state is State.ARMED:
            return "another thread is applying it now"
        if row.state is State.FAILED:
            return row.reason
        if row.state is State.DISABLED:
            finding = patch.needed(module)
            return f"{row.reason}, but needed: {finding.reason}" if finding.needed else None
        return None

    def missed_aliases(self, patch: Patch) -> Iterator[tuple[str, str]]:
        """Modules, and their names, that hold a function of the host which the patch replaced."""
        record = self._records.get(patch.id)
        return iter(()) if record is None else record.seams.missed_aliases()

    def _by_id(self) -> dict[str, Patch]:
        return {patch.id: patch for patch in self.patches}

    def _row(self, patch: Patch) -> Row:
        with self._lock:
            record, wanted = self._records.get(patch.id), self._wanted
        if record is not None:
            state, reason = self._found(patch, record)
            return Row(patch.id, patch.seam, state, reason, record.late)
        if wanted is None:
            state, reason = State.DISABLED, self._why_off
        elif not wanted.enabled:
            state, reason = State.DISABLED, f"{ENABLED}=0"
        elif patch.id in wanted.disabled_ids:
            state, reason = State.DISABLED, f"named in {DISABLE}"
        else:
            state, reason = State.ARMED, f"waits for {patch.module}"
        return Row(patch.id, patch.seam, state, reason, False)

    def _found(self, patch: Patch, record: Record) -> tuple[State, str]:
        """What a record says, or what became of the seam since."""
        lost = record.seams.lost()
        if lost is None:
            return record.state, record.reason
        module = sys.modules.get(patch.module)
        finding = module and patch.still_right(module)
        if finding and not finding.needed:
            return State.NOT_NEEDED, f"{lost} was replaced after patching: {finding.reason}"
        if finding is None and record.seams.is_called():
            return record.state, f"{record.reason}; {lost} was wrapped since"
        reason = f" ({finding.reason})" if finding else ""
        return State.FAILED, (
            f"{lost} was replaced after patching{reason}; call glm5_patch.enable() to wrap what is "
            "there now"
        )

    def _settle_all(self, names: Iterable[str], *, rewrap: bool = False) -> None:
        first: Exception | None = None
        for name in names:
            try:
                self._settle(name, rewrap=rewrap)
            except Exception as error:  # GLM5_PATCH_STRICT; the others are armed all the same
                first = first or error
        if first is not None:
            raise first

    def _settle(self, name: str, *, executed: bool = False, rewrap: bool = False) -> None:
        """Make one host module what was last asked for, and wait until it is so where that can't
        block for ever.

        Args:
            executed: its import has just ended, though importlib does not say so yet.
            rewrap: wrap again what somebody replaced after patching.
        """
        me = threading.get_ident()
        with self._lock:
            thread = self._settling.get(name)
            if thread == me:
                return  # a patch asks for it; the loop below looks again
            if thread is not None:
                self._again[name] = rewrap or self._again.get(name, False)
                if me not in self._settling.values() and not inside_an_import():
                    self._free.wait_for(lambda: name not in self._settling)
                return
            if not rewrap and self._is_settled(name, executed):
                return
            self._settling[name] = me
            wanted = self._wanted
        failure: Exception | None = None
        settled = False
        try:
            while not settled:
                try:
                    self._make(name, wanted, executed, rewrap)
                except Exception as error:
                    failure = failure or error
                with self._lock:
                    rewrap = self._again.pop(name, None)
                    settled = rewrap is None and self._wanted == wanted
                    wanted = self._wanted
                    if settled:
                        self._let_go(name)
        finally:
            if not settled:
                self._let_go(name)
        if failure is not None:
            raise failure

    def _let_go(self, name: str) -> None:
        with self._lock:
            self._again.pop(name, None)
            del self._settling[name]
            self._free.notify_all()

    def _is_settled(self, name: str, executed: bool) -> bool:
        """Whether there is nothing to do, so that asking about a module takes it from nobody."""
        module = self._module(name, executed)
        wanted = self._wanted
        if wanted is None or not wanted.enabled:
            return not self._records
        if module is None:
            return not self._records and name in self._watched
        return self._patches is not None and all(
            (patch.id in wanted.disabled_ids) == (record is None)
            and (record is None or record.execution is _execution(module))
            for patch, record in self._records_of(name)
        )

    def _records_of(self, name: str) -> list[tuple[Patch, Record | None]]:
        return [(p, self._records.get(p.id)) for p in self.patches if p.module == name]

    def _module(self, name: str, executed: bool) -> ModuleType | None:
        module = sys.modules.get(name)
        return module if module is not None and (executed or not half_imported(module)) else None

    def _make(self, name: str, wanted: Switches | None, executed: bool, rewrap: bool) -> None:
        on = wanted is not None and wanted.enabled
        module = self._module(name, executed)
        if on and module is None:
            self._watch(name)
        if not on or module is None:
            for patch, record in reversed(self._records_of(name) if self._records else ()):
                if record is not None:
                    self._undo(patch, record)
            return
        failure: Exception | None = None
        for patch, record in self._records_of(name):
            try:
                self._fit(patch, record, module, wanted, late=not executed, rewrap=rewrap)
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def _watch(self, name: str) -> None:
        with self._lock:
            if name in self._watched:
                return
            self._watched.add(name)

        def finished() -> None:
            try:
                # A module that is gone failed to import; its next import may not.
                self._settle(name, executed=name in sys.modules)
            except Exception:
                sys.modules.pop(name, None)  # as Python does where an import raises
                raise

        when_imported(name, finished)

    def _fit(self, patch, record, module, wanted: Switches, *, late: bool, rewrap: bool) -> None:
        """Run one patch on its imported module, unless that is done already or is not wanted."""
        from .seams import Seams  # here: `import torch` need not pay for it

        if patch.id in wanted.disabled_ids:
            if record is not None:
                self._undo(patch, record)
            return
        outlived = None
        if record is not None and record.execution is not _execution(module):
            outlived = record.seams.outlive()
            self._forget(patch)
        elif record is not None:
            state, reason = self._found(patch, record)
            if not rewrap or state is not State.FAILED or record.state is State.FAILED:
                return
            warnings.warn(f"glm5-patch: {patch.id}: {reason}", RuntimeWarning, stacklevel=2)
            self._undo(patch, record)
        self._run(patch, module, Seams(late=late, outlived=outlived), wanted.strict, late)

    def _run(self, patch: Patch, module: ModuleType, seams, strict: bool, late: bool) -> None:
        try:
            finding = patch.needed(module)
            if finding.needed:
                patch.apply(module, seams)
        except BaseException as error:
            seams.undo()
            if not isinstance(error, Exception):
                raise
            cause = f"{type(error).__name__}: {error}"
            self._keep(patch, State.FAILED, cause, late, module, seams)
            message = f"glm5-patch: {patch.id} failed on {patch.seam}: {cause}"
            if strict:
                raise GLM5PatchError(message) from error
            warnings.warn(
                f"{message}. The host is as it was; building a GLM-5 model will raise.",
                RuntimeWarning,
                stacklevel=2,
            )
        else:
            state = State.APPLIED if finding.needed else State.NOT_NEEDED
            self._keep(patch, state, finding.reason, late, module, seams)

    def _keep(self, patch, state: State, reason: str, late: bool, module, seams) -> None:
        with self._lock:
            self._records[patch.id] = Record(state, reason, late, _execution(module), seams)
        logger.debug("%s: %s (%s)", patch.id, state.value, reason)

    def _undo(self, patch: Patch, record: Record) -> None:
        record.seams.undo()
        self._forget(patch)

    def _forget(self, patch: Patch) -> None:
        with self._lock:
            del self._records[patch.id]

    def _report(self, switches: Switches) -> None:
        """Say once what is wrong with the switches.

        Raises:
            ValueError: under ``GLM5_PATCH_STRICT``.
        """
        found = self.problems()
        if found and switches.strict:
            raise ValueError("; ".join(found))
        with self._lock:
            new = [problem for problem in found if problem not in self._reported]
            self._reported.update(new)
        for problem in new:
            warnings.warn(f"glm5-patch: {problem}", RuntimeWarning, stacklevel=3)


def _execution(module: ModuleType) -> object:
    """Tells one execution of a module's code from the next: a reload makes a new spec."""
    return getattr(module, "__spec__", None) or module


def _refuse_half_a_host(wanted: list[Patch], present: list[Patch]) -> None:
    """A host that has some of the modules and not all is older than what it would have to be."""
    hosts = {patch.host for patch in present}
    for patch in wanted:
        if patch not in present and patch.host in hosts:
            raise GLM5PatchError(
                f"the host installed here has no module {patch.module}, so it can't build a GLM-5 "
                f"model: use megatron-core 0.16.0 or later"
            )
