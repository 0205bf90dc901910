"""What users import comes from ``glm5_patch`` itself, lazily, and is documented."""

import ast
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import glm5_patch

ROOT = Path(__file__).parents[1]
OWN = {"__version__", "disable", "enable", "require", "status"}


def test_every_public_name_is_there_and_listed_once():
    assert set(glm5_patch.__all__) == OWN | glm5_patch._LAZY.keys()
    assert set(glm5_patch.__all__) <= set(dir(glm5_patch))
    for name in glm5_patch._LAZY:
        value = getattr(glm5_patch, name)
        assert value.__module__ == f"glm5_patch.{glm5_patch._LAZY[name]}"
        assert inspect.getdoc(value)


def test_type_checkers_see_the_same_names():
    tree = ast.parse(inspect.getsource(glm5_patch))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    own = (node for node in block.body if node.level)  # from .module
    seen = {alias.name: node.module for node in own for alias in node.names}
    assert seen == glm5_patch._LAZY


def test_a_name_is_loaded_when_it_is_used():
    code = (
        "import sys, glm5_patch; assert not {'torch', 'safetensors', 'wrapt'} & set(sys.modules)\n"
        "from glm5_patch import HFCheckpoint; assert HFCheckpoint is glm5_patch.HFCheckpoint\n"
        "assert not hasattr(glm5_patch, 'HFChekpoint')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def maker(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["make_api", "make_settings"])
def test_a_page_that_is_made_is_current(name):
    """``python docs/NAME.py`` writes it."""
    assert maker(name).PAGE.read_text() == maker(name).page()


def test_all_of_the_api_is_documented():
    make_api = maker("make_api")
    documented = {name for names in make_api.GROUPS.values() for name in names}
    assert documented == set(glm5_patch.__all__) - {"__version__"}
