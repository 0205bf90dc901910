"""What ``record_topk`` and ``replay_topk`` ask of the forwards that run inside them."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .record import TopkRecorder
    from .replay import ForwardReplay, Replay

recorder: ContextVar[TopkRecorder | None] = ContextVar("glm5_patch_recorder", default=None)
replay: ContextVar[Replay | None] = ContextVar("glm5_patch_replay", default=None)


def current_recorder() -> TopkRecorder | None:
    """Return the recorder of the ``record_topk`` block that is running, if one is."""
    return recorder.get()


def begin_replay() -> ForwardReplay | None:
    """Begin a forward of the ``replay_topk`` block that is running, if one is."""
    found = replay.get()
    return None if found is None else found.begin()


def replay_is_asked_for() -> bool:
    """Whether a ``replay_topk`` block is running."""
    return replay.get() is not None
