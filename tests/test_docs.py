"""The documentation builds, its commands run, and its Python is Python with names that exist."""

import ast
import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from glm5_patch.checkpoint.indexer_order import ROPE_FIRST, ROPE_LAST, convert, find_orders
from glm5_patch.checkpoint.reader import HFCheckpoint
from glm5_patch.tools.cli import _parser
from tests.checkpoint.fp8 import quantize
from tests.tiny import saved

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
INSTALLS = ("python3 -m venv", "pip ", "uv pip ")
"""What .ci/run and the tests of packaging run."""
ALSO_RUN = (
    "glm5-patch demo",
    "glm5-patch doctor",
    "glm5-patch overlap",
    "python -m tests.hosts.",
)
"""By .ci/run, and by the tests of the command line and of hosts."""
LONG = (
    "python benchmarks/",
    "python -m tests.",
    "glm5-patch verify --model",
    "glm5-patch verify --card",
)
"""Minutes, and some a GPU: asked for their help here."""


def blocks(language: str):
    for page in PAGES:
        for text in re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S):
            yield page, text


def commands():
    """Each once, from the first page that has it."""
    found: dict[str, str] = {}
    for page, text in blocks("console"):
        for line in text.replace("\\\n", " ").splitlines():
            if not line.startswith(INSTALLS) and "=" not in line.split()[0]:
                if line.startswith("python ") and line.startswith(LONG):
                    line = line.split(" --")[0]  # one help for all its options
                found.setdefault(line, f"{page.name}: {line[:50]}")
    also_run = [line for line in found if line.startswith(ALSO_RUN) or line == "glm5-patch verify"]
    marks = dict.fromkeys(also_run, pytest.mark.nightly)
    return [pytest.param(line, id=name, marks=marks.get(line, ())) for line, name in found.items()]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with what the commands name."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "GLM-5.2").mkdir()
    shutil.copy(ROOT / "tests" / "configs" / "glm-5.2.json", folder / "GLM-5.2" / "config.json")
    checkpoint = saved(folder / "my-checkpoint")
    shutil.copytree(folder / "my-checkpoint", folder / "published")
    shutil.copytree(folder / "my-checkpoint", folder / "GLM-5.2-FP8")
    quantize(folder / "GLM-5.2-FP8")
    found = find_orders(checkpoint, given=ROPE_FIRST)
    convert(checkpoint, folder / "half-swapped", ROPE_LAST, found)
    for name in ("benchmarks", "tests"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.mark.parametrize("line", commands())
def test_the_commands_run(line, place):
    python = shlex.quote(sys.executable)
    command = re.sub(
        r"^python ", f"{python} ", re.sub(r"^glm5-patch ", "python -m glm5_patch ", line)
    )
    if line.startswith(LONG):
        command = f"{command.split(' --')[0]} --help"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path}
    if line == "glm5-patch verify":
        env["TORCHDYNAMO_DISABLE"] = "0"  # as a user runs it
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=place,
        env=env,
        capture_output=True,
        text=True,
    )
    if "--device cuda" in line and not torch.cuda.is_available():
        assert result.returncode == 2 and "this torch sees no CUDA device" in result.stderr
    elif line == "glm5-patch doctor":  # it also says that a source tree is not an installation
        assert result.returncode in (0, 1) and "dsa_spec" in result.stdout
    else:
        assert result.returncode == 0, result.stdout + result.stderr


def written():
    """Every command line of this package in the pages: in blocks, and in spans of code."""
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for block in re.findall(r"^```\w*\n(.*?)^```$", text, re.M | re.S):
            yield from ((page.name, line) for line in re.findall("glm5-patch [a-z].*", block))
        for span in re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)):
            if re.match("glm5-patch [a-z]", span):
                yield page.name, " ".join(span.split())


def test_every_command_in_the_pages_exists_and_has_these_options():
    (commands,) = (a.choices for a in _parser()._actions if hasattr(a.choices, "keys"))
    found = set()
    for page, line in written():
        name, *words = re.split(r"[ |)\]]+", line.removeprefix("glm5-patch "))
        assert name in commands, f"{page}: {line}"
        parser = commands[name]
        for action in parser._actions:
            if hasattr(action.choices, "keys") and words and words[0] in action.choices:
                parser = action.choices[words[0]]
        known = {option for action in parser._actions for option in action.option_strings}
        unknown = [word for word in words if word.startswith("--") and word not in known]
        assert unknown == [], f"{page}: {line}"
        found.add(name)
    assert found == commands.keys()


def test_the_converted_checkpoint_is_right(place):
    """What the page on checkpoints promises of its two commands."""
    source = HFCheckpoint(place / "half-swapped")
    theirs = HFCheckpoint(place / "published")
    convert(source, place / "again", ROPE_FIRST, find_orders(source, theirs))
    ours = HFCheckpoint(place / "again")
    assert all(torch.equal(ours.read(name), theirs.read(name)) for name in theirs.shapes)


@pytest.mark.parametrize(
    "page, text", blocks("python"), ids=lambda value: value.name if isinstance(value, Path) else ""
)
def test_python_blocks_name_what_exists(page, text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("glm5_patch"):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def test_the_recipe_runs_on_a_cpu(tmp_path):
    """README's program, without Transformer Engine or a GPU."""
    saved(tmp_path / "tiny-glm")
    (recipe,) = re.findall(
        r"<!-- recipe -->\n```python\n(.*?)```\n<!-- /recipe -->",
        (ROOT / "README.md").read_text(),
        re.S,
    )
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", recipe],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "torch.Size([1, 64, 96])" in result.stdout


def test_the_test_command_says_what_it_does_before_it_imports_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/config"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert result.stdout.startswith("glm5-patch tests: collecting")
    assert "torch was imported" in result.stdout + result.stderr


def test_the_site_builds_without_a_warning(tmp_path):
    """In a theme that mkdocs brings, if its own is not installed."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text()) | {"docs_dir": str(ROOT / "docs")}
    if importlib.util.find_spec("material") is None:
        config |= {"theme": "readthedocs", "markdown_extensions": ["tables", "admonition", "toc"]}
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", "site"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert "Quick start" in (tmp_path / "site" / "index.html").read_text()
