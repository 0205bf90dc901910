"""Learned positions are refused for a GLM-5, and for no other model."""

import pytest
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.transformer.transformer_config import MLATransformerConfig

from glm5_patch.errors import GLM5PatchError


def embedding(kind, **settings):
    config = MLATransformerConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        add_bias_linear=False,
        rope_type="rope",
        use_cpu_initialization=True,
        **settings,
    )
    return LanguageModelEmbedding(config, 32, 64, kind)


@pytest.mark.parametrize("kind", ["rope", "none", "learned_absolute"])
def test_a_table_of_positions_is_refused(world, kind):
    glm5 = dict(experimental_attention_variant="dsa", dsa_is_glm5=True)
    if kind == "learned_absolute":
        with pytest.raises(
            GLM5PatchError, match="position_embedding_type='learned_absolute' .*rope"
        ):
            embedding(kind, **glm5)
    else:
        assert not hasattr(embedding(kind, **glm5), "position_embeddings")


def test_other_models_keep_their_table(world):
    assert embedding("learned_absolute").position_embeddings.weight.shape == (64, 16)
