"""Small hosts in a folder, and patches of them, so that a sequence of events takes milliseconds."""

import importlib
import sys
import textwrap
import types

from glm5_patch.patching.machine import Machine
from glm5_patch.patching.patch import Finding, Patch

# The package takes an alias at its end; `early` takes one while `target` is half-way.
FILES = {
    "__init__": "from .target import function\n",
    "early": "from .target import function\n",
    "target": """
        def function(x): return x
        from . import early
        class Thing:
            def method(self, x): return x
            @staticmethod
            def static(x): return x
            @classmethod
            def of_class(cls, x): return x
            @property
            def prop(self): return 0
        """,
}
METHODS = ("method", "static", "of_class", "prop")


def write_host(folder, name):
    (folder / name).mkdir()
    for file, text in FILES.items():
        (folder / name / f"{file}.py").write_text(textwrap.dedent(text))


def add_one(wrapped, instance, args, kwargs):
    return wrapped(*args, **kwargs) + 1


class ToyPatch(Patch):
    """Everything that a wrapper adds is 1, so that two of them show."""

    why = upstream = remove_when = "."
    attribute = "function"

    def __init__(self, host):
        self.id = host
        self.module = f"{host}.target"

    def needed(self, module):
        return Finding(True, "a toy")

    def apply(self, module, seams):
        seams.wrap(module, "function", add_one)
        for name in METHODS:
            seams.wrap(module.Thing, name, add_one)
        seams.add(module, "added", 1)


def machine_of(*patches):
    return Machine([patch.module for patch in patches], lambda: patches)


def forget(host):
    """As a test suite that imports a host anew does."""
    for name in [name for name in sys.modules if name.split(".")[0] == host]:
        del sys.modules[name]
    importlib.invalidate_caches()


def added(host):
    """What the wrappers of each place add: {0} where nothing is patched, {1} where all is once."""
    target = sys.modules[f"{host}.target"]
    thing = target.Thing()
    found = {module.function(0) for module in (target, sys.modules[host])}
    found |= {sys.modules[f"{host}.early"].function(0), thing.prop}
    return found | {getattr(thing, name)(0) for name in METHODS[:3]}


def attributes(host):
    """Every attribute of a host's modules and classes."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] != host or not isinstance(module, types.ModuleType):
            continue
        for key, value in list(vars(module).items()):
            found[name, key] = value
            if isinstance(value, type):
                found.update({(name, key, inner): v for inner, v in vars(value).items()})
    return found
