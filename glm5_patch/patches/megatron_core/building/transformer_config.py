"""``TransformerConfig``: the settings of GLM-5's indexer."""

from __future__ import annotations

from ....config.fields import is_dsa
from ....errors import GLM5PatchError, ScheduleError
from ....patching.patch import Finding, Patch
from ...probes.megatron_core import missing_fields, refuses_context_parallel


class ConfigFields(Patch):
    id = "config_fields"
    module = "megatron.core.transformer.transformer_config"
    attribute = "TransformerConfig"
    why = "GLM-5's index schedule and indexer settings are unknown to the configuration."
    upstream = "megatron-core 0.19.0 has all fields but dsa_indexer_types"
    remove_when = "TransformerConfig has a per-layer list of indexer types"

    def needed(self, module) -> Finding:
        from ....config.fields import GLM5Fields  # here: `import torch` need not pay for it

        missing = missing_fields(module.TransformerConfig, GLM5Fields)
        names = ", ".join(field.name for field in missing)
        return Finding(bool(missing), f"no {names}" if missing else "all fields are there")

    def apply(self, module, seams) -> None:
        from ....config.fields import GLM5Fields
        from ....patching.dataclass_fields import extend_dataclass

        config_class = module.TransformerConfig
        refuses = refuses_context_parallel(module.MLATransformerConfig)
        extend_dataclass(config_class, missing_fields(config_class, GLM5Fields), seams)

        def post_init(wrapped, instance, args, kwargs):
            _fold_aliases(instance)
            if not is_dsa(instance):
                return wrapped(*args, **kwargs)
            _validate(instance, only_zigzag=not refuses)
            return _without_context_parallel(wrapped, instance) if refuses else wrapped()

        seams.wrap(config_class, "__post_init__", post_init)


def _fold_aliases(config) -> None:
    from ....config.fields import ALIASES

    for alias, name in ALIASES.items():
        _fold(config, alias, name)


def _validate(config, only_zigzag: bool) -> None:
    from ....config.fields import CONTEXT_PARALLEL_ORDERS, ZIGZAG
    from ....config.schedule import IndexSchedule

    IndexSchedule.from_megatron(config)
    order = config.dsa_context_parallel_order
    if order not in CONTEXT_PARALLEL_ORDERS:
        raise GLM5PatchError(
            f"dsa_context_parallel_order={order!r} is none of {', '.join(CONTEXT_PARALLEL_ORDERS)}"
        )
    if order == ZIGZAG or config.context_parallel_size == 1:
        return
    zigzag = f"cut the batch in zigzag order and set dsa_context_parallel_order={ZIGZAG!r}"
    if only_zigzag:
        raise GLM5PatchError(
            f"dsa_context_parallel_order={order!r}: this megatron-core's own sparse attention "
            f"knows its zigzag order alone; {zigzag}"
        )
    if config.mtp_num_layers:
        raise GLM5PatchError(
            f"dsa_context_parallel_order={order!r} with mtp_num_layers={config.mtp_num_layers}: "
            f"megatron-core shifts the labels of multi-token prediction in zigzag order; {zigzag}"
        )


def _without_context_parallel(post_init, config) -> None:
    """The host's own validation, but for its refusal of DSA with context parallelism.

    Raises:
        GLM5PatchError: keys that go round in a ring or between the heads can't be selected from.
    """
    size = config.context_parallel_size
    kinds = config.cp_comm_type
    for kind in (kinds if isinstance(kinds, list) else [kinds]) if size > 1 else []:
        if (kind or "p2p").replace("_", "").lower() != "allgather":
            raise GLM5PatchError(
                f"cp_comm_type={kinds!r} with context_parallel_size={size}: sparse attention needs "
                'the keys of all ranks; set cp_comm_type="allgather"'
            )
    config.context_parallel_size = 1
    try:
        post_init()
    finally:
        config.context_parallel_size = size


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
