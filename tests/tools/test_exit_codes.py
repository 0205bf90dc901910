"""Exit codes of every command, good and bad, with and without ``--json``."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from glm5_patch.tools import cli
from tests.activation.fresh import environment
from tests.tiny import saved

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "tests" / "configs" / "glm-5.2.json"
SPLIT = ["--pp", "4"]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("good") / "checkpoint").directory


def arguments(line: str, good: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "file").write_text("{}")
    names = {"GOOD": good, "CONFIG": CONFIG, "FILE": tmp_path / "file", "NEW": tmp_path / "new"}
    return [str(names.get(word, word)).replace("FILE", str(names["FILE"])) for word in line.split()]


WELL = [
    "explain",
    "explain gate",
    "env",
    "plan --config CONFIG --pp 4",
    "checkpoint check GOOD",
    "checkpoint convert GOOD NEW --from rope-last",
    "checkpoint convert GOOD NEW --from rope-first",
]
UNUSABLE = {
    "": "required: COMMAND",
    "frobnicate": "invalid choice: 'frobnicate'",
    "status --jsn": "unrecognized arguments: --jsn",
    "explain gaet": "no patch is called 'gaet'",
    "plan --pp 4": "required: --config",
    "plan --config CONFIG --pp 0": "'0' must be a whole number of at least 1",
    "plan --config CONFIG --pp four": "'four' must be a whole number of at least 1",
    "plan --config missing.json --pp 4": "missing.json: no such file",
    "plan --config FILE --pp 4": "model_type is None",
    "plan --config FILE/config.json --pp 4": "Not a directory",
    "plan --config CONFIG --pp 4 --indexer-types FFS": "has 3 entries for num_layers=78",
    "overlap --checkpoint GOOD": "required: --text",
    "overlap --checkpoint missing --text FILE": "missing: no such directory",
    "overlap --checkpoint GOOD --text missing": "missing: No such file",
    "overlap --checkpoint GOOD --text FILE": "file has 2 tokens, and one sequence takes 36",
    "overlap --checkpoint GOOD --text FILE --keep half": "invalid float value: 'half'",
    "overlap --checkpoint GOOD --text FILE --sequences 0": "'0' must be a whole number",
    "checkpoint": "required: ACTION",
    "checkpoint check missing": "missing: no such directory",
    "checkpoint check GOOD --like missing": "missing: no such directory",
    "checkpoint check GOOD --like GOOD": "they are one directory",
    "checkpoint convert GOOD NEW": "nothing was written",
    "checkpoint convert GOOD NEW --from last": "invalid choice: 'last'",
    "checkpoint convert GOOD GOOD --from rope-last": "exists and is not an empty directory",
    "checkpoint convert GOOD FILE --from rope-last": "exists and is not an empty directory",
    "checkpoint convert GOOD FILE/new --from rope-last": "not a directory",
    "demo --output FILE/new": "not a directory",
    "demo --output GOOD": "exists and is not an empty directory",
    "demo --steps 0": "'0' must be a whole number of at least 1",
    "demo --checkpoint missing": "missing: no such directory",
    "verify --checkpoint missing": "missing: no such directory",
    "verify --impl transformer_engine": "transformer_engine needs --device cuda",
    "verify --dtype fp64": "invalid choice: 'fp64'",
    "verify --model mamba": "must be one of gpt, hybrid, MODULE:FUNCTION or PATH.py:FUNC",
    "demo --model my:glm5": "invalid choice: 'my:glm5'",
    "verify --allow latent_norm_eps": "it goes with --model MODULE:FUNCTION",
    "verify --model no_such:f": "no_such can't be imported",
    "verify --model torch:nothing": "torch has no 'nothing'",
    "verify --model torch:float32": "float32 is of type dtype, which can't be called",
    "verify --model torch:load --dtype bf16": "is compared in fp32",
    "verify --model torch:load --impl transformer_engine": "chooses the modules",
    "verify --model torch:load --checkpoint GOOD": "leave --checkpoint out",
    "verify --model torch:load --allow rope_thta": "no fault is called 'rope_thta'",
    "verify --model torch:load --seq-length 9": "a sequence of 9 tokens: it must have 10 to 96",
    "verify --card NEW/card.yaml": "is no directory",
    "verify --card GOOD": "a directory; it must be a file",
    "verify --model torch:load": "torch:load raised: IsADirectoryError",
}


@pytest.mark.parametrize("line", WELL)
def test_what_works_ends_with_0(line, good, tmp_path, capsys):
    words = arguments(line, good, tmp_path)
    assert cli.main(words) == 0
    assert capsys.readouterr().out.strip()
    if "NEW" in line and (tmp_path / "new").exists():
        words[words.index(str(tmp_path / "new"))] = str(tmp_path / "newer")
    assert cli.main([*words, "--json"]) == 0
    assert "error" not in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("line", UNUSABLE)
def test_what_is_unusable_ends_with_2_and_one_line(line, good, tmp_path, capsys):
    words = arguments(line, good, tmp_path)
    assert cli.main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "Traceback" not in printed.err
    (said,) = [line for line in printed.err.splitlines() if line.startswith("glm5-patch: ")]
    assert UNUSABLE[line] in said
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("line", UNUSABLE)
def test_with_json_an_error_is_json(line, good, tmp_path, capsys):
    assert cli.main([*arguments(line, good, tmp_path), "--json"]) == 2
    assert UNUSABLE[line] in json.loads(capsys.readouterr().out)["error"]


def test_a_fault_of_the_package_itself_is_not_a_failed_check(capsys, monkeypatch):
    monkeypatch.setattr("glm5_patch.tools.status.environment", lambda: 1 / 0)
    assert cli.main(["env", "--json"]) == 2
    printed = capsys.readouterr()
    assert "ZeroDivisionError" in json.loads(printed.out)["error"] and "Traceback" in printed.err


def test_an_interrupted_command_ends_with_130(capsys, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr("glm5_patch.tools.status.environment", interrupt)
    assert cli.main(["env"]) == 130


def test_what_a_host_prints_is_kept_out_of_the_json(capsys, monkeypatch):
    def noisy():
        print("a host says hello")
        return cli.Result(0, {"fine": True}, lambda: None)

    monkeypatch.setattr("glm5_patch.tools.status.environment", noisy)
    assert cli.main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"fine": True}


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_reader_that_went_away_ends_it_quietly(options):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "glm5_patch", "explain", *options]
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(write)
    assert (result.returncode, result.stderr) == (141, "")


@pytest.mark.parametrize("package", ["transformers", "torch"])
@pytest.mark.parametrize(
    "command", ["verify", "demo", "checkpoint convert GOOD NEW --from rope-last"]
)
def test_a_package_that_is_missing_is_named(command, package, good, tmp_path):
    """As where ``pip install glm5-patch`` brought no extras."""
    if "checkpoint" in command and package == "transformers":
        pytest.skip("checkpoint does not need transformers")
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(
        f"raise ModuleNotFoundError(\"No module named '{package}'\", name='{package}')"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-m", "glm5_patch", *arguments(command, good, tmp_path), "--json"],
        capture_output=True,
        text=True,
        env=environment(PYTHONPATH=path),
        cwd=tmp_path,
    )
    assert result.returncode == 2, result.stderr
    error = json.loads(result.stdout)["error"]
    assert package in error and "pip install 'glm5-patch[demo]'" in error


@pytest.mark.parametrize("line", ["verify", "demo --steps 1", "doctor"])
def test_slow_commands_say_at_once_what_they_do(line):
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "glm5_patch", *line.split()],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(),
    )
    first = process.stderr.readline()
    seconds = time.monotonic() - started
    process.kill()
    process.wait()
    assert first.startswith(f"glm5-patch {line.split()[0]}: ") and "importing torch" in first
    assert seconds < 2


@pytest.mark.parametrize(
    "line", ["status", "explain", "plan --config CONFIG --pp 16 --vpp 2", "checkpoint check GOOD"]
)
def test_tables_fit_80_columns(line, good, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")  # the tests' own terminal may be wider
    cli.main(arguments(line, good, tmp_path))
    lines = capsys.readouterr().out.splitlines()
    flags = "pipeline_model_parallel_layout", "hybrid_layer_pattern"
    copied = [line for line in lines if any(one in line.replace("-", "_") for one in flags)]
    assert lines and max(len(line) for line in lines if line not in copied) <= 80
