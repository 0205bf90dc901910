"""The pytest plugin, in test runs of their own."""

import os
import re
import subprocess
import sys

import pytest

pytest_plugins = ["pytester"]

SPECS = "megatron.core.models.gpt.experimental_attention_variant_module_specs"
TORCH = "import pytest, torch\n"
PRELUDE = f"""
{TORCH}
import {SPECS} as specs

def is_patched():
    function = specs.get_transformer_block_with_experimental_attention_variant_spec
    return function.__globals__["__name__"].startswith("glm5_patch.")
"""


@pytest.fixture
def run(pytester, monkeypatch):
    """pytest with the plugin in a fresh process; whatever this environment has installed."""
    for name in [name for name in os.environ if name.startswith(("GLM5_PATCH", "PYTEST_ADDOPTS"))]:
        monkeypatch.delenv(name)

    def run(tests, *options, prelude=PRELUDE):
        pytester.makepyfile(prelude + tests)
        plugin = () if _is_installed() else ("-p", "glm5_patch.testing.pytest_plugin")
        return pytester.runpytest_subprocess("-W", "ignore", *plugin, *options)

    return run


def _is_installed() -> bool:
    from importlib.metadata import entry_points

    return bool(entry_points(group="pytest11", name="glm5_patch"))


def test_each_test_has_the_patches_that_it_asks_for(run):
    """In one process, whatever the tests before it asked for."""
    result = run(
        """
        import glm5_patch

        def test_as_it_comes(glm5_status):
            assert is_patched() and glm5_status["gate"].state == "applied"

        def test_unpatched(glm5_unpatched):
            assert not is_patched()

        def test_patched(glm5_patched):
            assert is_patched() and glm5_patched["gate"].state == "applied"

        def test_again_as_it_comes():
            assert is_patched()

        @pytest.mark.glm5_patches
        def test_marked():
            assert is_patched()

        @pytest.mark.glm5_patches("gate", "dsa_spec")
        def test_marked_with_two():
            assert is_patched()

        @pytest.mark.glm5_patches("gaet")
        def test_a_typing_error():
            pass

        def test_somebody_switches_off():
            glm5_patch.disable()
            assert not is_patched()

        def test_patched_where_it_was_off(glm5_patched):
            assert is_patched()

        def test_off_again():
            assert not is_patched()
        """.replace("\n        ", "\n"),
        "--strict-markers",
    )
    result.assert_outcomes(passed=9, errors=1)
    result.stdout.fnmatch_lines(["*ValueError: no patch is called*gaet*"])
    assert not re.search("^glm5-patch .*: ", result.stdout.str(), re.M)  # quiet unless asked


def test_off_means_off_and_what_needs_patches_fails_with_the_reason(run):
    result = run(
        """
        def test_nothing_is_patched(glm5_status):
            assert not is_patched() and not glm5_status

        def test_needs_them(glm5_patched):
            pass

        @pytest.mark.glm5_patches("dsa_spec")
        def test_needs_one():
            pass

        def test_still_nothing():
            assert not is_patched()
        """.replace("\n        ", "\n"),
        "--glm5-patch=off",
    )
    result.assert_outcomes(passed=2, errors=2)
    result.stdout.fnmatch_lines(["glm5-patch *: off", "*GLM5PatchError: patch *GLM5_PATCH=0*"])


@pytest.mark.nightly
def test_the_ini_file_sets_the_default_and_the_option_beats_it(run, pytester):
    pytester.makeini("[pytest]\nglm5_patch = off\n")
    tests = "def test_it(glm5_status):\n    assert not glm5_status\n"
    run(tests, prelude=TORCH).assert_outcomes(passed=1)
    tests = "def test_it(glm5_status):\n    assert glm5_status\n"
    run(tests, "--glm5-patch=auto", prelude=TORCH).assert_outcomes(passed=1)
    pytester.makeini("[pytest]\nglm5_patch = loud\n")
    result = run(tests, prelude=TORCH)
    result.stderr.fnmatch_lines(["*glm5_patch='loud' must be one of auto, off, strict*"])


def test_strict_sets_the_switch_for_the_run_and_what_it_starts(run):
    tests = """
import os
import re
def test_it():
    assert os.environ["GLM5_PATCH_STRICT"] == "1"
"""
    run(tests, "--glm5-patch=strict", prelude="").assert_outcomes(passed=1)


@pytest.mark.nightly
def test_it_goes_with_xdist_and_with_warnings_as_errors(run):
    tests = "def test_it(glm5_patched):\n    assert is_patched()\n"
    run(tests, "-n", "1", "-W", "error::pytest.PytestWarning").assert_outcomes(passed=1)


def test_the_oracle_names_the_mistakes_of_a_model(pytester):
    pytester.makepyfile("""
        from transformers import GlmMoeDsaForCausalLM

        def build(directory):
            return GlmMoeDsaForCausalLM.from_pretrained(directory)

        def with_another_scale(directory):
            model = build(directory)
            for layer in model.model.layers:
                layer.self_attn.scaling = model.config.v_head_dim**-0.5
            return model

        def test_right(glm5_oracle):
            glm5_oracle.assert_builds(build)

        def test_right_without_a_function(glm5_oracle):
            glm5_oracle.assert_matches(build(glm5_oracle.checkpoint))

        def test_wrong(glm5_oracle):
            glm5_oracle.assert_builds(with_another_scale)

        def test_wrong_but_allowed(glm5_oracle):
            glm5_oracle.assert_builds(with_another_scale, allow=["softmax_scale_value"])

        def test_a_typing_error(glm5_oracle):
            glm5_oracle.assert_builds(build, allow=["softmax_scale"])
        """)
    plugin = () if _is_installed() else ("-p", "glm5_patch.testing.pytest_plugin")
    result = pytester.runpytest_inprocess("-W", "ignore", *plugin)
    result.assert_outcomes(passed=3, failed=2)
    result.stdout.fnmatch_lines(
        ["E*AssertionError: *softmax_scale_value*", "E*no fault is called 'softmax_scale'*"]
    )


def test_loading_it_imports_neither_torch_nor_wrapt():
    code = (
        "import sys; import glm5_patch.testing.pytest_plugin; "
        "print([m for m in ('torch', 'wrapt', 'megatron', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
