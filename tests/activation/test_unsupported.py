"""A megatron-core from before experimental attention variants: left alone, and refused by name."""

import importlib.util
import subprocess
import sys

import pytest
import torch  # noqa: F401  loads the plugin

import glm5_patch
from glm5_patch.errors import GLM5PatchError
from glm5_patch.testing.cpu_host import single_process
from tests.activation import other_model

SPECS = "megatron.core.models.gpt.experimental_attention_variant_module_specs"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec(SPECS) is not None, reason="this megatron-core has DSA"
)


def test_require_names_what_is_missing_and_the_release_to_use():
    with pytest.raises(GLM5PatchError, match=f"no module {SPECS}.*use megatron-core 0.16.0 or"):
        glm5_patch.require()


def test_nothing_failed_and_other_models_run():
    from megatron.core.transformer.transformer_config import TransformerConfig

    assert "failed" not in {row.state.value for row in glm5_patch.status()}
    with single_process("cpu"):
        assert other_model.output_shape(TransformerConfig) == [1, 8, 32]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["status"], "not installed"),
        (["status", "--import"], f"has no module {SPECS}"),
        (["doctor", "--json"], "use megatron-core 0.16.0 or later"),
        (["verify"], f"has no module {SPECS}"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_every_command_says_so(arguments, says):
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "glm5_patch", *arguments],
        capture_output=True,
        text=True,
    )
    assert says in result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    # A release in a folder before the environment's own is a second core on the path, so status
    # may find that wrong too.
    assert result.returncode in {"status": (0, 1), "verify": (2,)}.get(" ".join(arguments), (1,))
