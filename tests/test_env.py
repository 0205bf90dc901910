"""Each environment variable is checked, and what is said repeats what was typed."""

import os
import re

import pytest

from glm5_patch import env
from tests.activation.fresh import python


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in [name for name in os.environ if name.upper().startswith("GLM5")]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("GLM5_PATCH", "banana", "GLM5_PATCH='banana' must be one of"),
        ("GLM5_PATCH_STRICT", "maybe", "GLM5_PATCH_STRICT='maybe' must be one of"),
        ("GLM5_PATCH_LOG", "Debgu", "GLM5_PATCH_LOG='Debgu' must be .*did you mean 'debug'"),
        ("GLM5_PATCH_KERNELS", "Tritn", "GLM5_PATCH_KERNELS='Tritn' .*did you mean 'triton'"),
        ("GLM5_PATCH_TP", "token", "GLM5_PATCH_TP='token' .*did you mean 'tokens'"),
        ("GLM5_PATCH_DISABLE", "gate,Gaet", "names 'Gaet', .*did you mean 'gate'"),
        ("GLM5_PATCH_DISABLED", "gate", "GLM5_PATCH_DISABLED is not .*'GLM5_PATCH_DISABLE'"),
        ("glm5_patch", "0", "glm5_patch is not a variable .*did you mean 'GLM5_PATCH'"),
        ("GLM5PATCH", "0", "GLM5PATCH is not a variable .*did you mean 'GLM5_PATCH'"),
    ],
)
def test_a_wrong_switch_is_named_with_what_was_meant(monkeypatch, name, value, says):
    monkeypatch.setenv(name, value)
    (problem,) = env.problems({"gate", "other"})
    assert re.search(says, problem), problem


def test_right_switches_are_right_in_any_case_and_with_spaces(monkeypatch):
    for name, value in {
        "GLM5_PATCH": " On ",
        "GLM5_PATCH_STRICT": "FALSE",
        "GLM5_PATCH_LOG": "INFO",
        "GLM5_PATCH_KERNELS": "Torch",
        "GLM5_PATCH_DISABLE": " Gate , other",
    }.items():
        monkeypatch.setenv(name, value)
    assert env.problems({"gate", "other"}) == []
    assert env.Switches.read() == (True, frozenset({"gate", "other"}), False, "info")


def test_a_wrong_switch_is_not_silent_and_breaks_no_import():
    code = "import glm5_patch._autoload as entry; entry.activate(); print('fine')"
    for strict in ("0", "1"):
        result = python(code, "-W", "error", GLM5_PATCH="banana", GLM5_PATCH_STRICT=strict)
        assert result.stdout.strip() == "fine"
        assert "GLM5_PATCH='banana' must be one of" in result.stderr


def test_the_entry_point_imports_little():
    """What a process pays that builds no GLM-5: none of it but this package's own few files."""
    code = (
        "import sys, __future__, enum, inspect, logging, threading, typing, pathlib, pkgutil\n"
        "before = set(sys.modules)\nfrom glm5_patch._autoload import activate\nactivate()\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    loaded = python(code).stdout.split()
    assert all(name.startswith("glm5_patch") for name in loaded), loaded
    assert not any("table" in name or "seams" in name for name in loaded)
