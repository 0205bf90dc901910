"""What a command prints: tables, progress and lines, for a terminal of 80 columns or for a pipe.

On a terminal ``rich`` colours tables and draws bars if it is installed. It is not a dependency:
without it, or with ``NO_COLOR`` set, the same words are printed plainly.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TextIO

from ..env import logger

_COLOURS = {
    "applied": "green",
    "ok": "green",
    "not_needed": "cyan",
    "armed": "yellow",
    "disabled": "yellow",
    "allowed": "yellow",
    "failed": "red",
    "PROBLEM": "red",
    "FAILED": "red",
}
_HOSTS = ("megatron", "torch.utils.cpp_extension")
"""Loggers of hosts."""
_NARROWEST = 8
"""The least width of a folded column."""


class Result(NamedTuple):
    """What a command found."""

    code: int
    """The exit code: 0 all is well, 1 a check failed."""
    data: Any
    """What ``--json`` prints."""
    show: Callable[[], None]
    """Prints it for people."""


def say(line: str) -> None:
    """Print a line of progress on stderr, unbuffered; folded on a terminal, whole in a log."""
    print(_folded(line) if sys.stderr.isatty() else line, file=sys.stderr, flush=True)


@contextmanager
def notes_said() -> Iterator[None]:
    """Say what the package logs, at INFO and above, unless ``GLM5_PATCH_LOG`` asks for a log.

    Warnings that the hosts log (no CUDA runtime, a deprecated GPTModel) are left out: they are not
    about what the command checks.
    """
    found = {one: (one.level, one.propagate) for one in (logger, *map(logging.getLogger, _HOSTS))}
    handler = _Saying()
    if not logger.handlers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False  # a host's handler would write it again
    for name in _HOSTS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        for one, (level, propagates) in found.items():
            one.setLevel(level)
            one.propagate = propagates


class _Saying(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


def print_text(text: str, indent: str = "") -> None:
    """A line on stdout, folded at words; continued lines are indented by two more spaces."""
    print(_folded(text, indent))


def _folded(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text,
        _width(),
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def print_flags(flags: Mapping[str, Any]) -> None:
    """Flags of a command line on stdout, to be copied: never folded. True is a switch's."""
    lines = []
    for name, value in flags.items():
        value = f"'{value}'" if isinstance(value, str) else value
        lines.append(name if value is True else f"{name} {value}")
    print("  " + " \\\n  ".join(lines))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows on stdout, folded to the width of the terminal (80 in a pipe).

    A pipe gets no column heads. The first line of each row starts with its first cell, so ``grep``
    and ``awk`` find it.
    """
    if not rows:
        return
    heads = sys.stdout.isatty()
    widths = _widths([columns, *rows] if heads else rows, _width())
    folded = [[_fold(cell, width) for cell, width in zip(row, widths)] for row in rows]
    console = _console(sys.stdout)
    if console is not None:
        _draw(console, columns, folded, widths)
        return
    for row in [[[head] for head in columns], *folded] if heads else folded:
        for number in range(max(map(len, row))):
            line = (cell[number] if number < len(cell) else "" for cell in row)
            print("  ".join(map(str.ljust, line, widths)).rstrip())


def _draw(console, columns: Sequence[str], rows: list[list[list[str]]], widths: list[int]) -> None:
    """Rows of folded cells in colour, with rich."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    # The box has a space between columns; the padding is the second one.
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
    for column, width in zip(columns, widths):
        table.add_column(column, width=width, no_wrap=True)
    for row in rows:
        table.add_row(*(Text("\n".join(cell), style=_COLOURS.get(cell[0], "")) for cell in row))
    console.print(table)


def _width() -> int:
    return shutil.get_terminal_size((80, 24)).columns


def _widths(rows: Sequence[Sequence[str]], total: int) -> list[int]:
    """The natural widths of the columns if they fit; else the widest ones get one smaller width."""
    natural = [max(1, *map(len, column)) for column in zip(*rows)]
    total -= 2 * (len(natural) - 1)
    cap = max(natural)
    while sum(min(width, cap) for width in natural) > total and cap > _NARROWEST:
        cap -= 1
    return [min(width, cap) for width in natural]


def _fold(text: str, width: int) -> list[str]:
    """Lines of at most ``width``, broken at spaces, and inside longer words after ``.``, ``/`` or
    ``,``, or after ``_`` if those would leave half of the line empty."""
    lines = []
    for line in textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]:
        while len(line) > width:
            cut = max(line.rfind(mark, 0, width) for mark in "./,") + 1
            if cut < width / 2:
                cut = max(cut, line.rfind("_", 0, width) + 1) or width
            lines.append(line[:cut])
            line = line[cut:]
        lines.append(line)
    return lines


@contextmanager
def progress(what: str, total: int, every: int = 1) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal, otherwise one line for ``every`` steps, on stderr.

    Yields a function to call after each step, with a note about it.
    """
    console = _console(sys.stderr)
    done = 0
    if console is None:

        def advance(note: str) -> None:
            nonlocal done
            done += 1
            if done % every == 0 or done == total:
                say(f"{what}: {done} of {total}, {note}")

        yield advance
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with Progress(TextColumn(what), *columns, TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task(what, total=total, note="")
        yield lambda note: bar.update(task, advance=1, note=note)


def _console(stream: TextIO):
    """rich's console for a terminal; None if plain text is to be written."""
    if not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(file=stream, highlight=False, width=_width())
