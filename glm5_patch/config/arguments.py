"""A GLM-5 as arguments of Megatron-LM's command line: what config.json says, and what is wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import GLM5PatchError, ScheduleError
from .fields import ALIASES, CONVENTIONS, on_off_flags
from .huggingface import HFConfig
from .schedule import IndexSchedule

CONFIG_FLAG = "--glm5-config"
CONFIG_ARGUMENT = "glm5_config"

_RENAMED = {"num_moe_experts": "num_experts"}
# The command line has one flag for the two, and one for query groups that MLA does not have.
_WITHOUT_ARGUMENT = ("gated_linear_unit", "activation_func", "num_query_groups")

CHOICES = (
    "attention_dropout",
    "hidden_dropout",
    "init_method_std",
    "kv_channels",
    "max_position_embeddings",
    "moe_router_dtype",
    "moe_router_load_balancing_type",
    "moe_router_pre_softmax",
)
"""Filled in, but a command line may say otherwise: the model is the same function. MLA's widths
have names of their own, and ``kv_channels`` is none of them."""

ALWAYS = (
    "multi_latent_attention",
    "qk_layernorm",
    "normalization",
    "add_bias_linear",
    "add_qkv_bias",
    "swiglu",
    "squared_relu",
    "quick_geglu",
    "group_query_attention",
    "rotary_percent",
    "rotary_interleaved",
    "moe_router_score_function",
    "moe_router_enable_expert_bias",
)
"""What has one value in every GLM-5."""

_SCHEDULE = ("dsa_indexer_types", "dsa_indexer_topk_freq", "dsa_indexer_skip_topk_offset")
_POSITIONS = ("rope", "none")
"""MLA rotates by itself, and GPTModel adds nothing for these."""


def model_arguments(hf: HFConfig) -> dict[str, Any]:
    """Every argument of Megatron-LM that a config.json decides, by its name in the namespace."""
    settings = hf.megatron_kwargs()
    for name in _WITHOUT_ARGUMENT:
        del settings[name]
    return {_RENAMED.get(name, name): value for name, value in settings.items()} | {
        "swiglu": True,
        "squared_relu": False,
        "quick_geglu": False,
        "add_qkv_bias": False,
        "group_query_attention": False,
        "position_embedding_type": "rope",
        "untie_embeddings_and_output_weights": not hf.tie_word_embeddings,
        "max_position_embeddings": hf.max_position_embeddings,
        "padded_vocab_size": hf.vocab_size,
    }


def model_names() -> tuple[str, ...]:
    """The arguments that a checkpoint of a GLM-5 needs to be built again."""
    names = [name for name in model_arguments(_ANY) if name not in CHOICES]
    return (*names, *ALIASES, "mtp_num_layers", "dsa_context_parallel_order")


_ANY = HFConfig({"rope_parameters": {"rope_theta": 1.0}})
"""Of its arguments those in ``ALWAYS`` are every GLM-5's."""


def command_line(hf: HFConfig) -> list[str]:
    """The flags of Megatron-LM that say what a config.json says; those at a parser's default that
    no flag sets are left out."""
    remedies = (_remedy(name, value) for name, value in model_arguments(hf).items())
    return [text.removeprefix("give ") for text in remedies if text.startswith("give ")]


def check_arguments(args: Any, hf: HFConfig | None, source: str = "") -> None:
    """Compare a command line with the GLM-5 of a config.json, or with what all GLM-5s have.

    Args:
        args: the namespace, before Megatron-LM validates it.
        hf: the published configuration; None if the command line names none.
        source: names its file in the message.

    Raises:
        GLM5PatchError: lists each flag to add, to change or to remove.
    """
    wrong = "; ".join(_wrong_values(vars(args), hf))
    if wrong and hf is None:
        raise GLM5PatchError(
            f"the command line does not describe a GLM-5: {wrong}. {CONFIG_FLAG} DIR fills in all "
            "of them from a config.json; --no-dsa-is-glm5 says that the model is another DSA model"
        )
    if wrong:
        raise GLM5PatchError(
            f"the command line contradicts {source}: {wrong}. If the model is another, change the "
            "file"
        )


def _wrong_values(given: Mapping[str, Any], hf: HFConfig | None) -> Iterator[str]:
    wanted = model_arguments(hf or _ANY)
    names = ALWAYS if hf is None else [n for n in wanted if n not in (*CHOICES, *_SCHEDULE)]
    routed = given.get("num_experts") is not None or hf is not None
    for name in names:
        if name in ("position_embedding_type", "rope_type", *CONVENTIONS):
            continue
        if name.startswith("moe_") and not routed:
            continue
        value = given.get(name, wanted[name])
        if name == "moe_layer_freq":
            value = _moe_layers(value, len(wanted[name]))
        if name == "padded_vocab_size" and (value or wanted[name]) >= wanted[name]:
            continue
        if value != wanted[name]:
            yield _wrong(name, given[name], wanted[name])
    yield from _wrong_positions(given)
    yield from _wrong_conventions(given)
    if hf is not None:
        yield from _wrong_schedule(given, hf)


def _wrong_positions(given: Mapping[str, Any]) -> Iterator[str]:
    kind = given.get("position_embedding_type", "rope")
    if kind not in _POSITIONS:
        yield _wrong("position_embedding_type", kind, "rope")
    # No flag leaves MLA's default, YaRN, which changes nothing with a factor of 1.
    kind, factor = given.get("rope_type"), given.get("rotary_scaling_factor", 1.0)
    if kind != "rope" and factor != 1:
        yield _wrong("rope_type", kind, "rope")


def _wrong_conventions(given: Mapping[str, Any]) -> Iterator[str]:
    for name, wanted in CONVENTIONS.items():
        value = given.get(name, wanted)
        computed = value
        if name == "dsa_indexer_k_norm_epsilon" and value is None:
            computed = given.get("layernorm_epsilon")
        unset = isinstance(wanted, bool) and value is None  # TransformerConfig sets it
        if computed != wanted and not unset:
            yield _wrong(name, value, wanted)


def _wrong_schedule(given: Mapping[str, Any], hf: HFConfig) -> Iterator[str]:
    types = given.get("dsa_indexer_types")
    try:
        if (
            types is not None
            and IndexSchedule.from_types(types, hf.num_hidden_layers) != hf.schedule
        ):
            yield _wrong("dsa_indexer_types", types, list(hf.schedule.types))
    except ScheduleError as error:
        yield f"--dsa-indexer-types: {error}"
    wanted = model_arguments(hf)
    for name in (*_SCHEDULE[1:], *ALIASES):
        value = given.get(name)
        if value not in (None, wanted[ALIASES.get(name, name)]):
            yield _wrong(name, value, wanted[ALIASES.get(name, name)])


def _moe_layers(freq: Any, num_layers: int) -> Any:
    if isinstance(freq, int):
        return [int(i % freq == 0) for i in range(num_layers)]
    return freq


def _wrong(name: str, value: Any, wanted: Any) -> str:
    return f"{name} is {value!r}: {_remedy(name, wanted)}"


_OTHER_FLAGS = {"layernorm_epsilon": "--norm-epsilon"}
_OFF_FLAGS = {"add_bias_linear": "--disable-bias-linear", "apply_rope_fusion": "--no-rope-fusion"}


def _remedy(name: str, wanted: Any) -> str:
    """What to write on the command line."""
    flag = _OTHER_FLAGS.get(name, "--" + name.replace("_", "-"))
    if wanted is True:
        return f"give {flag}"
    if wanted is False and name in _OFF_FLAGS:
        return f"give {_OFF_FLAGS[name]}"
    if wanted is False:
        both_ways = name.startswith("dsa_")
        return f"give {on_off_flags(name)['arg_names'][1]}" if both_ways else f"remove {flag}"
    if name == "dsa_indexer_types":
        wanted = IndexSchedule(tuple(wanted)).letters
    elif isinstance(wanted, list):
        wanted = str(wanted).replace(" ", "")
    elif isinstance(wanted, float) and wanted.is_integer():
        wanted = int(wanted)  # --rotary-base takes no 8000000.0
    return f"remove {flag}" if wanted is None else f"give {flag} {wanted}"
