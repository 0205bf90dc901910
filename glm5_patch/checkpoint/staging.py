"""An output directory that is written under a hidden name and renamed when it is complete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import CheckpointError


def free_directory(output: str | Path, needed: int = 0) -> Path:
    """Where something may be written, as an absolute path.

    Args:
        output: a directory that does not exist, or is empty.
        needed: bytes that will be written.

    Raises:
        CheckpointError: something is there, nothing can be written there, or the disk is too small.
    """
    output = Path(output).absolute()
    if output.is_symlink():
        raise CheckpointError(f"{output}: a link; give the directory itself")
    try:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise CheckpointError(f"{output}: exists and is not an empty directory")
        place = next(path for path in (output, *output.parents) if os.path.lexists(path))
        if not place.is_dir():
            raise CheckpointError(f"{output}: {place} is not a directory")
        read_only = os.statvfs(place).f_flag & os.ST_RDONLY
        parent = output.parent if output.parent.exists() else place
        if read_only or not os.access(parent, os.W_OK | os.X_OK):
            raise CheckpointError(f"{output}: {parent} is read-only for this user")
        free = shutil.disk_usage(place).free
    except OSError as error:
        raise CheckpointError(f"{output}: can't be written: {error.strerror}") from None
    if needed > free:
        raise CheckpointError(
            f"{output}: {needed / 1e9:.1f} GB are to be written, but {place} has "
            f"{free / 1e9:.1f} GB"
        )
    return output


def fingerprint(paths: Collection[Path]) -> dict[str, list[int]]:
    """Size and time of files, to detect a changed source."""
    statuses = {str(path): path.stat() for path in paths}
    return {path: [status.st_size, status.st_mtime_ns] for path, status in statuses.items()}


class Staging:
    """The files of an output, in a hidden directory beside it until ``publish``.

    A note beside both says what is being written, so that the same call continues after an
    interruption and another one does not. Nothing but the output's own files ever lies in it.
    """

    def __init__(
        self, output: str | Path, manifest: dict[str, Any], needed: int = 0, anew: bool = False
    ):
        """Make the hidden directory, or find the one that an interrupted run left.

        Args:
            output: a directory that does not exist, or is empty.
            manifest: what the output is made of and how; JSON.
            needed: bytes that will be written in all.
            anew: what an interrupted run of the same kind left is removed and not continued.

        Raises:
            CheckpointError: see ``free_directory``; or another run's files are in the way.
        """
        self.output = Path(output).absolute()
        self.partial = self.output.with_name(f".{self.output.name}.partial")
        self._note = self.output.with_name(f".{self.output.name}.partial.json")
        noted = self._noted()
        # Interrupted between getting the name and removing the note.
        self.complete = (
            not anew
            and noted == manifest
            and not self.partial.exists()
            and self.output.is_dir()
            and any(self.output.iterdir())
        )
        """Whether the output is there, written by a run of the same kind."""
        if self.complete:
            self._note.unlink()
            return
        with _named_errors(self.output):
            if self.partial.is_dir() and anew and noted == manifest:
                shutil.rmtree(self.partial)
            if os.path.lexists(self.partial) and noted != manifest:
                raise CheckpointError(
                    f"{self.partial}: left by another conversion, or the source has changed since; "
                    "remove it and try again"
                )
            there = sum(p.stat().st_size for p in self.partial.rglob("*") if p.is_file())
            free_directory(self.output, max(0, needed - there))
            self.output.parent.mkdir(parents=True, exist_ok=True)
            unfinished = self._note.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(manifest))
            _flush(unfinished)
            unfinished.rename(self._note)
            self.partial.mkdir(exist_ok=True)

    def has(self, name: str) -> bool:
        """Whether a file has been written completely."""
        return (self.partial / name).exists()

    @contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """A path to write to. The file gets its name at the end, when it is on the disk."""
        unfinished = self.partial / ".unfinished"
        with _named_errors(self.partial / name):
            with suppress(FileNotFoundError):
                unfinished.unlink()
            yield unfinished
            _flush(unfinished)
            (self.partial / name).parent.mkdir(parents=True, exist_ok=True)
            unfinished.rename(self.partial / name)

    def copy(self, path: Path, name: str) -> None:
        with self.file(name) as target:
            shutil.copy2(path, target)

    def publish(self, names: Collection[str]) -> None:
        """Give the output its name. Only ``names`` of the hidden directory are kept."""
        with _named_errors(self.output):
            for path in sorted(self.partial.rglob("*"), reverse=True):
                if not path.is_dir() and str(path.relative_to(self.partial)) not in names:
                    path.unlink()
            for path in (self.partial, *(p for p in self.partial.rglob("*") if p.is_dir())):
                _flush(path)
            self.partial.rename(self.output)
            _flush(self.output.parent)
            self._note.unlink()

    def discard(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self.partial, ignore_errors=True)
        self._note.unlink(missing_ok=True)

    def _noted(self) -> Any:
        try:
            return json.loads(self._note.read_text())
        except (OSError, ValueError):
            return None


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path}: not written: {error.strerror or error}; the same command continues where it "
            "stopped"
        ) from None
