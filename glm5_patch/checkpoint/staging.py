"""An output directory that is written under a hidden name and renamed when it is complete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..config.json_file import unreadable
from ..errors import CheckpointError


def free_directory(output: str | Path, needed: int = 0, source: Path | None = None) -> Path:
    """Where something may be written, as an absolute path.

    Args:
        output: a directory that does not exist, or is empty.
        needed: bytes that will be written.
        source: the checkpoint that it is made of. The output must not lie in it.

    Raises:
        CheckpointError: something is there, nothing can be written there, or the disk is too small.
    """
    output = _absolute(output)
    try:
        if output.is_symlink():
            raise CheckpointError(f"{output}: a link; give the directory itself")
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise CheckpointError(f"{output}: exists and is not an empty directory")
        place = next(path for path in (output, *output.parents) if os.path.lexists(path))
        if not place.is_dir():
            raise CheckpointError(f"{output}: {place} is not a directory")
        if source is not None and output.resolve().is_relative_to(source.resolve()):
            raise CheckpointError(f"{output}: lies in {source}, which is read; give another place")
        read_only = os.statvfs(place).f_flag & os.ST_RDONLY
        parent = output.parent if output.parent.exists() else place
        if read_only or not os.access(parent, os.W_OK | os.X_OK):
            raise CheckpointError(f"{output}: {parent} is read-only for this user")
        free = shutil.disk_usage(place).free
    except OSError as error:
        raise CheckpointError(f"{output}: can't be written: {error.strerror}") from None
    if needed > free:
        raise CheckpointError(
            f"{output}: {_size(needed)} are to be written, but {place} has {_size(free)}; free "
            "some, or give another place"
        )
    return output


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def _absolute(output: str | Path) -> Path:
    output = Path(os.path.abspath(output))
    if not output.name or "\0" in str(output):
        raise CheckpointError(f"{output}: no name of a directory that can be made")
    return output


def fingerprint(paths: Collection[Path]) -> dict[str, list[int]]:
    """Size and times of files, to detect a changed source.

    A copy may keep the time of modification; it can't keep that of the last change of status.
    """
    statuses = {str(path): path.stat() for path in paths}
    return {
        path: [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        for path, status in statuses.items()
    }


class StagedFiles:
    """The files of an output under its hidden name. Several processes may write there at once."""

    def __init__(self, output: str | Path):
        self.output = _absolute(output)
        self.partial = self.output.with_name(f".{self.output.name}.partial")

    def has(self, name: str) -> bool:
        """Whether a file has been written completely."""
        return (self.partial / name).exists()

    @contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """A path to write to. The file gets its name at the end, when it is on the disk."""
        target = self.partial / name
        unfinished = target.with_name(f".{target.name}.unfinished")
        with _named_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                unfinished.unlink()
            yield unfinished
            _flush(unfinished)
            unfinished.rename(target)

    def copy(self, path: Path, name: str) -> None:
        """Copy a file of the source, with its times and mode."""
        with self.file(name) as target:
            try:
                path.open("rb").close()
            except OSError as error:
                raise unreadable(path, error) from None
            shutil.copy2(path, target)


class Staging(StagedFiles):
    """An output from its first file to ``publish``.

    A note beside the hidden directory says what is being written, so that the same call continues
    after an interruption and another one does not. Nothing but the output's own files ever lies in
    the directory.
    """

    def __init__(
        self,
        output: str | Path,
        manifest: dict[str, Any],
        needed: int = 0,
        source: Path | None = None,
        anew: bool = False,
    ):
        """Make the hidden directory, or find the one that an interrupted run left.

        Args:
            output: a directory that does not exist, or is empty.
            manifest: what the output is made of and how; JSON. ``files`` of it is the
                ``fingerprint`` of the source.
            needed: bytes that will be written in all.
            source: the checkpoint that it is made of.
            anew: what an interrupted run of the same kind left is removed and not continued.

        Raises:
            CheckpointError: see ``free_directory``; or another run's files are in the way.
        """
        super().__init__(output)
        self._manifest = manifest
        self._note = self.output.with_name(f".{self.output.name}.partial.json")
        noted = self._noted()
        same = noted.get("manifest") == manifest
        # Interrupted between getting the name and removing the note.
        published = (
            same
            and "output" in noted
            and not self.partial.exists()
            and noted["output"] == self._of_output()
        )
        self.complete = published and not anew
        """Whether the output is there, written by a run of the same kind."""
        if self.complete:
            self._note.unlink()
            return
        with _named_errors(self.output):
            if published:
                self.output.rename(self.partial)
            if self.partial.is_dir() and anew and same:
                shutil.rmtree(self.partial)
            if os.path.lexists(self.partial) and not same:
                raise CheckpointError(
                    f"{self.partial}: left by another conversion, or the source has changed since; "
                    "remove it and try again"
                )
            there = sum(p.stat().st_size for p in self.partial.rglob("*") if p.is_file())
            free_directory(self.output, max(0, needed - there), source)
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self._write_note({})
            self.partial.mkdir(exist_ok=True)

    def publish(self, names: Collection[str]) -> None:
        """Give the output its name. Only ``names`` of the hidden directory are kept.

        Raises:
            CheckpointError: a file of the source has changed since the manifest was made.
        """
        for path, noted in self._manifest.get("files", {}).items():
            if not os.path.exists(path) or fingerprint([Path(path)])[path] != noted:
                raise CheckpointError(
                    f"{path}: changed while it was read; remove {self.partial} and try again"
                )
        with _named_errors(self.output):
            for path in sorted(self.partial.rglob("*"), reverse=True):
                if not path.is_dir() and str(path.relative_to(self.partial)) not in names:
                    path.unlink()
            for path in (self.partial, *(p for p in self.partial.rglob("*") if p.is_dir())):
                _flush(path)
            self._write_note({"output": _contents(self.partial)})
            self.partial.rename(self.output)
            _flush(self.output.parent)
            self._note.unlink()

    def discard(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self.partial, ignore_errors=True)
        self._note.unlink(missing_ok=True)

    def _noted(self) -> dict[str, Any]:
        try:
            noted = json.loads(self._note.read_text())
        except (OSError, ValueError):
            return {}
        return noted if isinstance(noted, dict) else {}

    def _write_note(self, more: dict[str, Any]) -> None:
        unfinished = self._note.with_suffix(".unfinished")
        unfinished.write_text(json.dumps({"manifest": self._manifest, **more}))
        _flush(unfinished)
        unfinished.rename(self._note)

    def _of_output(self) -> dict[str, list[int]] | None:
        try:
            return _contents(self.output)
        except OSError:
            return None


class Ranks:
    """The ranks that save together: the world, or this process without torch.distributed.

    Each step raises CheckpointError on every rank if it failed on one.
    """

    def __init__(self) -> None:
        import torch  # other outputs are begun without it

        self._distributed = torch.distributed
        several = self._distributed.is_available() and self._distributed.is_initialized()
        self.size = self._distributed.get_world_size() if several else 1
        self.rank = self._distributed.get_rank() if several else 0

    def together(self, action: Callable[[], Any]) -> Any:
        """Do it on every rank; what it returned on this one."""
        found, failed = _attempt(action)
        self._agree(None, failed)
        return found

    def first(self, action: Callable[[], Any]) -> Any:
        """Do it on rank 0; what it returned there, and None on the others."""
        return self.together(action if self.rank == 0 else lambda: None)

    def shared(self, action: Callable[[], Any]) -> list[Any]:
        """Do it on every rank; what it returned on each."""
        return self._agree(*_attempt(action))

    def _agree(self, found: Any, failed: Exception | None) -> list[Any]:
        everyone: list[Any] = [(found, failed and f"{type(failed).__name__}: {failed}")]
        if self.size > 1:
            (mine,), everyone = everyone, [None] * self.size
            self._distributed.all_gather_object(everyone, mine)
        if failed:
            raise failed
        for rank, (_, says) in enumerate(everyone):
            if says:
                raise CheckpointError(f"not saved: rank {rank}: {says}")
        return [found for found, _ in everyone]


def _attempt(action: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        return None, error


def _contents(directory: Path) -> dict[str, list[int]]:
    """``fingerprint`` of every file in a directory, by its path in it."""
    files = [path for path in directory.rglob("*") if not path.is_dir()]
    return {str(Path(p).relative_to(directory)): entry for p, entry in fingerprint(files).items()}


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
            f"{path}: not written: {error.strerror or error}; once that is resolved, the same "
            "command finishes the output"
        ) from None
