"""``TransformerConfig``: the settings of GLM-5's indexer."""

from __future__ import annotations

import warnings

from ....config.fields import (
    ALIASES,
    CONTEXT_PARALLEL_ORDERS,
    CONVENTIONS,
    FP8,
    INDEXER_PRECISIONS,
    LOSS_LAYERS,
    LOSS_LAYERS_OF,
    NO_PHASE,
    OFFLOAD,
    PHASE,
    REPLAY,
    ZIGZAG,
    GLM5Fields,
    attends_to_every_key,
    has_glm5_settings,
    is_dsa,
    is_glm5,
    on_off_flags,
    recomputes_attention,
    set_conventions,
    unlike_glm5,
    why_not_phase,
)
from ....errors import GLM5PatchError, ScheduleError
from ....patching.patch import Finding, Patch
from ...probes.megatron_core import (
    missing_fields,
    one_sided_flags,
    refuses_context_parallel,
    refuses_dsa,
)


class ConfigFields(Patch):
    id = "config_fields"
    module = "megatron.core.transformer.transformer_config"
    attribute = "TransformerConfig"
    why = "TransformerConfig has no fields for GLM-5's index schedule and indexer settings."
    upstream = "megatron-core 0.19.0 has the indexer's fields, but no dsa_indexer_types"
    remove_when = "TransformerConfig has a per-layer list of indexer types"

    def needed(self, module) -> Finding:
        missing = missing_fields(module.TransformerConfig, GLM5Fields)
        names = ", ".join(field.name for field in missing)
        return Finding(bool(missing), f"no {names}" if missing else "all fields are there")

    def apply(self, module, seams) -> None:
        from ....patching.dataclass_fields import described_anew, extend_dataclass

        config_class = module.TransformerConfig
        both_ways = [
            described_anew(field, argparse_meta=on_off_flags(field.name))
            for field in one_sided_flags(config_class)
        ]
        extend_dataclass(
            config_class, missing_fields(config_class, GLM5Fields), seams, instead=both_ways
        )
        seams.wrap(config_class, "__post_init__", _post_init)


def _post_init(wrapped, instance, args, kwargs):
    _mark(instance)
    if not is_glm5(instance):
        return wrapped(*args, **kwargs)
    _settle_schedule(instance)
    set_conventions(instance)
    _validate(instance)
    _warn_of_other_conventions(instance)
    if instance.context_parallel_size > 1 and refuses_context_parallel():
        return _without_context_parallel(wrapped, instance)
    return wrapped(*args, **kwargs)


def is_meant_as_glm5(config) -> bool:
    """Whether a configuration, or a command line, that nobody has validated is a GLM-5's."""
    marked = getattr(config, "dsa_is_glm5", None)
    if not is_dsa(config) or marked is not None:
        return is_dsa(config) and marked
    return has_glm5_settings(config) or refuses_dsa()


def _mark(config) -> None:
    """Write down that a DSA model is a GLM-5, so that its copies with other settings are too."""
    if config.dsa_is_glm5 is None and is_meant_as_glm5(config):
        config.dsa_is_glm5 = True


def _settle_schedule(config) -> None:
    """Make the list of types, freq and offset, and their other spellings say the same.

    A list beats freq and offset, and sets them where they can express it, because other code asks
    whether ``dsa_indexer_topk_freq > 1``. The other spellings then hold a copy of the two, by which
    a ``dataclasses.replace`` shows whether the list or the numbers were changed.
    """
    from ....config.schedule import MEGATRON_DEFAULT_OFFSET, IndexSchedule

    if config.dsa_indexer_types is None:
        for alias, name in ALIASES.items():
            _fold(config, alias, name)
        return
    unset = (1, MEGATRON_DEFAULT_OFFSET)
    numbers = (config.dsa_indexer_topk_freq, config.dsa_indexer_skip_topk_offset)
    copy = (config.dsa_index_topk_freq, config.dsa_index_skip_topk_offset)
    schedule = IndexSchedule.from_megatron(config)
    expressed = schedule.freq_and_offset
    if copy == expressed and numbers not in (copy, unset):
        config.dsa_indexer_types = None
        config.dsa_index_topk_freq = config.dsa_index_skip_topk_offset = None
        return
    if numbers == unset:
        numbers = tuple(u if c is None else c for c, u in zip(copy, unset))
    if numbers not in (copy, unset):
        _warn_if_beaten(schedule, *numbers)
    config.dsa_indexer_types = list(schedule.types)
    config.dsa_indexer_topk_freq, config.dsa_indexer_skip_topk_offset = expressed or unset
    config.dsa_index_topk_freq, config.dsa_index_skip_topk_offset = expressed or (None, None)


def _warn_if_beaten(schedule, freq: int, offset: int) -> None:
    if type(schedule).from_freq(schedule.num_layers, freq, offset) != schedule:
        warnings.warn(
            f"dsa_indexer_types and dsa_indexer_topk_freq={freq} with "
            f"dsa_indexer_skip_topk_offset={offset} name different layers; dsa_indexer_types is "
            "taken. Give one of them, or dsa_indexer_types=None",
            stacklevel=2,
        )


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


def _validate(config) -> None:
    from ....config.schedule import IndexSchedule

    IndexSchedule.from_megatron(config)
    _refuse_scaled_rope(config)
    _refuse_layers_run_singly(config)
    _check_precision(config)
    _check_loss_layers(config)
    _check_phase(config)
    _check_offload(config)
    order = config.dsa_context_parallel_order
    if order not in CONTEXT_PARALLEL_ORDERS:
        raise GLM5PatchError(
            f"dsa_context_parallel_order={order!r} must be one of "
            f"{', '.join(CONTEXT_PARALLEL_ORDERS)}"
        )
    if order == ZIGZAG or config.context_parallel_size == 1:
        return
    zigzag = f"cut the batch in zigzag order and set dsa_context_parallel_order={ZIGZAG!r}"
    if config.mtp_num_layers:
        raise GLM5PatchError(
            f"dsa_context_parallel_order={order!r} with mtp_num_layers={config.mtp_num_layers}: "
            f"megatron-core shifts the labels of multi-token prediction in zigzag order; {zigzag}"
        )


def _check_precision(config) -> None:
    precision, dim = config.dsa_indexer_precision, config.dsa_indexer_head_dim
    if precision not in INDEXER_PRECISIONS:
        raise GLM5PatchError(
            f"dsa_indexer_precision={precision!r} must be one of {', '.join(INDEXER_PRECISIONS)}"
        )
    if precision == FP8 and (not dim or dim & (dim - 1)):
        raise GLM5PatchError(
            f"dsa_indexer_precision={FP8!r} with dsa_indexer_head_dim={dim}: its Hadamard rotation "
            "needs a power of two; set dsa_indexer_precision='model'"
        )


def _check_loss_layers(config) -> None:
    if config.dsa_indexer_loss_layers not in LOSS_LAYERS_OF:
        raise GLM5PatchError(
            f"{LOSS_LAYERS}={config.dsa_indexer_loss_layers!r} must be one of "
            f"{', '.join(LOSS_LAYERS_OF)}"
        )


def _check_phase(config) -> None:
    if config.dsa_training_phase == NO_PHASE:
        return
    reason = why_not_phase(config.dsa_training_phase, config.dsa_indexer_loss_coeff)
    if reason:
        raise GLM5PatchError(f"{PHASE}={reason}")
    if attends_to_every_key(config) and config.dsa_topk_replay:
        raise GLM5PatchError(
            f"{REPLAY}=True with {PHASE}={config.dsa_training_phase!r}: a dense warm-up selects no "
            f"keys; set {REPLAY}=False"
        )


def _check_offload(config) -> None:
    if not config.dsa_topk_offload:
        return
    if attends_to_every_key(config):
        raise GLM5PatchError(
            f"{OFFLOAD}=True with {PHASE}={config.dsa_training_phase!r}: a dense warm-up selects "
            f"no keys, so there is nothing to offload; set {OFFLOAD}=False"
        )
    if not recomputes_attention(config):
        raise GLM5PatchError(
            f"{OFFLOAD}=True with recompute_granularity={config.recompute_granularity!r} and "
            f"recompute_modules={config.recompute_modules}: no top-k is kept for a recompute of "
            f"its layer, so there is nothing to offload; set {OFFLOAD}=False, or "
            "recompute_granularity='full'"
        )


def _refuse_layers_run_singly(config) -> None:
    """A schedule that runs layers one by one calls no stack, which takes and sends the top-k."""
    overlaps = getattr(config, "overlap_moe_expert_parallel_comm", False)
    if overlaps and config.dsa_topk_across_stages and config.pipeline_model_parallel_size > 1:
        raise GLM5PatchError(
            "dsa_topk_across_stages=True with overlap_moe_expert_parallel_comm=True: that schedule "
            "runs layers apart from their stage, which takes and sends the top-k; set one of them "
            "to False"
        )


def _refuse_scaled_rope(config) -> None:
    """YaRN is the default of ``MLATransformerConfig``; with a factor of 1 it changes nothing."""
    kind = getattr(config, "rope_type", "rope")
    if kind == "rope" or config.rotary_scaling_factor == 1:
        return
    message = (
        f"rope_type={kind!r} with rotary_scaling_factor={config.rotary_scaling_factor}: GLM-5's "
        'rope is not scaled, and every position is rotated wrongly; set rope_type="rope" '
        "(--rope-type rope)"
    )
    if not config.dsa_indexer_rotate_activation:
        raise GLM5PatchError(message)
    # With a Hadamard rotation it may well be a DeepSeek-V3.2, which has YaRN.
    warnings.warn(message, stacklevel=2)


def _warn_of_other_conventions(config) -> None:
    for name, value in unlike_glm5(config).items():
        warnings.warn(
            f"{name}={value}, but every GLM-5 has {CONVENTIONS[name]}: with {value} a layer "
            f"selects other keys. Set {name}={CONVENTIONS[name]}, unless the model is another",
            stacklevel=2,
        )


def _without_context_parallel(post_init, config) -> None:
    """The host's own validation, but for its refusal of DSA with context parallelism.

    Raises:
        GLM5PatchError: keys that go round in a ring or between the heads can't be selected from.
    """
    size = config.context_parallel_size
    kinds = config.cp_comm_type
    for kind in kinds if isinstance(kinds, list) else [kinds]:
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
