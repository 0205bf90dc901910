"""A patch that fails when all its changes are made: not one of them stays in the host."""

import json

import pytest

from tests.activation.fresh import PATCHES, output

EACH_ALONE = """
import importlib, json, os, sys, warnings
import torch
import glm5_patch
from tests.activation.fork import in_a_fork
from tests.activation.fresh import PATCHES

modules = [importlib.import_module(name) for name in sorted({p.module for p in PATCHES})]
# A patch may change what such a module calls in a module beside it.
beside = lambda module, value: (
    type(value) is type(sys)
    and value.__name__.rpartition(".")[0] == module.__name__.rpartition(".")[0]
)
modules += [v for m in modules for v in list(vars(m).values()) if beside(m, v) and v not in modules]

def attributes():
    found = {}
    for module in modules:
        for name, value in vars(module).items():
            if name != "__warningregistry__":  # Python's own
                found[module.__name__, name] = value
            if isinstance(value, type) and value.__module__ == module.__name__:
                found.update({(str(value), k): v for k, v in vars(value).items()})
                fields = vars(value).get("__dataclass_fields__", {})
                found.update({(str(value), "field", k): v for k, v in fields.items()})
    return found

MISSING = object()

def differing(a, b):
    return [k for k in a.keys() | b.keys() if a.get(k, MISSING) is not b.get(k, MISSING)]

def left_behind(patch):
    before, changed = attributes(), []
    apply = type(patch).apply
    def broken(self, module, seams):
        apply(self, module, seams)
        changed.extend(differing(before, attributes()))
        raise RuntimeError("broken on purpose")
    type(patch).apply = broken
    os.environ["GLM5_PATCH_DISABLE"] = ",".join(p.id for p in PATCHES if p.id != patch.id)
    warnings.simplefilter("ignore")
    glm5_patch.enable()
    wrong = [".".join(k) for k in differing(before, attributes())]
    return glm5_patch.status()[patch.id].state.value, len(changed), wrong

print(json.dumps({p.id: in_a_fork(left_behind, p) for p in PATCHES}))
"""


@pytest.fixture(scope="module")
def outcomes():
    return json.loads(output(EACH_ALONE, TORCH_DEVICE_BACKEND_AUTOLOAD="0").splitlines()[-1])


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.id)
def test_the_host_is_as_it_was(outcomes, patch):
    state, changed, wrong = outcomes[patch.id]
    if state == "not_needed":
        pytest.skip("not needed on this host, so never applied")
    assert state == "failed"
    assert changed > 0  # or the fault came before anything was changed
    assert wrong == []
