"""Read a small JSON file that may hold anything."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

_MAX_BYTES = 512 << 20
"""The index of a checkpoint with a million tensors has 100 MB."""

LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        CheckpointError: it is absent, no regular file, unreadable, a Git LFS pointer or no JSON.
    """
    content = _content(path)
    try:
        return json.loads(content)
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    except RecursionError:
        raise CheckpointError(f"{path}: not valid JSON: nested too deeply") from None


def regular_size(path: Path) -> int:
    """Bytes of a regular file, or of what a link leads to.

    Nothing is opened: opening a FIFO waits for somebody to write into it.

    Raises:
        CheckpointError: it is absent, unreachable, a directory, FIFO, socket or device.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        lost = ": it is a link to a file that is not there" if os.path.islink(path) else ""
        raise CheckpointError(f"{path}: no such file{lost}") from None
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
    if not stat.S_ISREG(status.st_mode):
        kinds = {
            stat.S_IFDIR: "a directory",
            stat.S_IFIFO: "a FIFO",
            stat.S_IFSOCK: "a socket",
        }
        kind = kinds.get(stat.S_IFMT(status.st_mode), "a device")
        raise CheckpointError(f"{path}: {kind}, not a file")
    return status.st_size


def unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path}: can't be read: {getattr(error, 'strerror', None) or error}")


def lfs_pointer(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` in its repository"
    )


def _content(path: Path) -> bytes:
    size = regular_size(path)
    if size > _MAX_BYTES:
        raise CheckpointError(f"{path}: {size} bytes are too many for a JSON file")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from None
    if content.startswith(LFS_POINTER):
        raise lfs_pointer(path)
    return content
