"""Tables and progress: drawn on a terminal, plain lines where piped, and without rich.

Nothing on stdout is wider than 80 columns, and rich changes no word.
"""

import builtins
import io
import logging
import re
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from glm5_patch.config.index_pattern import best_pattern
from glm5_patch.config.schedule import IndexSchedule
from glm5_patch.env import logger
from glm5_patch.patches import announce
from glm5_patch.tools import cli, doctor, overlap, status, verify, verify_model
from glm5_patch.tools.report import Result, notes_said, print_table, progress, say

ROOT = Path(__file__).parents[2]
ROWS = [("gate", "applied", "every GLM-5 passes here"), ("te_checkpoint", "failed", "no [bold]")]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def terminal_of_80_columns(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)


def on_a_terminal(show, *arguments) -> SimpleNamespace:
    """What it writes to stdout and stderr."""
    out, err = Terminal(), Terminal()
    with redirect_stdout(out), redirect_stderr(err):
        show(*arguments)
    return SimpleNamespace(out=out.getvalue(), err=err.getvalue())


@pytest.fixture
def no_rich(monkeypatch):
    find = builtins.__import__

    def import_(name, *args, **kwargs):
        if name.startswith("rich"):
            raise ImportError(name)
        return find(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", import_)


def test_piped_a_table_is_lines_for_other_programs(capsys):
    print_table(("patch", "state", "reason"), ROWS)
    assert capsys.readouterr().out.splitlines() == [
        "gate           applied  every GLM-5 passes here",
        "te_checkpoint  failed   no [bold]",
    ]


def test_on_a_terminal_a_table_has_heads_and_colours():
    pytest.importorskip("rich", reason="rich is not installed")
    drawn = on_a_terminal(print_table, ("patch", "state", "reason"), ROWS).out
    assert lines(drawn)[0].split() == ["patch", "state", "reason"]
    assert "\x1b[32mapplied" in drawn and "\x1b[31mfailed" in drawn
    assert "no [bold]" in drawn  # a reason is text and no markup


def plan(*options):
    config = str(ROOT / "tests" / "configs" / "glm-5.2.json")
    return cli._plan(cli._parser().parse_args(["plan", "--config", config, *options]))


def overlap_of_78_layers():
    schedule = IndexSchedule.from_types("F" * 78, 78)
    shares = [[1 / (1 + abs(row - column)) for column in range(78)] for row in range(78)]
    pattern = best_pattern(schedule, shares, 20)
    data = {
        "overlap": shares,
        "computing_layers": list(schedule.computing_layers),
        "sequences": [8, 8192],
        "keep": 20,
        "pattern": pattern.schedule.letters,
        "mean_overlap": pattern.mean_overlap,
        "heat_map": None,
    }
    return Result(0, data, lambda: overlap._print(data, pattern))


def of_card(name):
    """The result that a recorded card has."""
    card = yaml.safe_load((ROOT / "docs" / "cards" / f"{name}.yaml").read_text())
    figures = dict(card["figures"])
    if "checks" not in figures:
        return verify_model.ModelReport(**figures).result()
    del figures["passed"]
    figures["checks"] = [verify.Check(**one) for one in figures["checks"]]
    return verify.Report(**figures).result()


def of_findings():
    findings = [*doctor.installation(), *doctor.probe()]
    wrong = [one._replace(ok=False, remedy=one.remedy or "none") for one in findings]
    both = findings + wrong
    return Result(0, {}, lambda: doctor.print_findings(both))


COMMANDS = {
    "status": status.of_installation,
    "status --import": status.of_hosts,
    "env": status.environment,
    "explain": lambda: status.explain(None),
    "doctor": of_findings,
    "verify": lambda: of_card("megatron-core-0.19.2"),
    "verify --model": lambda: of_card("transformers-5.11.0"),
    "plan --pp": lambda: plan("--pp", "16", "--vpp", "2", "--topk-across-stages"),
    "plan --gpus": lambda: plan("--gpus", "256"),
    "overlap": overlap_of_78_layers,
}


@pytest.fixture(scope="module", params=COMMANDS)
def result(request):
    return COMMANDS[request.param]()


def lines(text: str) -> list[str]:
    """Without colours, lines below the heads of tables, and spaces at the end."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return [line.rstrip() for line in text.splitlines() if set(line) != {"\u2500"}]


def wide(found: list[str]) -> list[str]:
    """Lines of more than 80 columns that are no flags or settings to be copied."""
    return [line for line in found if len(line) > 80 and not re.match(r"  (--|\S+ = |\")", line)]


def test_a_command_fits_in_80_columns_and_says_the_same_without_rich(result, monkeypatch):
    pytest.importorskip("rich", reason="rich is not installed")
    coloured = on_a_terminal(result.show).out
    monkeypatch.setenv("NO_COLOR", "1")
    plain = on_a_terminal(result.show).out
    assert "\x1b" not in plain
    assert plain and lines(plain) == lines(coloured)
    assert wide(lines(plain)) == []


def test_a_command_in_a_pipe_fits_in_80_columns(result, capsys):
    result.show()
    printed = capsys.readouterr().out
    assert printed and "\x1b" not in printed
    assert wide(printed.splitlines()) == []


def test_without_rich_a_terminal_gets_plain_lines(no_rich):
    assert on_a_terminal(print_table, ("patch", "state", "reason"), ROWS).out.splitlines() == [
        "patch          state    reason",
        "gate           applied  every GLM-5 passes here",
        "te_checkpoint  failed   no [bold]",
    ]


def test_progress_and_errors_are_folded_on_a_terminal_and_whole_in_a_log(capsys):
    line = "checkpoint:" + " words" * 20
    folded = on_a_terminal(say, line).err.splitlines()
    assert len(folded) == 2 and wide(folded) == []
    say(line)
    assert capsys.readouterr().err == f"{line}\n"


def test_notes_of_the_package_are_folded_and_said_once(capfd):
    root = logging.StreamHandler()
    logging.getLogger().addHandler(root)

    def note():
        with notes_said():
            announce.say("glm5-patch:" + " words" * 20)

    try:
        folded = on_a_terminal(note).err.splitlines()
    finally:
        logging.getLogger().removeHandler(root)
    assert len(folded) == 2 and wide(folded) == []
    assert capfd.readouterr().err == ""
    assert logger.propagate and not logger.handlers


def test_piped_progress_is_a_line_every_few_steps(capsys):
    with progress("training", 7, every=3) as advance:
        for step in range(7):
            advance(f"loss {step}")
    assert capsys.readouterr().err.splitlines() == [
        "training: 3 of 7, loss 2",
        "training: 6 of 7, loss 5",
        "training: 7 of 7, loss 6",
    ]


def test_on_a_terminal_progress_is_a_bar():
    pytest.importorskip("rich", reason="rich is not installed")

    def train():
        with progress("training", 2) as advance:
            advance("loss 1")
            advance("loss 0")

    drawn = on_a_terminal(train).err
    assert "2/2" in drawn and "loss 0" in drawn
