"""A megatron-core from before experimental attention variants: left alone, and refused by name."""

import importlib.util

import pytest
import torch  # noqa: F401  loads the plugin

import glm5_patch
from glm5_patch.cpu_host import single_process
from glm5_patch.errors import GLM5PatchError
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
