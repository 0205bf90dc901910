"""``LanguageModelEmbedding.__init__``: no table of positions beside GLM-5's rotary ones."""

from __future__ import annotations

from ....config.fields import is_glm5
from ....errors import GLM5PatchError
from ....patching.patch import Finding, Patch, argument

ADDS_A_TABLE = "learned_absolute"
"""GPTModel's other types add nothing here: MLA rotates by itself."""


class PositionTable(Patch):
    id = "position_table"
    module = "megatron.core.models.common.embeddings.language_model_embedding"
    attribute = "LanguageModelEmbedding.__init__"
    why = "position_embedding_type='learned_absolute' adds a random table that GLM-5 does not have."
    upstream = "none"
    remove_when = "GPTModel refuses learned positions beside multi-latent attention"

    def needed(self, module) -> Finding:
        return Finding(True, "the host adds a table of positions to any model")

    def apply(self, module, seams) -> None:
        seams.wrap(
            module.LanguageModelEmbedding,
            "__init__",
            _init,
            reads=("config", "position_embedding_type"),
        )


def _init(wrapped, instance, args, kwargs):
    kind = argument(wrapped, args, kwargs, "position_embedding_type")
    if kind == ADDS_A_TABLE and is_glm5(argument(wrapped, args, kwargs, "config")):
        raise GLM5PatchError(
            f"position_embedding_type={kind!r} adds a table of positions that GLM-5 does not have; "
            "set it to 'rope' or 'none' (--position-embedding-type rope)"
        )
    return wrapped(*args, **kwargs)
