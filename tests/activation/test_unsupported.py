"""A megatron-core from before experimental attention variants: left alone, and refused by name."""

import importlib.util

import pytest
import torch

import glm5_patch
from glm5_patch.cpu_host import single_process
from glm5_patch.errors import GLM5PatchError

SPECS = "megatron.core.models.gpt.experimental_attention_variant_module_specs"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec(SPECS) is not None, reason="this megatron-core has DSA"
)


def test_require_names_what_is_missing_and_the_release_to_use():
    with pytest.raises(GLM5PatchError, match=f"no module {SPECS}.*use megatron-core 0.16.0 or"):
        glm5_patch.require()


def test_nothing_failed_and_other_models_run():
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    assert "failed" not in {row.state.value for row in glm5_patch.status()}
    with single_process("cpu"):
        config = TransformerConfig(
            num_layers=2, hidden_size=64, num_attention_heads=4, use_cpu_initialization=True
        )
        model = GPTModel(config, get_gpt_layer_local_spec(), 32, 16)
        ids = torch.zeros(1, 8, dtype=torch.long)
        mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).triu(1)
        assert model(ids, ids, mask).shape == (1, 8, 32)
