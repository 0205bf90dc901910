"""What is installed, found without importing it."""

import importlib

import pytest

from glm5_patch.patching.imports import is_there


@pytest.fixture
def two_folders(tmp_path, monkeypatch):
    """The namespace ``spread`` in two folders; ``spread.core`` of the first hides the second's."""
    for folder in ("first", "second"):
        core = tmp_path / folder / "spread" / "core"
        core.mkdir(parents=True)
        (core / "__init__.py").touch()
        (core / f"of_the_{folder}.py").touch()
        (tmp_path / folder / "spread" / folder).mkdir()
        (tmp_path / folder / "spread" / folder / "module.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "second")
    monkeypatch.syspath_prepend(tmp_path / "first")
    importlib.invalidate_caches()


@pytest.mark.parametrize(
    "name, there",
    [
        ("spread.core.of_the_first", True),
        ("spread.core.of_the_second", False),
        ("spread.first.module", True),
        ("spread.second.module", True),
        ("spread.second", True),
        ("spread.third", False),
        ("absent.module", False),
    ],
)
def test_a_package_of_a_namespace_is_the_first_on_the_path(two_folders, name, there):
    assert is_there(name) is there
