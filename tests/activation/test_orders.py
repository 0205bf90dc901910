"""Every order of importing torch, a host and this package, each in a fresh process."""

import os
import subprocess
import sys
import textwrap

import pytest

SPECS = "megatron.core.models.gpt.experimental_attention_variant_module_specs"
HF = "transformers.models.glm_moe_dsa.configuration_glm_moe_dsa"
STATE = """
import glm5_patch
row = glm5_patch.status()["dsa_spec"]
print(row.state.value, row.late)
"""


def python(code, *options, **env):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GLM5_PATCH")}
    return subprocess.run(
        [sys.executable, "-W", "ignore", *options, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**environment, **env},
    )


def output(code, **env):
    result = python(code, **env)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize(
    ("first", "state"),
    [
        ("import torch", "armed False"),
        (f"import torch; import {SPECS}", "applied False"),
        (f"import {SPECS}", "applied False"),
        (f"from {SPECS} import get_experimental_attention_variant_module_spec", "applied False"),
        (f"import glm5_patch.auto; import {SPECS}", "applied False"),
        ("import transformers; from transformers import GlmMoeDsaConfig", "armed False"),
        (
            f"import glm5_patch; glm5_patch.enable(); import {SPECS}; glm5_patch.enable()",
            "applied False",
        ),
    ],
)
def test_import_orders(first, state):
    assert output(f"{first}\n{STATE}") == state


def test_a_loaded_host_is_patched_late_and_its_aliases_follow():
    code = f"""
    import {SPECS} as specs
    from {SPECS} import get_experimental_attention_variant_module_spec as alias
    kept = [alias]  # a name would be rebound too
    import glm5_patch.auto
    assert alias is specs.get_experimental_attention_variant_module_spec is not kept[0]
    glm5_patch.disable()
    assert alias is specs.get_experimental_attention_variant_module_spec is kept[0]
    glm5_patch.enable()
    row = glm5_patch.status()["dsa_spec"]
    print(row.state.value, row.late)
    """
    assert output(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0") == "applied True"


@pytest.mark.parametrize("target", [HF, "megatron.core.tensor_parallel.random"])
def test_a_half_imported_target_is_patched_when_it_is_whole(target):
    """The target imports torch, which arms the plugin, in the middle of its own import."""
    patch = "hf_config_values" if target == HF else "checkpoint_recompute"
    code = f"""
    import {target}
    import glm5_patch
    print(glm5_patch.status()["{patch}"].state.value)
    """
    assert output(code) in ("applied", "not_needed")


FAKE_HOST = """
import sys
import torch
sys.modules[__name__].half = True
{end}
def function(): return 1
"""
FAKE_PATCH = """
import sys, glm5_patch.patches as table
from glm5_patch.core.patch import Finding, Patch
class Fake(Patch):
    id, module, attribute = "fake", "fake_host", "function"
    why = upstream = remove_when = "."
    def needed(self, module): return Finding(True, "fake")
    def apply(self, module, seams):
        seams.wrap(module, "function", lambda wrapped, i, a, k: wrapped() + 1)
table.PATCHES = (Fake(),)
"""


def test_a_half_imported_module_that_fails_is_patched_on_its_next_import(tmp_path):
    host = tmp_path / "fake_host.py"
    host.write_text(FAKE_HOST.format(end="if not hasattr(sys, 'again'): raise OSError('broken')"))
    code = FAKE_PATCH + textwrap.dedent("""
    try:
        import fake_host
    except OSError:
        pass
    import glm5_patch
    assert "fake_host" not in sys.modules
    assert glm5_patch.status()["fake"].state == "armed", glm5_patch.status()
    sys.again = True
    import fake_host
    print(fake_host.function(), glm5_patch.status()["fake"].state.value)
    """)
    assert output(code, PYTHONPATH=str(tmp_path)) == "2 applied"


def test_a_reloaded_host_is_noticed_and_patched_again(tmp_path):
    (tmp_path / "fake_host.py").write_text(FAKE_HOST.format(end=""))
    code = FAKE_PATCH + textwrap.dedent("""
    import fake_host, glm5_patch, importlib
    assert fake_host.function() == 2
    importlib.reload(fake_host)
    try:
        glm5_patch.core.hooks.raise_unless_in_place(table.PATCHES)
    except glm5_patch.errors.GLM5PatchError as error:
        print("function was replaced after patching" in str(error))
    glm5_patch.enable()
    print(fake_host.function())
    """)
    assert output(code, PYTHONPATH=str(tmp_path)).split() in (["True", "2"], ["2"])


def test_switched_off_nothing_is_armed_and_the_host_refuses_as_ever():
    code = f"""
    import sys, torch
    assert not any(m.startswith(("glm5_patch.core", "wrapt")) for m in sys.modules)
    import {SPECS} as specs
    from types import SimpleNamespace
    try:
        specs.get_experimental_attention_variant_module_spec(
            config=SimpleNamespace(experimental_attention_variant="dsa"), backend=object())
    except ValueError as error:
        print(error)
    import glm5_patch
    print({{row.state.value for row in glm5_patch.status()}}, bool(glm5_patch.status()))
    """
    assert output(code, GLM5_PATCH="0").splitlines() == [
        "Invalid experimental attention variant: dsa",
        "{'disabled'} False",
    ]


def test_disable_puts_back_every_identical_object_of_every_host():
    code = """
    import sys, os, importlib
    import torch
    from glm5_patch.patches import PATCHES
    names = sorted({p.module for p in PATCHES})
    modules = [importlib.import_module(name) for name in names]
    def attributes():
        found = {}
        for module in modules:
            for name, value in vars(module).items():
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
    assert sum(before.get(k) is not v for k, v in changed.items()) > 20
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
    assert result.returncode == 0 and "unknown patches ['nonsense']" in result.stderr
    strict = python(code, GLM5_PATCH_DISABLE="nonsense", GLM5_PATCH_STRICT="1")
    assert strict.returncode == 1 and "unknown patches ['nonsense']" in strict.stderr


@pytest.mark.parametrize(
    ("switches", "says"),
    [
        ({"GLM5_PATCH_LOG": "loud"}, "GLM5_PATCH_LOG='loud' is no logging level"),
        ({"GLM5_PATCH_STRICT": "1", "GLM5_PATCH_DISABLE": "nonsense"}, "problem in activation"),
    ],
)
def test_a_bad_switch_breaks_neither_import_torch_nor_the_patches(switches, says):
    result = python(f"import torch, {SPECS}\n{STATE}", "-W", "always", **switches)
    assert result.stdout.strip() == "applied False"
    assert says in result.stderr


def test_a_broken_plugin_never_breaks_import_torch():
    code = "import sys; sys.modules['glm5_patch.patches'] = None; import torch; print('fine')"
    result = python(code)
    assert result.stdout.strip() == "fine"
    assert "glm5-patch: problem in activation: ModuleNotFoundError" in result.stderr


def test_debug_log_says_what_was_applied():
    result = python(f"import {SPECS}", GLM5_PATCH_LOG="debug")
    assert "glm5_patch DEBUG: dsa_spec: applied" in result.stderr


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_child_processes_are_patched(method, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(f"""
        import multiprocessing, torch
        def child(queue):
            import {SPECS}, glm5_patch
            queue.put(glm5_patch.status()["dsa_spec"].state.value)
        if __name__ == "__main__":
            context = multiprocessing.get_context("{method}")
            queue = context.Queue()
            process = context.Process(target=child, args=(queue,))
            process.start()
            print(queue.get(timeout=60))
            process.join()
    """)
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)], capture_output=True, text=True
    )
    assert result.stdout.strip() == "applied", result.stderr


def test_torchrun_workers_are_patched(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(
        f"import {SPECS}, glm5_patch, torch\n"
        "print('state', glm5_patch.status()['dsa_spec'].state.value)\n"
    )
    result = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "torch.distributed.run",
            "--nproc-per-node=2",
            "--master-addr=127.0.0.1",
            "--master-port=29617",
            str(script),
        ],
        capture_output=True,
        text=True,
    )
    assert result.stdout.count("state applied") == 2, result.stderr
