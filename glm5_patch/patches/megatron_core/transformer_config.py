"""``TransformerConfig``: the settings of GLM-5's indexer."""

from __future__ import annotations

from ...core.host import is_dsa, missing_fields
from ...core.patch import Finding, Patch
from ...errors import ScheduleError


class ConfigFields(Patch):
    id = "config_fields"
    module = "megatron.core.transformer.transformer_config"
    attribute = "TransformerConfig"
    why = "GLM-5's index schedule and indexer settings are unknown to the configuration."
    upstream = "megatron-core 0.19.0 has all fields but dsa_indexer_types"
    remove_when = "TransformerConfig has a per-layer list of indexer types"

    def needed(self, module) -> Finding:
        from ...model.config_fields import GLM5Fields  # here: `import torch` need not pay for it

        missing = missing_fields(module.TransformerConfig, GLM5Fields)
        names = ", ".join(field.name for field in missing)
        return Finding(bool(missing), f"no {names}" if missing else "all fields are there")

    def apply(self, module, seams) -> None:
        from ...core.dataclass_fields import extend_dataclass
        from ...model.config_fields import GLM5Fields

        config_class = module.TransformerConfig
        extend_dataclass(config_class, missing_fields(config_class, GLM5Fields), seams)
        seams.wrap(config_class, "__post_init__", _post_init)


def _post_init(wrapped, instance, args, kwargs):
    from ...model.config_fields import ALIASES
    from ...model.schedule import IndexSchedule

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
