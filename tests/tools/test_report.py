"""Tables and progress: drawn on a terminal, plain lines where piped, and without rich."""

import builtins
import io
from types import SimpleNamespace

import pytest

from glm5_patch.tools.report import print_table, progress

ROWS = [("gate", "applied", "every GLM-5 passes here"), ("te_checkpoint", "failed", "no [bold]")]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch):
    streams = SimpleNamespace(stdout=Terminal(), stderr=Terminal())
    monkeypatch.setattr("glm5_patch.tools.report.sys", streams)
    monkeypatch.setenv("TERM", "xterm-256color")
    return streams


def test_piped_a_table_is_lines_for_other_programs(capsys):
    print_table(("patch", "state", "reason"), ROWS)
    assert capsys.readouterr().out.splitlines() == [
        "gate           applied  every GLM-5 passes here",
        "te_checkpoint  failed   no [bold]",
    ]


def test_on_a_terminal_a_table_has_heads_and_colours(terminal):
    pytest.importorskip("rich", reason="rich is not installed")
    print_table(("patch", "state", "reason"), ROWS)
    drawn = terminal.stdout.getvalue()
    assert "patch" in drawn and "┃" in drawn
    assert "\x1b[32mapplied" in drawn and "\x1b[31mfailed" in drawn
    assert "no [bold]" in drawn  # a reason is text and no markup


def test_without_rich_a_terminal_gets_plain_lines(terminal, monkeypatch, capsys):
    find = builtins.__import__

    def no_rich(name, *args, **kwargs):
        if name.startswith("rich"):
            raise ImportError(name)
        return find(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_rich)
    print_table(("patch", "state", "reason"), ROWS)
    assert capsys.readouterr().out.startswith("gate           applied")
    assert terminal.stdout.getvalue() == ""


def test_piped_progress_is_a_line_every_few_steps(capsys):
    with progress("training", 7, every=3) as advance:
        for step in range(7):
            advance(f"loss {step}")
    assert capsys.readouterr().err.splitlines() == [
        "training: 3 of 7, loss 2",
        "training: 6 of 7, loss 5",
        "training: 7 of 7, loss 6",
    ]


def test_on_a_terminal_progress_is_a_bar(terminal):
    pytest.importorskip("rich", reason="rich is not installed")
    with progress("training", 2) as advance:
        advance("loss 1")
        advance("loss 0")
    drawn = terminal.stderr.getvalue()
    assert "2/2" in drawn and "loss 0" in drawn
