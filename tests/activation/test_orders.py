"""Every order of importing torch, a host and this package, each in a fresh process."""

import importlib
import inspect
import json
import subprocess
import sys
import textwrap

import pytest

from tests.activation.fresh import PATCHES, REPORT, output, python

SPECS = "megatron.core.models.gpt.experimental_attention_variant_module_specs"
MODULES = sorted({patch.module for patch in PATCHES})
ALL = "import " + ", ".join(MODULES)
SEAMS = [
    (patch.module, patch.attribute)
    for patch in PATCHES
    if inspect.isfunction(
        getattr(importlib.import_module(patch.module), patch.attribute.split(".")[0], None)
    )
]


def reported(code, **env):
    """The state of every patch after some code, and whether the host itself shows it."""
    return json.loads(
        output(f"{code}\n{REPORT}\nprint(json.dumps(report()))", **env).splitlines()[-1]
    )


@pytest.fixture(scope="module")
def expected():
    """What this host needs, found in the plainest order."""
    found = reported("import torch")
    assert found["gate"] == ["applied", True]
    for state, in_place in found.values():
        assert state in ("applied", "not_needed")
        assert in_place in (None, state == "applied")
    return found


ORDERS = {
    "off and on": f"import torch, glm5_patch; glm5_patch.disable(); {ALL}; glm5_patch.enable()",
}
MORE_ORDERS = {
    "from import": "; ".join(f"from {module} import {name} as alias" for module, name in SEAMS),
    "twice": f"import glm5_patch; glm5_patch.enable(); {ALL}; glm5_patch.enable()",
    "lazy": "from transformers import GlmMoeDsaConfig",
    "torch first": f"import torch; {ALL}",  # differs from the plainest in the order of the hosts
    "auto": f"import glm5_patch.auto; {ALL}",
    "on, off and on": f"{ALL}; import glm5_patch; glm5_patch.disable(); glm5_patch.enable()",
}


@pytest.mark.parametrize(
    "first",
    [pytest.param(code, id=name) for name, code in ORDERS.items()]
    + [
        pytest.param(code, id=name, marks=pytest.mark.nightly) for name, code in MORE_ORDERS.items()
    ],
)
def test_import_orders(expected, first):
    assert reported(first) == expected


# megatron.core's own __init__ imports torch, so whichever of its modules comes first, the plugin is
# armed at the same place.
FIRST = ("megatron.core.transformer.transformer_config",)


def test_the_first_imports_are_of_this_host():
    assert set(FIRST) <= set(MODULES)


@pytest.mark.parametrize(
    "module",
    [pytest.param(name, marks=() if name in FIRST else pytest.mark.nightly) for name in MODULES],
)
def test_a_host_module_may_be_the_first_import_of_all(expected, module):
    """It or a module on its way imports torch, which arms the plugin half-way through it."""
    assert reported(f"import {module}") == expected


def test_loaded_hosts_are_patched_late_and_their_aliases_follow(expected):
    take = "\n".join(
        f"from {module} import {name} as alias_{number}"
        for number, (module, name) in enumerate(SEAMS)
    )
    code = f"""
import sys
{ALL}
{take}
kept = [{", ".join(f"alias_{number}" for number in range(len(SEAMS)))}]  # names are rebound
seams = {SEAMS}
def held():
    return [vars(sys.modules[module])[name] for module, name in seams]
def aliases():
    return [globals()[f"alias_{{number}}"] for number in range(len(seams))]
assert all(a is b for a, b in zip(kept, held()))
import glm5_patch.auto
assert all(a is b for a, b in zip(aliases(), held()))
changed = sum(a is not b for a, b in zip(kept, held()))
glm5_patch.disable()
assert all(a is b is c for a, b, c in zip(kept, held(), aliases()))
glm5_patch.enable()
assert changed == sum(a is not b for a, b in zip(kept, held())) > 0
assert all(row.late for row in glm5_patch.status() if row.state == "applied")
"""
    assert reported(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0") == expected


def test_a_reload_of_any_host_module_is_patched_the_moment_anybody_asks(expected):
    """A reloaded module makes new functions and classes, which nobody has patched yet."""
    code = f"""
{ALL}
{REPORT}
from glm5_patch.patches import MACHINE
from tests.activation.fork import in_a_fork

def after_reload(name):
    importlib.reload(sys.modules[name])
    MACHINE.raise_unless_in_place()  # as the gate asks before it lets a model be built
    in_place_then = {{p.id: in_place(p) for p in PATCHES}}
    return in_place_then == {{id: found for id, (_, found) in report().items()}}, report()

print(json.dumps({{name: in_a_fork(after_reload, name) for name in {MODULES}}}))
"""
    found = json.loads(output(code).splitlines()[-1])
    assert found == {module: [True, expected] for module in MODULES}


FAKE_HOST = """
import sys
import torch
sys.machine.enable()
{end}
def function(): return 1
"""
FAKE_PATCH = """
import sys
from glm5_patch.patching.machine import Machine
from glm5_patch.patching.patch import Finding, Patch
class Fake(Patch):
    id, module, attribute = "fake", "fake_host", "function"
    why = upstream = remove_when = "."
    def needed(self, module): return Finding(True, "fake")
    def apply(self, module, seams):
        seams.wrap(module, "function", lambda wrapped, i, a, k: wrapped() + 1)
sys.machine = machine = Machine(["fake_host"], lambda: [Fake()])
"""


def test_a_half_imported_module_that_fails_is_patched_on_its_next_import(tmp_path):
    host = tmp_path / "fake_host.py"
    host.write_text(FAKE_HOST.format(end="if not hasattr(sys, 'again'): raise OSError('broken')"))
    code = FAKE_PATCH + textwrap.dedent("""
    try:
        import fake_host
    except OSError:
        pass
    assert "fake_host" not in sys.modules
    assert machine.row("fake").state == "armed", machine.row("fake")
    sys.again = True
    import fake_host
    print(fake_host.function(), machine.row("fake").state.value)
    """)
    assert output(code, PYTHONPATH=str(tmp_path)) == "2 applied"


def test_switched_off_nothing_is_armed_and_the_host_refuses_as_ever():
    code = f"""
    import sys, torch
    assert not any(m.startswith(("glm5_patch.patching", "wrapt")) for m in sys.modules)
    import {SPECS} as specs
    from megatron.core.transformer.transformer_config import MLATransformerConfig
    config = MLATransformerConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, add_bias_linear=False,
        rope_type="rope", experimental_attention_variant="dsa", transformer_impl="local")
    try:
        specs.get_transformer_block_with_experimental_attention_variant_spec(config)
    except AssertionError as error:
        print(error)
    import glm5_patch
    print({{row.state.value for row in glm5_patch.status()}}, bool(glm5_patch.status()))
    """
    refusal, states = output(code, GLM5_PATCH="0").splitlines()
    assert "transformer engine" in refusal.lower().replace("_", " ")
    assert states == "{'disabled'} False"


def test_disable_puts_back_every_identical_object_of_every_host():
    code = """
    import sys, os, importlib
    import torch
    from tests.activation.fresh import PATCHES
    names = sorted({p.module for p in PATCHES})
    modules = [importlib.import_module(name) for name in names]
    def attributes():
        found = {}
        for module in modules:
            for name, value in vars(module).items():
                if name == "__warningregistry__":
                    continue  # Python's own, made where a probe silences a warning
                found[module.__name__, name] = value
                if isinstance(value, type) and value.__module__ == module.__name__:
                    found.update({(value, k): v for k, v in vars(value).items()})
                    fields = vars(value).get("__dataclass_fields__", {})
                    found.update({(value, "field", k): v for k, v in fields.items()})
        return found
    before = attributes()
    os.environ["GLM5_PATCH"] = "1"
    import glm5_patch
    glm5_patch.enable()
    changed = attributes()
    applied = sum(row.state == "applied" for row in glm5_patch.status())
    assert sum(before.get(k) is not v for k, v in changed.items()) >= applied > 0
    glm5_patch.disable()
    after = attributes()
    assert after.keys() == before.keys(), after.keys() ^ before.keys()
    assert all(after[k] is v for k, v in before.items())
    glm5_patch.enable()
    again = attributes()
    assert again.keys() == changed.keys()
    print("identical")
    """
    assert output(code, GLM5_PATCH="0") == "identical"


def test_an_unknown_id_warns_and_is_an_error_when_strict():
    code = "import glm5_patch; glm5_patch.enable()"
    result = python(code, "-W", "always", GLM5_PATCH_DISABLE="gate,nonsense")
    assert result.returncode == 0 and "names 'nonsense', which is not a patch" in result.stderr
    strict = python(code, GLM5_PATCH_DISABLE="nonsense", GLM5_PATCH_STRICT="1")
    assert strict.returncode == 1 and "names 'nonsense', which is not a patch" in strict.stderr


@pytest.mark.parametrize(
    ("switches", "says"),
    [
        ({"GLM5_PATCH_LOG": "loud"}, "GLM5_PATCH_LOG='loud' must be one of"),
        pytest.param(
            {"GLM5_PATCH_STRICT": "1", "GLM5_PATCH_DISABLE": "nonsense"},
            "problem in activation",
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_a_bad_switch_breaks_neither_import_torch_nor_the_patches(expected, switches, says):
    code = f"import torch\n{REPORT}\nprint(json.dumps(report()))"
    result = python(code, "-W", "always", **switches)
    assert json.loads(result.stdout.splitlines()[-1]) == expected
    assert says in result.stderr


def test_a_broken_plugin_never_breaks_import_torch():
    code = "import sys; sys.modules['glm5_patch.patches'] = None; import torch; print('fine')"
    result = python(code)
    assert result.stdout.strip() == "fine"
    assert "glm5-patch: problem in activation: ModuleNotFoundError" in result.stderr


def test_debug_log_says_what_was_applied():
    result = python("import megatron.core.transformer.transformer_block", GLM5_PATCH_LOG="debug")
    assert "glm5_patch DEBUG: gate: applied" in result.stderr


@pytest.mark.nightly  # the workers of torchrun are some too
def test_child_processes_are_patched(expected, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(f"""
import multiprocessing, torch
{REPORT}
def child(queue):
    queue.put(report())
if __name__ == "__main__":
    for method in ("spawn", "fork"):
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        process = context.Process(target=child, args=(queue,))
        process.start()
        print(json.dumps(queue.get(timeout=120)))
        process.join()
""")
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)], capture_output=True, text=True
    )
    assert [*map(json.loads, result.stdout.splitlines())] == [expected] * 2, result.stderr


def test_torchrun_workers_are_patched(expected, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(
        f"import os, torch\n{REPORT}\n"
        f"open(f'{tmp_path}/{{os.environ[\"RANK\"]}}', 'w').write(json.dumps(report()))\n"
    )
    launch = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    result = subprocess.run(
        [*launch, "--nproc-per-node=2", str(script)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    for rank in "01":
        assert json.loads((tmp_path / rank).read_text()) == expected
