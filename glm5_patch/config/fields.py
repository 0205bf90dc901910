"""GLM-5's settings in ``TransformerConfig``, with megatron-core 0.19's names."""

# No `from __future__ import annotations`: argument builders read the types of the fields, which
# must be types and not strings.

import argparse
from dataclasses import dataclass, field
from typing import Any, Literal

from .schedule import MEGATRON_DEFAULT_OFFSET

ZIGZAG, CONTIGUOUS = CONTEXT_PARALLEL_ORDERS = ("zigzag", "contiguous")
"""Which tokens a rank of context parallelism holds. zigzag is megatron-core's own: the whole, or in
a pack each document, is cut into ``2 * size`` chunks, and rank r holds chunk r and chunk
``2 * size - 1 - r``, so that all ranks see equally many keys. contiguous: rank r holds the r-th of
``size`` equal parts of the whole, wherever documents end."""


ACROSS_STAGES = "dsa_topk_across_stages"
"""The name of the switch that lets a pipeline stage start on a skip layer."""


REPLAY = "dsa_topk_replay"
"""The name of the switch that refuses forwards without recordings."""


OFFLOAD = "dsa_topk_offload"
"""The name of the switch that lets top-k wait for their backward in host memory."""


LOSS_LAYERS = "dsa_indexer_loss_layers"
SOURCE, SERVED = LOSS_LAYERS_OF = ("source", "served")
"""Whose attention an indexer learns from: its own layer's, or that of every layer that uses its
top-k."""


PHASE = "dsa_training_phase"
DENSE_WARMUP, INDEXER_WARMUP, JOINT, FROZEN_INDEXER = PHASES = (
    "dense_warmup",
    "indexer_warmup",
    "joint",
    "frozen_indexer",
)
"""What trains, in the order of a training from dense attention; see ``set_phase``."""
NO_PHASE = "none"
"""Whatever requires a gradient trains."""


FP8 = "fp8"
INDEXER_PRECISIONS = ("model", FP8)
"""Precision of the index scores: the model's own dtype, or as servers compute them."""


class OnOff(argparse.Action):
    """A flag that is True as ``--x`` and False as ``--no-x`` or ``--disable-x``."""

    def __init__(self, option_strings, dest, default=None, help=None):
        super().__init__(option_strings, dest, nargs=0, default=default, help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, not option_string.startswith(("--no-", "--disable-")))


def on_off_flags(name: str) -> dict[str, Any]:
    """What megatron-core's argument builder must know of a boolean field to make it an ``OnOff``.

    By itself the builder makes ``--x`` of a field that is False by default, and ``--no-x`` and
    ``--disable-x`` of one that is True; a launch script would fit one release only.
    """
    flag = name.replace("_", "-")
    return {"arg_names": [f"--{flag}", f"--no-{flag}", f"--disable-{flag}"], "action": OnOff}


def _setting(default: Any, help: str, **argparse_meta: Any) -> Any:
    metadata = {"argparse_meta": {"help": help, **argparse_meta}}
    return field(default=default, kw_only=True, metadata=metadata)


def _switch(name: str, help: str) -> Any:
    return _setting(None, help, **on_off_flags(name))


@dataclass
class GLM5Fields:
    """The fields; a host that has one keeps its own default.

    A switch is None while nobody has set it; ``set_conventions`` then makes it GLM-5's.
    """

    dsa_is_glm5: bool | None = _switch(
        "dsa_is_glm5",
        "Whether a DSA model is a GLM-5. By default its other settings decide; see is_glm5.",
    )
    dsa_indexer_topk_freq: int = _setting(
        1, "Every freq-th layer computes its top-k, the others reuse it."
    )
    dsa_indexer_skip_topk_offset: int = _setting(
        MEGATRON_DEFAULT_OFFSET, "The first layers, this many and at least one, all compute."
    )
    dsa_indexer_types: list[str] | None = _setting(
        None,
        "'full' or 'shared' for each layer, or a string of F and S; beats freq and offset.",
    )
    dsa_indexer_rope_interleaved: bool | None = _switch(
        "dsa_indexer_rope_interleaved",
        "The indexer's rope pairs (0, 1), (2, 3), ... and not the two halves. GLM-5: True.",
    )
    dsa_indexer_rotate_activation: bool | None = _switch(
        "dsa_indexer_rotate_activation",
        "Hadamard rotation of the indexer's query and key, as in DeepSeek-V3.2. GLM-5: False.",
    )
    dsa_indexer_k_norm_epsilon: float | None = _setting(
        1e-6, "Epsilon of the indexer's k_norm; None: layernorm_epsilon."
    )
    dsa_indexer_share_for_mtp_iteration: bool | None = _switch(
        "dsa_indexer_share_for_mtp_iteration",
        "With mtp_use_repeated_layer: the iterations of the MTP layer share the first one's top-k. "
        "By default each computes its own.",
    )
    dsa_context_parallel_order: Literal["zigzag", "contiguous"] = _setting(
        ZIGZAG, "How the batch was cut for context parallelism."
    )
    dsa_topk_across_stages: bool = _setting(
        False,
        "A pipeline stage may start on a skip layer: the stage before sends the top-k.",
        **on_off_flags(ACROSS_STAGES),
    )
    dsa_indexer_precision: Literal["model", "fp8"] = _setting(
        "model",
        "Precision of the index scores: the model's dtype, or fp8 as sglang and vLLM serve GLM-5.",
    )
    dsa_indexer_loss_layers: Literal["source", "served"] = _setting(
        SOURCE,
        "The attention that an indexer learns from: its own layer's (source), or the mean of all "
        "layers that use its top-k (served).",
    )
    dsa_training_phase: Literal[
        "none", "dense_warmup", "indexer_warmup", "joint", "frozen_indexer"
    ] = _setting(
        NO_PHASE,
        "What trains: the indexers alone (dense_warmup, indexer_warmup), everything (joint), or "
        "everything else (frozen_indexer). Set when the model is wrapped for data parallelism.",
    )
    dsa_topk_replay: bool = _setting(
        False,
        "Every forward must replay recorded keys (replay_topk); one without recordings is an "
        "error.",
        **on_off_flags(REPLAY),
    )
    dsa_topk_offload: bool = _setting(
        False,
        "Under recompute, the top-k of computing layers wait for their backward in pinned host "
        "memory.",
        **on_off_flags(OFFLOAD),
    )
    dsa_index_topk_freq: int | None = _setting(None, "Another spelling of dsa_indexer_topk_freq.")
    dsa_index_skip_topk_offset: int | None = _setting(
        None, "Another spelling of dsa_indexer_skip_topk_offset."
    )


ALIASES = {
    "dsa_index_topk_freq": "dsa_indexer_topk_freq",
    "dsa_index_skip_topk_offset": "dsa_indexer_skip_topk_offset",
}

CONVENTIONS = {
    "dsa_indexer_rope_interleaved": True,
    "dsa_indexer_rotate_activation": False,
    "dsa_indexer_k_norm_epsilon": 1e-6,
    "dsa_indexer_scoring_relu": True,
}
"""The conventions of every GLM-5's index scores. megatron-core's defaults differ."""

# A value other than these is a setting of GLM-5's: by default no other model has it. k_norm's
# epsilon is not among them, because DeepSeek-V3.2's is GLM-5's.
_OF_OTHER_MODELS = {
    "dsa_indexer_topk_freq": (None, 1),
    "dsa_index_topk_freq": (None, 1),
    "dsa_indexer_skip_topk_offset": (None, MEGATRON_DEFAULT_OFFSET),
    "dsa_index_skip_topk_offset": (None, MEGATRON_DEFAULT_OFFSET),
    "dsa_indexer_types": (None,),
    "dsa_indexer_rope_interleaved": (None, False),
    "dsa_indexer_rotate_activation": (None, True),
    "dsa_indexer_share_for_mtp_iteration": (None, False),
    "dsa_context_parallel_order": (None, ZIGZAG),
    ACROSS_STAGES: (None, False),
    REPLAY: (None, False),
    OFFLOAD: (None, False),
    "dsa_indexer_precision": (None, "model"),
    LOSS_LAYERS: (None, SOURCE),
    PHASE: (None, NO_PHASE),
}


def is_dsa(config: Any) -> bool:
    """Whether a Megatron configuration asks for DeepSeek sparse attention."""
    return getattr(config, "experimental_attention_variant", None) == "dsa"


def is_glm5(config: Any) -> bool:
    """Whether a Megatron configuration is a GLM-5, which this package builds.

    DeepSeek-V3.2 also sets ``experimental_attention_variant="dsa"``. A DSA model is a GLM-5

    - if ``dsa_is_glm5`` is True; if it is False, the model is another one;
    - if ``dsa_is_glm5`` is None and it has a setting of GLM-5's: index sharing
      (``dsa_indexer_types``, or a ``dsa_indexer_topk_freq`` above 1, or an offset),
      ``dsa_indexer_rope_interleaved=True``, ``dsa_indexer_rotate_activation=False``,
      ``dsa_context_parallel_order="contiguous"``, ``dsa_topk_across_stages=True``,
      ``dsa_topk_replay=True``, ``dsa_topk_offload=True``, ``dsa_indexer_precision="fp8"``,
      ``dsa_indexer_loss_layers="served"``, or a ``dsa_training_phase``.

    Where the host refuses every DSA model (megatron-core 0.16 and 0.17), the ``config_fields``
    patch sets ``dsa_is_glm5`` if it is None, because no other DSA model can be built there.
    """
    if not is_dsa(config):
        return False
    marked = getattr(config, "dsa_is_glm5", None)
    return has_glm5_settings(config) if marked is None else marked


def has_glm5_settings(config: Any) -> bool:
    """Whether any setting has a value that no other DSA model has by default."""
    return any(
        getattr(config, name, None) not in values for name, values in _OF_OTHER_MODELS.items()
    )


def set_conventions(config: Any) -> None:
    """Set each unset switch of a GLM-5's configuration to GLM-5's value."""
    for name, value in CONVENTIONS.items():
        if isinstance(value, bool) and getattr(config, name, value) is None:
            setattr(config, name, value)


def learns_across_layers(config: Any) -> bool:
    """Whether indexers are trained, and by the attention of other layers than their own."""
    asked = getattr(config, LOSS_LAYERS, SOURCE) == SERVED
    return asked and bool(getattr(config, "dsa_indexer_loss_coeff", None))


def recomputes_attention(config: Any) -> bool:
    """Whether a layer that attends is run again in the backward."""
    modules = getattr(config, "recompute_modules", None)
    of_core = modules is None or "core_attn" in modules  # None becomes core_attn
    return config.recompute_granularity == "full" or (
        config.recompute_granularity == "selective" and of_core
    )


WITHOUT_GRAPHS = (
    "set cuda_graph_impl='none', or have graphs of layers capture other modules than 'attn' (an "
    "empty list is the whole layer)"
)
"""What a configuration is to say that has CUDA graphs capture attention."""


def captured_attention(config: Any) -> str | None:
    """The settings that have CUDA graphs capture attention, in words; None if none do."""
    impl = getattr(config, "cuda_graph_impl", None) or "none"
    if impl == "none":
        return None
    field = "cuda_graph_modules"
    if not hasattr(config, field):
        field = "cuda_graph_scope"  # its name until megatron-core 0.18
    modules = getattr(config, field) or []
    modules = modules.split(",") if isinstance(modules, str) else modules
    names = [getattr(module, "name", module) for module in modules]
    if names and not {"attn", "full", "full_iteration"} & set(names):
        return None
    return f"cuda_graph_impl={impl!r} with {field}={names}"


def attends_to_every_key(config: Any) -> bool:
    """Whether no layer selects: a dense warm-up, whose indexers learn from all visible keys."""
    return getattr(config, PHASE, NO_PHASE) == DENSE_WARMUP


def why_not_phase(phase: str, loss_coefficient: float | None) -> str | None:
    """Why a model can't train in a phase; None if it can.

    Args:
        phase: of ``PHASES``.
        loss_coefficient: ``dsa_indexer_loss_coeff``.
    """
    if phase not in PHASES:
        return f"{phase!r} must be one of {', '.join(PHASES)}"
    if phase == FROZEN_INDEXER or loss_coefficient:
        return None
    return (
        f"{phase!r} trains the indexers, which get a gradient only from their loss, but "
        f"dsa_indexer_loss_coeff is {loss_coefficient}; set it (to 0.001, for example), or use "
        f"{FROZEN_INDEXER!r}"
    )


def unlike_glm5(config: Any) -> dict[str, Any]:
    """The fields in which a configuration differs from GLM-5's conventions, with their values."""
    found = {name: getattr(config, name, value) for name, value in CONVENTIONS.items()}
    computed = {**found, "dsa_indexer_k_norm_epsilon": k_norm_epsilon(config)}
    return {name: found[name] for name, value in CONVENTIONS.items() if computed[name] != value}


def k_norm_epsilon(config: Any) -> float:
    """What the indexer's k_norm adds to the variance."""
    epsilon = config.dsa_indexer_k_norm_epsilon
    return config.layernorm_epsilon if epsilon is None else epsilon


def describe_conventions(config: Any) -> str:
    """How a model whose conventions are set pairs, rotates and normalises in its indexer."""
    pairs = "interleaved" if config.dsa_indexer_rope_interleaved else "halves"
    rotation = "a" if config.dsa_indexer_rotate_activation else "no"
    return (
        f"indexer: rope {pairs}, {rotation} Hadamard rotation, "
        f"k_norm epsilon {k_norm_epsilon(config):g}"
    )
