"""A published ``glm_moe_dsa`` configuration, and the Megatron configuration that it describes."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ScheduleError
from .hf_fields import FIELDS, rope_parameters, shown
from .json_file import read_json
from .schedule import MEGATRON_DEFAULT_OFFSET, IndexSchedule

MODEL_TYPE = "glm_moe_dsa"

_OTHER_MODELS = {
    "glm5_next": "GLM-5.3-Flash, which has another attention (KDA, pooled keys, mHC)",
    "glm5_next_text": "GLM-5.3-Flash, which has another attention (KDA, pooled keys, mHC)",
    "glm4_moe": "GLM-4.5 to 4.7, which have no sparse attention",
    "glm4_moe_lite": "GLM-4.7-Flash, which has no sparse attention",
    "glm4v_moe": "GLM-4.5V, which has no sparse attention",
    "deepseek_v3": "DeepSeek-V3, which has no sparse attention",
    "deepseek_v32": "DeepSeek-V3.2, whose indexer computes otherwise",
}

ROPE_WIDTH_TENSORS = (
    "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
    "model.layers.0.self_attn.q_b_proj.weight",
)
"""Their rows are kv_lora_rank + qk_rope_head_dim, and heads * (nope + rope)."""

_MOST_EXPERTS = 1 << 20


class HFConfig:
    """The fields of a ``glm_moe_dsa`` config.json, read-only.

    The values come from the file itself, because some transformers releases change them.
    """

    def __init__(self, raw: Mapping[str, Any]):
        self.raw = raw

    @classmethod
    def from_directory(cls, directory: str | Path) -> HFConfig:
        """Read the ``config.json`` of a directory; see ``from_file``."""
        return cls.from_file(Path(directory) / "config.json")

    @classmethod
    def from_file(cls, path: str | Path) -> HFConfig:
        """Read a configuration from a file of any name.

        Raises:
            CheckpointError: the file can't be read, is not JSON, describes another model, or has a
                field that no GLM-5 can have.
        """
        path = Path(path)
        raw = read_json(path)
        model_type = raw.get("model_type") if isinstance(raw, dict) else None
        if model_type != MODEL_TYPE:
            found = shown(model_type) if isinstance(raw, dict) else f"in a {type(raw).__name__}"
            other = _OTHER_MODELS.get(model_type) if isinstance(model_type, str) else None
            raise CheckpointError(
                f"{path}: model_type is {found}{f', {other}' if other else ''}; "
                f"only {MODEL_TYPE!r} (GLM-5, 5.1, 5.2, 5.3) is supported"
            )
        config = cls(raw)
        config.validate(path)
        return config

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in FIELDS:
            raise AttributeError(f"{type(self).__name__} has no field {name!r}")
        return FIELDS[name].read(self.raw)

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """``rope_type``, and ``rope_theta`` if the file has one, wherever."""
        return rope_parameters(self.raw)

    @property
    def rope_theta(self) -> float:
        """``rope_theta``, nested in ``rope_parameters`` (transformers 5) or flat (4).

        Raises:
            CheckpointError: there is none. Releases differ in what they take then.
        """
        theta = self.rope_parameters.get("rope_theta")
        if theta is None:
            raise CheckpointError(
                "rope_theta is absent; put the model's own into rope_parameters "
                "(GLM-5 and 5.1 have 1000000, GLM-5.2 has 8000000)"
            )
        return float(theta)

    def agreeing_with(self, shapes: Mapping[str, tuple[int, ...]], source: Path) -> HFConfig:
        """This configuration with the rotary width of the weights.

        transformers 5.8 overwrites ``qk_rope_head_dim`` with ``head_dim`` when it reads a
        config.json, and a file that it saved is read as wrong by every later release. The rows of
        two projections must agree before a width is believed.

        Args:
            shapes: of the weights, by name; those of layer 0's attention are looked at.
            source: names the file in the warning.
        """
        key, query = ((shapes.get(name) or (0,))[0] for name in ROPE_WIDTH_TENSORS)
        width = key - self.kv_lora_rank
        by_query = query / self.num_attention_heads - self.qk_nope_head_dim
        if not width == by_query > 0 or width == self.qk_rope_head_dim:
            return self
        warnings.warn(
            f"{source}: qk_rope_head_dim is {self.qk_rope_head_dim}, but the weights have {width}, "
            f"which is taken. transformers 5.8 writes such files; put {width} there",
            stacklevel=3,
        )
        return HFConfig({**self.raw, "qk_rope_head_dim": width})

    @cached_property
    def schedule(self) -> IndexSchedule:
        """By ``indexer_types``, ``index_topk_pattern``, or frequency and offset, as transformers.

        A list has 'full' and 'shared', a pattern that is a string has F and S. A list of letters is
        refused: transformers takes each letter of it for 'full'.
        """
        fields = {"num_hidden_layers": self.num_hidden_layers}
        types, name = self.indexer_types, "index_topk_pattern"
        pattern = self.index_topk_pattern
        if isinstance(pattern, list):
            pattern = dataclasses.replace(FIELDS["indexer_types"], name=name).read(self.raw)
        elif pattern is not None and set(pattern) - set("FS"):
            raise CheckpointError(f"{name} is {shown(pattern)}, but must be a string of F and S")
        freq, offset = self.index_topk_freq, self.index_skip_topk_offset
        fields |= {"indexer_types": types, "index_topk_pattern": pattern, "index_topk_freq": freq}
        if "index_skip_topk_offset" in self.raw:
            fields["index_skip_topk_offset"] = offset
        if types is None and pattern is None and freq > 1 and offset < 1:
            raise CheckpointError(
                f"index_skip_topk_offset is {offset}, which makes layer 1 a skip layer without a "
                "source; it must be at least 1"
            )
        try:
            return IndexSchedule.from_hf(fields)
        except ScheduleError as error:
            if types is not None or pattern is None:
                raise
            raise CheckpointError(f"{name} is {shown(pattern)}: {error}") from None

    @property
    def moe_layers(self) -> list[int]:
        """1 for a MoE layer, 0 for a dense one: by ``mlp_layer_types``, or the first are dense."""
        types = self.mlp_layer_types
        if types is None:
            dense = self.first_k_dense_replace
            return [int(i >= dense) for i in range(self.num_hidden_layers)]
        return [int(kind == "sparse") for kind in types]

    def validate(self, path: Path) -> None:
        """Raises CheckpointError for values that GLM-5 never has and this package would ignore."""
        try:
            for field in FIELDS.values():
                field.read(self.raw)
            _ = self.rope_theta
            self._check_together()
            str(self.schedule)
        except (CheckpointError, ScheduleError) as error:
            raise CheckpointError(f"{path}: {error}") from None

    def _check_together(self) -> None:
        """Fields that contradict each other."""
        layers, heads = self.num_hidden_layers, self.num_attention_heads
        for name in ("mlp_layer_types", "layer_types"):
            types = getattr(self, name)
            if types is not None and len(types) != layers:
                raise CheckpointError(
                    f"{name} has {len(types)} entries for num_hidden_layers={layers}"
                )
        if "num_key_value_heads" in self.raw and self.num_key_value_heads != heads:
            raise CheckpointError(
                f"num_key_value_heads is {self.num_key_value_heads}, but must be "
                f"num_attention_heads, {heads}: each head has a key of its own"
            )
        width = self.qk_rope_head_dim
        if width % 2 or width > self.index_head_dim:
            raise CheckpointError(
                f"qk_rope_head_dim is {width}, but must be even and at most index_head_dim, "
                f"{self.index_head_dim}"
            )
        if self.pad_token_id is not None and not self.pad_token_id < self.vocab_size:
            raise CheckpointError(
                f"pad_token_id is {self.pad_token_id}, but must be below vocab_size, "
                f"{self.vocab_size}"
            )
        if self.raw.get("per_layer_config"):
            raise CheckpointError("per_layer_config is set; the layers of a GLM-5 are alike")
        self._check_experts()

    def _check_experts(self) -> None:
        experts, groups, chosen = self.n_routed_experts, self.n_group, self.num_experts_per_tok
        if experts * self.num_hidden_layers > _MOST_EXPERTS:
            raise CheckpointError(
                f"n_routed_experts is {experts} in {self.num_hidden_layers} layers, which is more "
                f"than {_MOST_EXPERTS} experts"
            )
        if experts % groups or experts // groups < 2:
            raise CheckpointError(
                f"n_group is {groups}, but must divide n_routed_experts, {experts}, into groups of "
                "at least 2"
            )
        if self.topk_group > groups:
            raise CheckpointError(
                f"topk_group is {self.topk_group}, but must be at most n_group, {groups}"
            )
        if chosen > self.topk_group * (experts // groups):
            raise CheckpointError(
                f"num_experts_per_tok is {chosen}, but only "
                f"{self.topk_group * (experts // groups)} can be chosen: n_routed_experts is "
                f"{experts}, in {groups} groups of which topk_group, {self.topk_group}, count"
            )
        if groups > 1 and chosen // self.topk_group != 2:
            # transformers scores a group by its best two, megatron-core by its best topk / groups.
            raise CheckpointError(
                f"num_experts_per_tok is {chosen}, but must be 2 * topk_group, "
                f"{2 * self.topk_group}, where n_group is not 1: megatron-core would score the "
                "groups by another number of experts than transformers"
            )

    def megatron_kwargs(self) -> dict[str, Any]:
        """The arguments of ``MLATransformerConfig`` that describe this model.

        The caller adds parallelism, precision and recompute. ``rope_type`` is always "rope";
        Megatron's default differs.
        """
        from torch.nn.functional import silu  # the rest of this module needs no torch

        freq, offset = self.schedule.freq_and_offset or (1, MEGATRON_DEFAULT_OFFSET)

        return {
            "num_layers": self.num_hidden_layers,
            "hidden_size": self.hidden_size,
            "ffn_hidden_size": self.intermediate_size,
            "num_attention_heads": self.num_attention_heads,
            "num_query_groups": self.num_attention_heads,
            "multi_latent_attention": True,
            "q_lora_rank": self.q_lora_rank,
            "kv_lora_rank": self.kv_lora_rank,
            "qk_head_dim": self.qk_nope_head_dim,
            "qk_pos_emb_head_dim": self.qk_rope_head_dim,
            "v_head_dim": self.v_head_dim,
            "kv_channels": self.qk_nope_head_dim + self.qk_rope_head_dim,
            "qk_layernorm": True,
            "normalization": "RMSNorm",
            "layernorm_epsilon": self.rms_norm_eps,
            "init_method_std": self.initializer_range,
            "add_bias_linear": False,
            "gated_linear_unit": True,
            "activation_func": silu,
            "hidden_dropout": 0.0,
            "attention_dropout": self.attention_dropout,
            "rope_type": "rope",
            "rotary_base": self.rope_theta,
            "rotary_percent": 1.0,
            "rotary_interleaved": False,
            "rotary_scaling_factor": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.0,
            "apply_rope_fusion": False,
            "experimental_attention_variant": "dsa",
            "dsa_is_glm5": True,
            "dsa_indexer_n_heads": self.index_n_heads,
            "dsa_indexer_head_dim": self.index_head_dim,
            "dsa_indexer_topk": self.index_topk,
            "dsa_indexer_types": list(self.schedule.types),
            "dsa_indexer_topk_freq": freq,
            "dsa_indexer_skip_topk_offset": offset,
            "dsa_indexer_rope_interleaved": self.indexer_rope_interleave,
            "dsa_indexer_share_for_mtp_iteration": bool(self.index_share_for_mtp_iteration),
            "dsa_indexer_rotate_activation": False,
            "dsa_indexer_k_norm_epsilon": 1e-6,
            "num_moe_experts": self.n_routed_experts,
            "moe_layer_freq": self.moe_layers,
            "moe_ffn_hidden_size": self.moe_intermediate_size,
            "moe_shared_expert_intermediate_size": self.moe_intermediate_size
            * self.n_shared_experts,
            "moe_router_topk": self.num_experts_per_tok,
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_topk_scaling_factor": self.routed_scaling_factor,
            "moe_router_num_groups": self.n_group if self.n_group > 1 else None,
            "moe_router_group_topk": self.topk_group if self.n_group > 1 else None,
            "moe_router_pre_softmax": True,
            "moe_router_load_balancing_type": "none",
            "moe_router_dtype": "fp32",
        }
