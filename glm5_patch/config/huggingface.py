"""A ``glm_moe_dsa`` configuration as published, and the Megatron configuration it means."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ScheduleError
from .schedule import MEGATRON_DEFAULT_OFFSET, IndexSchedule

MODEL_TYPE = "glm_moe_dsa"

# GlmMoeDsaConfig's defaults, for fields that a config.json may leave out.
_DEFAULTS = {
    "vocab_size": 154880,
    "hidden_size": 6144,
    "intermediate_size": 12288,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 78,
    "num_attention_heads": 64,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 2048,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "qk_nope_head_dim": 192,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "max_position_embeddings": 202752,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "index_topk": 2048,
    "index_head_dim": 128,
    "index_n_heads": 32,
    "first_k_dense_replace": 3,
    "num_nextn_predict_layers": 0,
    "indexer_rope_interleave": True,
}

ROPE_WIDTH_TENSORS = (
    "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
    "model.layers.0.self_attn.q_b_proj.weight",
)
"""Their rows are kv_lora_rank + qk_rope_head_dim, and heads * (nope + rope)."""

_MUST_BE = {
    "hidden_act": "silu",
    "attention_bias": False,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}


class HFConfig:
    """Read access to the fields of a ``glm_moe_dsa`` config.json.

    The raw file is the truth: several transformers releases change what they parse from it.
    """

    def __init__(self, raw: Mapping[str, Any]):
        self.raw = raw

    @classmethod
    def from_directory(cls, directory: str | Path) -> HFConfig:
        """Read the ``config.json`` of a directory; see ``from_file``."""
        return cls.from_file(Path(directory) / "config.json")

    @classmethod
    def from_file(cls, path: str | Path) -> HFConfig:
        """Read a configuration, whatever its file is called.

        Raises:
            CheckpointError: the file can't be read, is not JSON, or describes another model.
        """
        path = Path(path)
        try:
            raw = json.loads(path.read_text())
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file; give a Hugging Face directory") from None
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from None
        except ValueError as error:
            raise CheckpointError(f"{path}: not valid JSON: {error}") from None
        if not isinstance(raw, dict) or raw.get("model_type") != MODEL_TYPE:
            found = raw.get("model_type") if isinstance(raw, dict) else type(raw).__name__
            raise CheckpointError(f"{path}: model_type is {found!r}, not {MODEL_TYPE!r}")
        config = cls(raw)
        config.validate(path)
        return config

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in _DEFAULTS:
            raise AttributeError(f"{type(self).__name__} has no field {name!r}")
        value = self.raw.get(name)
        return _DEFAULTS[name] if value is None else value

    @property
    def rope_theta(self) -> float:
        """``rope_theta``, nested in ``rope_parameters`` (transformers 5) or flat (4)."""
        nested = self.raw.get("rope_parameters") or {}
        return float(nested.get("rope_theta") or self.raw.get("rope_theta") or 1e6)

    def agreeing_with(self, shapes: Mapping[str, tuple[int, ...]], source: Path) -> HFConfig:
        """This configuration with the rotary width that the weights have.

        transformers 5.8 overwrites ``qk_rope_head_dim`` with ``head_dim`` when it reads a
        config.json, and a file that it saved is read as wrong by every later release. The rows of
        two projections must agree before a width is believed.

        Args:
            shapes: of the weights, by name; those of layer 0's attention are looked at.
            source: names the file in the warning.
        """
        key, query = (shapes.get(name, (0,))[0] for name in ROPE_WIDTH_TENSORS)
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
        return IndexSchedule.from_hf({**self.raw, "num_hidden_layers": self.num_hidden_layers})

    @property
    def moe_layers(self) -> list[int]:
        """1 for a MoE layer, 0 for a dense one: by ``mlp_layer_types``, or the first are dense."""
        types = self.raw.get("mlp_layer_types")
        if types is None:
            dense = self.first_k_dense_replace
            return [int(i >= dense) for i in range(self.num_hidden_layers)]
        return [int(kind == "sparse") for kind in types]

    def validate(self, path: Path) -> None:
        """Raises CheckpointError for values that GLM-5 never has and this package would ignore."""
        for field, value in _MUST_BE.items():
            found = self.raw.get(field)
            if found is not None and found != value:
                raise CheckpointError(f"{path}: {field} is {found!r}; only {value!r} is supported")
        rope_type = (self.raw.get("rope_parameters") or {}).get("rope_type", "default")
        if rope_type != "default":
            raise CheckpointError(
                f"{path}: rope_type is {rope_type!r}; only 'default' is supported"
            )
        if len(self.moe_layers) != self.num_hidden_layers:
            raise CheckpointError(
                f"{path}: mlp_layer_types has {len(self.moe_layers)} entries for "
                f"num_hidden_layers={self.num_hidden_layers}"
            )
        try:
            str(self.schedule)
        except ScheduleError as error:
            raise CheckpointError(f"{path}: {error}") from None

    def megatron_kwargs(self) -> dict[str, Any]:
        """Arguments of ``MLATransformerConfig`` that describe this model and nothing else.

        Parallelism, precision, recompute and the like are the caller's. ``rope_type`` is "rope",
        whatever Megatron's default says.
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
