"""The fields of a ``glm_moe_dsa`` config.json: one table of what each may hold.

A value that transformers refuses is refused here, and so is one that this package would ignore.
Defaults are those of transformers' ``GlmMoeDsaConfig``.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError

NUMBER = (float, int)


@dataclass(frozen=True)
class Field:
    """One field: a value must be of ``kind``, within the bounds, and one of ``only``."""

    name: str
    kind: type | tuple[type, ...]
    default: Any = None
    low: float | None = None
    high: float | None = None
    only: tuple[Any, ...] = ()
    """The values it can have; of a list, its entries."""
    null: bool = False
    """Whether null is a value, which is the same as leaving the field out."""
    aliases: tuple[str, ...] = ()
    """Other spellings that transformers reads."""
    why: str = ""
    """Why there is no other value."""

    def read(self, raw: Mapping[str, Any]) -> Any:
        """The value in a config.json, or the default.

        Raises:
            CheckpointError: names the field, its value and what it must be.
        """
        found = {name: raw[name] for name in (self.name, *self.aliases) if name in raw}
        for name, value in found.items():
            self._check(name, value)
        stated = {name: value for name, value in found.items() if value is not None}
        (name, value), *others = list(stated.items()) or [(self.name, self.default)]
        for other, differs in others:
            if differs != value:
                raise CheckpointError(
                    f"{name} is {shown(value)} and {other}, another name of it, is "
                    f"{shown(differs)}; remove one"
                )
        return value

    def _check(self, name: str, value: Any) -> None:
        if value is None:
            if self.null:
                return
            raise CheckpointError(
                f"{name} is null; give a value, or remove it for the default, {shown(self.default)}"
            )
        kinds = self.kind if isinstance(self.kind, tuple) else (self.kind,)
        # A bool is an int for isinstance, and 1 is no float.
        if type(value) not in kinds:
            wanted = " or ".join(_KIND_NAMES[kind] for kind in kinds)
            raise self._error(name, value, f"of type {wanted}")
        if isinstance(value, float) and not math.isfinite(value):
            raise self._error(name, value, "a finite number")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if (self.low is not None and value < self.low) or (
                self.high is not None and value > self.high
            ):
                low = "" if self.low is None else f"at least {self.low:g}"
                high = "" if self.high is None else f"at most {self.high:g}"
                raise self._error(name, value, " and ".join(filter(None, (low, high))))
        for entry in value if isinstance(value, list) else [value]:
            # Not `in`: True equals 1, and an entry may be of any type.
            if self.only and not any(type(entry) is type(x) and entry == x for x in self.only):
                allowed = " or ".join(repr(x) for x in self.only)
                each = "a list of " if isinstance(value, list) else ""
                raise self._error(name, entry, each + allowed)

    def _error(self, name: str, value: Any, wanted: str) -> CheckpointError:
        why = f": {self.why}" if self.why else ""
        return CheckpointError(f"{name} is {shown(value)}, but must be {wanted}{why}")


_KIND_NAMES = {
    int: "int",
    float: "float",
    bool: "bool",
    str: "string",
    list: "list",
    dict: "object",
}


def shown(value: Any) -> str:
    """A value for a message: short, whatever it is."""
    return reprlib.repr(value)


def _size(name: str, default: int, high: int = 1 << 24, low: int = 1, **more: Any) -> Field:
    return Field(name, int, default, low=low, high=high, **more)


def _fixed(name: str, value: Any, why: str, **more: Any) -> Field:
    return Field(name, type(value), value, only=(value,), why=why, **more)


_ALWAYS = "GLM-5 computes nothing else"

_FIELDS = (
    _size("vocab_size", 154880),
    _size("hidden_size", 6144),
    _size("intermediate_size", 12288),
    _size("moe_intermediate_size", 2048),
    _size("num_hidden_layers", 78, high=1024),
    _size("num_attention_heads", 64, high=65536),
    _size("num_key_value_heads", 64, high=65536),
    _size("n_shared_experts", 1, high=1024),
    _size("n_routed_experts", 256, low=2, high=8192, aliases=("num_local_experts", "num_experts")),
    _size("num_experts_per_tok", 8, high=8192),
    _size("n_group", 1, high=8192),
    _size("topk_group", 1, high=8192),
    Field("routed_scaling_factor", float, 2.5),
    _size("kv_lora_rank", 512),
    _size("q_lora_rank", 2048),
    _size("qk_rope_head_dim", 64, low=2, high=65536),
    _size("qk_nope_head_dim", 192, high=65536),
    _size("v_head_dim", 256, high=65536),
    _size("index_topk", 2048, high=1 << 31),
    _size("index_head_dim", 128, high=65536),
    _size("index_n_heads", 32, high=65536),
    _size("max_position_embeddings", 202752, high=1 << 40),
    Field("initializer_range", float, 0.02, low=0),
    Field("rms_norm_eps", float, 1e-5, low=0),
    Field("attention_dropout", NUMBER, 0.0, low=0, high=1),
    Field("tie_word_embeddings", bool, False),
    _size("first_k_dense_replace", 3, low=0),
    Field("mlp_layer_types", list, only=("dense", "sparse"), null=True),
    _size("num_nextn_predict_layers", 0, low=0, high=64),
    # The index schedule.
    Field("indexer_types", list, only=("full", "shared"), null=True),
    Field("index_topk_pattern", (str, list), null=True),
    _size("index_topk_freq", 1),
    _size("index_skip_topk_offset", 2, low=0),
    Field("index_share_for_mtp_iteration", bool, null=True),
    # What every GLM-5 has.
    _fixed("hidden_act", "silu", _ALWAYS),
    _fixed("attention_bias", False, _ALWAYS),
    _fixed("mlp_bias", False, _ALWAYS),
    _fixed("norm_topk_prob", True, _ALWAYS),
    _fixed("scoring_func", "sigmoid", _ALWAYS, null=True),
    _fixed("topk_method", "noaux_tc", _ALWAYS, null=True),
    _fixed("moe_layer_freq", 1, "mlp_layer_types says which layers are sparse", null=True),
    _fixed("rope_interleave", True, _ALWAYS, null=True),
    _fixed(
        "indexer_rope_interleave",
        True,
        "transformers computes the indexer's rope interleaved, whatever this field says",
        null=True,
    ),
    # Read for their types alone: transformers refuses others.
    Field("head_dim", int, 64),
    Field("output_router_logits", bool, False),
    Field("use_cache", bool, True),
    Field("pad_token_id", int, null=True),
    Field("bos_token_id", int, 0, null=True),
    Field("eos_token_id", (int, list), 1, null=True),
    Field("layer_types", list, only=("indexed_attention", "deepseek_sparse_attention"), null=True),
    Field(
        "dtype",
        str,
        only=("bfloat16", "float16", "float32"),
        null=True,
        aliases=("torch_dtype",),
    ),
    Field("architectures", list, null=True),
    Field("transformers_version", str, null=True),
    Field("output_hidden_states", bool, False, null=True),
    Field("output_attentions", bool, False, null=True),
    Field("return_dict", bool, True, null=True),
    Field("chunk_size_feed_forward", int, 0),
    _fixed("is_encoder_decoder", False, _ALWAYS),
    Field("id2label", dict, null=True),
    Field("label2id", dict, null=True),
    Field("problem_type", str, null=True),
)

FIELDS = {field.name: field for field in _FIELDS}

_ROPE_FIELDS = {
    field.name: field
    for field in (
        _fixed(
            "rope_type", "default", "no other scaling of the rope is supported", aliases=("type",)
        ),
        Field("rope_theta", NUMBER, low=1e-6, high=1e30),
        Field(
            "partial_rotary_factor",
            NUMBER,
            only=(1, 1.0),
            null=True,
            why="the rope's width is qk_rope_head_dim",
        ),
    )
}


def rope_parameters(raw: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_theta``, ``rope_type`` and no more, as far as a config.json has them.

    transformers 5 nests them in ``rope_parameters``; ``rope_scaling`` is an older name that wins
    there, and a flat ``rope_theta`` counts where the nested one is absent.

    Raises:
        CheckpointError: a scaling of the rope, or an unknown key: both would be ignored.
    """
    name, nested = "rope_parameters", {}
    for candidate in ("rope_scaling", "rope_parameters"):
        value = raw.get(candidate)
        if value is not None and not isinstance(value, dict):
            raise CheckpointError(f"{candidate} is {shown(value)}, but must be an object")
        if value and not nested:
            name, nested = candidate, value
    for key in nested:
        if key not in _ROPE_FIELDS and key != "type":
            raise CheckpointError(
                f"{name} has {shown(key)}; only rope_theta and rope_type 'default' are supported"
            )
    found = {key: field.read(nested) for key, field in _ROPE_FIELDS.items()}
    if found["rope_theta"] is None and "rope_theta" in raw:
        found["rope_theta"] = _ROPE_FIELDS["rope_theta"].read(raw)
    _ROPE_FIELDS["partial_rotary_factor"].read(raw)
    del found["partial_rotary_factor"]
    return {key: value for key, value in found.items() if value is not None}
