"""Every exception that glm5-patch raises on its own account.

Each is also the builtin that a caller would think of catching.
"""

from __future__ import annotations


class GLM5PatchError(RuntimeError):
    """A GLM-5 model can't be built or run correctly here. The message says what to change."""


class ScheduleError(GLM5PatchError, ValueError):
    """An index schedule is invalid. The message names the field, its value and the fix."""


class PipelineSplitError(GLM5PatchError, ValueError):
    """The first layers of a pipeline stage need a top-k from another stage."""


class MissingTopkError(GLM5PatchError, LookupError):
    """A skip layer found no top-k of its source layer."""


class CheckpointError(GLM5PatchError, ValueError):
    """A checkpoint is missing, damaged or of another model. The message names file and cause."""

    def __init__(self, message: str):
        # File and tensor names may hold newlines and control characters; the message is one line.
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))
