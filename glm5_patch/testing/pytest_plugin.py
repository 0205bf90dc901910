"""pytest for programs that run GLM-5 on a patched megatron-core. PYTEST_DONT_REWRITE

``--glm5-patch=auto|off|strict`` (ini: ``glm5_patch``), the fixtures ``glm5_patched``,
``glm5_unpatched``, ``glm5_status`` and ``glm5_oracle``, and the marker ``glm5_patches(*ids)``.
Nothing here imports torch or a host before a test asks for one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

import glm5_patch

from ..env import ENABLED, STRICT

if TYPE_CHECKING:
    from .oracle import Oracle

MODES = ("auto", "off", "strict")


def pytest_addoption(parser: pytest.Parser) -> None:
    says = "auto: by the environment; off: no patch is armed; strict: a failing patch raises"
    group = parser.getgroup("glm5-patch", "GLM-5 on megatron-core")
    group.addoption("--glm5-patch", choices=MODES, default=None, help=says)
    parser.addini("glm5_patch", f"default of --glm5-patch ({says})", default="auto")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "glm5_patches(*ids): fail unless these patches (all, without ids) are in place where the "
        "host needs them",
    )
    mode = _mode(config)
    # Before the first test module imports torch; processes that tests start inherit it.
    if mode == "off":
        os.environ[ENABLED] = "0"
        glm5_patch.disable()
    elif mode == "strict":
        os.environ[STRICT] = "1"


def pytest_report_header(config: pytest.Config) -> str | None:
    mode = _mode(config)
    return None if mode == "auto" else f"glm5-patch {glm5_patch.__version__}: {mode}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("glm5_patches"):
        glm5_patch.require(*marker.args)


@pytest.fixture
def glm5_status() -> glm5_patch.Status:
    """The state of each patch."""
    return glm5_patch.status()


@pytest.fixture
def glm5_patched() -> Iterator[glm5_patch.Status]:
    """Put every patch in place for this test, or fail it; restore the earlier state afterwards."""
    was_on = _is_on()
    glm5_patch.enable()
    try:
        glm5_patch.require()
        yield glm5_patch.status()
    finally:
        if not was_on:
            glm5_patch.disable()


@pytest.fixture
def glm5_unpatched() -> Iterator[None]:
    """Give this test every host as released. The earlier state is restored afterwards."""
    was_on = _is_on()
    glm5_patch.disable()
    try:
        yield
    finally:
        if was_on:
            glm5_patch.enable()


@pytest.fixture(scope="session")
def glm5_oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """A small random GLM-5.2 on disk, and a judge of models that were loaded from it.

    ``checkpoint`` is the directory. ``assert_matches(model)`` raises AssertionError with the names
    of the model's mistakes, and ``assert_builds(function)`` does for the function that builds it.
    """
    from .oracle import Oracle

    return Oracle(tmp_path_factory.mktemp("glm5"))


def _is_on() -> bool:
    return any(row.state != "disabled" for row in glm5_patch.status())


def _mode(config: pytest.Config) -> str:
    mode = config.getoption("--glm5-patch") or config.getini("glm5_patch")
    if mode not in MODES:
        raise pytest.UsageError(f"glm5_patch={mode!r} must be one of {', '.join(MODES)}")
    return mode
