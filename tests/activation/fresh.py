"""Scripts in processes of their own, where nothing was imported before."""

import importlib.util
import os
import subprocess
import sys
import textwrap

from glm5_patch.patches import table


def of_this_host(patch):
    """Whether this release has the module. Those that ``require`` does not import by itself, of
    Megatron-Bridge, have their own tests."""
    if patch.on_request:
        return False
    try:
        return not patch.may_be_absent or importlib.util.find_spec(patch.module) is not None
    except ModuleNotFoundError:
        return False


PATCHES = [patch for patch in table.PATCHES if of_this_host(patch)]

REPORT = """
import importlib, inspect, json, sys
import glm5_patch
from glm5_patch.patches import table
PATCHES = [patch for patch in table.PATCHES if patch.id in OF_THIS_HOST]

def in_place(patch):
    # Looks at the host itself, not at the ledger; None where that can't tell (a flag).
    owner = sys.modules[patch.module]
    *parts, name = patch.attribute.split(".")
    for part in parts:
        owner = getattr(owner, part, None)  # a module that older hosts do not have
    if inspect.isclass(owner) and owner.__module__ != patch.module:
        return None  # an alias of a class whose own module has a patch
    value = vars(owner).get(name) if owner else None
    value = getattr(value, "__func__", value)
    if inspect.isclass(value):
        if patch.id == "config_fields":
            return "dsa_indexer_types" in value.__dataclass_fields__
        return value.__module__.startswith("glm5_patch.")
    if inspect.isfunction(value):
        return value.__globals__["__name__"].startswith("glm5_patch.")
    return None

def report():
    for patch in PATCHES:
        importlib.import_module(patch.module)
    rows = glm5_patch.status()
    return {p.id: [rows[p.id].state.value, in_place(p)] for p in PATCHES}
""".replace("OF_THIS_HOST", repr([patch.id for patch in PATCHES]))


def environment(**env):
    """This process's variables without this package's switches, and others."""
    return {k: v for k, v in os.environ.items() if not k.startswith("GLM5_PATCH")} | env


def python(code, *options, **env):
    """Run code in a fresh interpreter without this package's switches."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", *options, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=environment(**env),
    )


def output(code, **env):
    result = python(code, **env)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()
