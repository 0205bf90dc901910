"""The one place that remembers, for this process, what became of each patch."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .patch import Patch
    from .seams import Seams


class State(str, enum.Enum):
    """What became of a patch."""

    ARMED = "armed"
    """Waits for its host module to be imported."""
    APPLIED = "applied"
    """In place; written after its last change succeeded."""
    NOT_NEEDED = "not_needed"
    """The host does it right; nothing of it was touched."""
    DISABLED = "disabled"
    """Switched off by the environment or by ``disable()``."""
    FAILED = "failed"
    """Could not be probed or applied; what it had changed was undone."""


class Entry(NamedTuple):
    """One patch in this process."""

    patch: Patch
    state: State
    reason: str
    late: bool = False
    """The host module was imported before the patch was applied."""
    seams: Seams | None = None
    """What it changed, if it is applied."""


class Row(NamedTuple):
    """One line of a status."""

    id: str
    seam: str
    state: State
    reason: str
    late: bool

    def cells(self) -> tuple[str, str, str]:
        """What people are shown of it."""
        return self.id, self.state.value, f"{self.reason}{' (late)' if self.late else ''}"


class Status:
    """A snapshot of the ledger. Truthy when at least one patch is armed, applied or not needed
    and none has failed."""

    def __init__(self, rows: tuple[Row, ...]):
        self.rows = rows

    def __getitem__(self, patch_id: str) -> Row:
        for row in self.rows:
            if row.id == patch_id:
                return row
        raise KeyError(patch_id)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __bool__(self) -> bool:
        states = {row.state for row in self.rows}
        live = {State.ARMED, State.APPLIED, State.NOT_NEEDED}
        return State.FAILED not in states and bool(states & live)

    def __str__(self) -> str:
        width = max((len(row.id) for row in self.rows), default=0)
        rows = (row.cells() for row in self.rows)
        return "\n".join(f"{name:{width}}  {state:10}  {reason}" for name, state, reason in rows)


class Ledger:
    """Patch id -> Entry, in the order of the table of patches."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._fill: Callable[[], None] | None = None

    def when_asked(self, fill: Callable[[], None]) -> None:
        """Have ``fill`` set the entries when somebody looks at them, and not before."""
        self._fill = fill

    def _asked(self) -> dict[str, Entry]:
        if self._fill is not None:
            fill, self._fill = self._fill, None
            fill()
        return self._entries

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._asked().values())

    def __contains__(self, patch_id: str) -> bool:
        return patch_id in self._asked()

    def __getitem__(self, patch_id: str) -> Entry:
        return self._asked()[patch_id]

    def set(self, patch: Patch, state: State, reason: str, **details) -> Entry:
        entry = self._asked()[patch.id] = Entry(patch, state, reason, **details)
        return entry

    def status(self) -> Status:
        if not self._asked():
            from ..patches import PATCHES

            never = "never enabled in this process (torch not imported, or GLM5_PATCH=0)"
            return Status(tuple(Row(p.id, p.seam, State.DISABLED, never, False) for p in PATCHES))
        return Status(
            tuple(
                Row(e.patch.id, e.patch.seam, e.state, e.reason, e.late)
                for e in self._entries.values()
            )
        )


LEDGER = Ledger()
