"""``TransformerConfig``: the settings of GLM-5's indexer, by megatron-core 0.19's names."""

from __future__ import annotations

from dataclasses import dataclass

from ...core.dataclass_fields import extend_dataclass
from ...core.host import is_dsa, missing_fields
from ...core.patch import Finding, Patch
from ...errors import ScheduleError
from ...model.schedule import MEGATRON_DEFAULT_OFFSET, IndexSchedule


@dataclass
class GLM5Fields:
    """The fields, with GLM-5's values as defaults; a host that has one keeps its own default."""

    dsa_indexer_topk_freq: int = 1
    """Every freq-th layer computes its top-k, the others reuse it."""
    dsa_indexer_skip_topk_offset: int = MEGATRON_DEFAULT_OFFSET
    """The first layers, that many but at least one, all compute."""
    dsa_indexer_types: list[str] | str | None = None
    """'full' or 'shared' for each layer, or a string of F and S; beats freq and offset."""
    dsa_indexer_rope_interleaved: bool = True
    """The indexer's rope pairs (0, 1), (2, 3), ... and not the two halves."""
    dsa_indexer_rotate_activation: bool = False
    """Hadamard rotation of the indexer's query and key, as in DeepSeek-V3.2."""
    dsa_indexer_k_norm_epsilon: float | None = 1e-6
    """Epsilon of the indexer's k_norm; None: layernorm_epsilon."""
    mla_latent_norm_epsilon: float | None = None
    """Epsilon of the norms of the query and key-value latents; None: layernorm_epsilon, as every
    trainer and serving engine has it. Hugging Face's model has 1e-6 there, whatever its config."""
    dsa_index_topk_freq: int | None = None
    """Another spelling of dsa_indexer_topk_freq."""
    dsa_index_skip_topk_offset: int | None = None
    """Another spelling of dsa_indexer_skip_topk_offset."""


ALIASES = {
    "dsa_index_topk_freq": "dsa_indexer_topk_freq",
    "dsa_index_skip_topk_offset": "dsa_indexer_skip_topk_offset",
}


class ConfigFields(Patch):
    id = "config_fields"
    module = "megatron.core.transformer.transformer_config"
    attribute = "TransformerConfig"
    why = "GLM-5's index schedule and indexer settings are unknown to the configuration."
    upstream = "megatron-core 0.19.0 has all fields but dsa_indexer_types"
    remove_when = "TransformerConfig has a per-layer list of indexer types"

    def needed(self, module) -> Finding:
        missing = missing_fields(module.TransformerConfig, GLM5Fields)
        names = ", ".join(field.name for field in missing)
        return Finding(bool(missing), f"no {names}" if missing else "all fields are there")

    def apply(self, module, seams) -> None:
        config_class = module.TransformerConfig
        extend_dataclass(config_class, missing_fields(config_class, GLM5Fields), seams)
        seams.wrap(config_class, "__post_init__", _post_init)


def _post_init(wrapped, instance, args, kwargs):
    for alias, name in ALIASES.items():
        _fold(instance, alias, name)
    if is_dsa(instance):
        IndexSchedule.from_megatron(instance)
    return wrapped(*args, **kwargs)


def _fold(config, alias: str, name: str) -> None:
    value = getattr(config, alias)
    if value is None:
        return
    default = getattr(type(config), name)
    if getattr(config, name) not in (default, value):
        raise ScheduleError(
            f"{alias}={value} and {name}={getattr(config, name)} disagree; give one of them"
        )
    setattr(config, name, value)
    setattr(config, alias, None)
