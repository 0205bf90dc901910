"""What became of each patch: the records that the machine keeps and the snapshot people read."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from .seams import Seams


class State(str, enum.Enum):
    """What became of a patch."""

    ARMED = "armed"
    """Waits for its host module to be imported."""
    APPLIED = "applied"
    """In place; written after its last change succeeded."""
    NOT_NEEDED = "not_needed"
    """The host, or what somebody put in the seam, does it right."""
    DISABLED = "disabled"
    """Switched off by the environment or by ``disable()``."""
    FAILED = "failed"
    """Could not be probed or applied, and was undone; or somebody replaced what it changed."""


class Record(NamedTuple):
    """A patch that was run on its imported host module, and what came of that."""

    state: State
    reason: str
    late: bool
    """The host module was imported before the patch ran."""
    execution: Any
    """Tells one execution of the module from the next; see ``machine``."""
    seams: Seams
    """What it changed."""


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
    """A snapshot of all patches.

    Truthy when at least one patch is armed, applied or not needed, none has failed and no switch
    is wrong.

    Attributes:
        rows: one for each patch, in the order of the table.
        problems: the errors in the environment variables, one sentence each.
    """

    def __init__(self, rows: tuple[Row, ...], problems: tuple[str, ...] = ()):
        self.rows = rows
        self.problems = problems

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
        return not self.problems and State.FAILED not in states and bool(states & live)

    def __str__(self) -> str:
        width = max((len(row.id) for row in self.rows), default=0)
        rows = (row.cells() for row in self.rows)
        lines = [f"{name:{width}}  {state:10}  {reason}" for name, state, reason in rows]
        return "\n".join([*lines, *self.problems])
