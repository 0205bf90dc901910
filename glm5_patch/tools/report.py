"""What people look at: tables and progress, in colour on a terminal, plain where piped.

``rich`` draws on a terminal where it is installed; it is no dependency of the plugin.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

_COLOURS = {
    "applied": "green",
    "ok": "green",
    "not_needed": "cyan",
    "armed": "yellow",
    "disabled": "yellow",
    "failed": "red",
    "PROBLEM": "red",
    "FAILED": "red",
}


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows under their columns on stdout; piped, without the heads, for ``grep`` and ``awk``."""
    console = _console(sys.stdout)
    if console is None:
        widths = [max(len(row[i]) for row in rows) for i in range(len(columns) - 1)]
        for row in rows:
            print("  ".join([*map(str.ljust, row, widths), row[-1]]).rstrip())
        return
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style=_COLOURS.get(cell, "")) for cell in row))
    console.print(table)


@contextmanager
def progress(what: str, total: int, every: int = 1) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal, else a line each ``every`` steps, on stderr.

    Yields what is to be called after each step, with a note of it.
    """
    console = _console(sys.stderr)
    done = 0
    if console is None:

        def advance(note: str) -> None:
            nonlocal done
            done += 1
            if done % every == 0 or done == total:
                print(f"{what}: {done} of {total}, {note}", file=sys.stderr, flush=True)

        yield advance
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with Progress(TextColumn(what), *columns, TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task(what, total=total, note="")
        yield lambda note: bar.update(task, advance=1, note=note)


def _console(stream: TextIO):
    """rich's console for a terminal; None where plain text is to be written."""
    if not stream.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(file=stream, highlight=False)
