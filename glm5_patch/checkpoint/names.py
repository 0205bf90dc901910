"""The tensors of a GLM-5 checkpoint: names, shapes, and the Megatron parameters they fill."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..config.huggingface import HFConfig
from ..errors import CheckpointError

if TYPE_CHECKING:  # names and shapes are asked for without torch too
    import torch
    from torch import Tensor

INDEXER = re.compile(r"model\.layers\.(\d{1,9})\.self_attn\.indexer\.")

LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")


def expected_tensors(hf: HFConfig, mtp_layers: int = 0) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint must have for this model.

    Args:
        hf: the model.
        mtp_layers: multi-token-prediction layers that it is built with; each computes its top-k.
    """
    h, heads = hf.hidden_size, hf.num_attention_heads
    qk_head_dim = hf.qk_nope_head_dim + hf.qk_rope_head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (hf.vocab_size, h),
        "model.norm.weight": (h,),
    }
    if not hf.tie_word_embeddings:
        shapes["lm_head.weight"] = (hf.vocab_size, h)
    attention = {
        "input_layernorm.weight": (h,),
        "post_attention_layernorm.weight": (h,),
        "self_attn.q_a_proj.weight": (hf.q_lora_rank, h),
        "self_attn.q_a_layernorm.weight": (hf.q_lora_rank,),
        "self_attn.q_b_proj.weight": (heads * qk_head_dim, hf.q_lora_rank),
        "self_attn.kv_a_proj_with_mqa.weight": (hf.kv_lora_rank + hf.qk_rope_head_dim, h),
        "self_attn.kv_a_layernorm.weight": (hf.kv_lora_rank,),
        "self_attn.kv_b_proj.weight": (
            heads * (hf.qk_nope_head_dim + hf.v_head_dim),
            hf.kv_lora_rank,
        ),
        "self_attn.o_proj.weight": (h, heads * hf.v_head_dim),
    }
    indexer = {
        "self_attn.indexer.wq_b.weight": (hf.index_n_heads * hf.index_head_dim, hf.q_lora_rank),
        "self_attn.indexer.wk.weight": (hf.index_head_dim, h),
        "self_attn.indexer.k_norm.weight": (hf.index_head_dim,),
        "self_attn.indexer.k_norm.bias": (hf.index_head_dim,),
        "self_attn.indexer.weights_proj.weight": (hf.index_n_heads, h),
    }
    moe = {
        "mlp.gate.weight": (hf.n_routed_experts, h),
        "mlp.gate.e_score_correction_bias": (hf.n_routed_experts,),
        **_mlp("mlp.shared_experts", h, hf.moe_intermediate_size * hf.n_shared_experts),
    }
    for expert in range(hf.n_routed_experts):
        moe.update(_mlp(f"mlp.experts.{expert}", h, hf.moe_intermediate_size))
    dense = _mlp("mlp", h, hf.intermediate_size)
    for index, is_moe in enumerate(hf.moe_layers):
        layer = {**attention, **(moe if is_moe else dense)}
        if hf.schedule.computes(index + 1):
            layer.update(indexer)
        shapes.update({f"model.layers.{index}.{name}": shape for name, shape in layer.items()})
    mtp = {
        "enorm.weight": (h,),
        "hnorm.weight": (h,),
        "eh_proj.weight": (h, 2 * h),
        "shared_head.norm.weight": (h,),
    }
    for index in range(hf.num_hidden_layers, hf.num_hidden_layers + mtp_layers):
        layer = {**attention, **indexer, **moe, **mtp}
        shapes.update({f"model.layers.{index}.{name}": shape for name, shape in layer.items()})
    return shapes


def _mlp(prefix: str, hidden: int, ffn: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj.weight": (ffn, hidden),
        f"{prefix}.up_proj.weight": (ffn, hidden),
        f"{prefix}.down_proj.weight": (hidden, ffn),
    }


# Megatron name inside a layer -> Hugging Face names, concatenated along dimension 0.
LAYER_NAMES = {
    "input_layernorm.weight": ("input_layernorm.weight",),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",),
    "mlp.linear_fc1.layer_norm_weight": ("post_attention_layernorm.weight",),
    "mlp.router.weight": ("mlp.gate.weight",),
    "mlp.router.expert_bias": ("mlp.gate.e_score_correction_bias",),
    **{
        f"self_attention.{megatron}": (f"self_attn.{hf}",)
        for megatron, hf in {
            "linear_q_down_proj.weight": "q_a_proj.weight",
            "q_layernorm.weight": "q_a_layernorm.weight",
            "linear_q_up_proj.layer_norm_weight": "q_a_layernorm.weight",
            "linear_q_up_proj.weight": "q_b_proj.weight",
            "linear_kv_down_proj.weight": "kv_a_proj_with_mqa.weight",
            "kv_layernorm.weight": "kv_a_layernorm.weight",
            "linear_kv_up_proj.layer_norm_weight": "kv_a_layernorm.weight",
            "linear_kv_up_proj.weight": "kv_b_proj.weight",
            "linear_proj.weight": "o_proj.weight",
            "core_attention.indexer.linear_wq_b.weight": "indexer.wq_b.weight",
            "core_attention.indexer.linear_wk.weight": "indexer.wk.weight",
            "core_attention.indexer.k_norm.weight": "indexer.k_norm.weight",
            "core_attention.indexer.k_norm.bias": "indexer.k_norm.bias",
            "core_attention.indexer.linear_weights_proj.weight": "indexer.weights_proj.weight",
        }.items()
    },
}

_TOP_NAMES = {
    "embedding.word_embeddings.weight": ("model.embed_tokens.weight",),
    "decoder.final_layernorm.weight": ("model.norm.weight",),
    "output_layer.weight": ("lm_head.weight",),
}

MTP_NAMES = {
    "enorm.weight": ("enorm.weight",),
    "hnorm.weight": ("hnorm.weight",),
    "eh_proj.weight": ("eh_proj.weight",),
    "final_layernorm.weight": ("shared_head.norm.weight",),
}

MTP_COPIES = {
    ".embed_tokens.weight": "model.embed_tokens.weight",
    ".shared_head.head.weight": "lm_head.weight",
}
"""Ends of names in an MTP layer of some checkpoints, and the tensors that they repeat."""

MTP_LAYERS = ("transformer_layer", "mtp_model_layer")
"""The decoder layer inside an MTP layer, on megatron-core 0.16 and on later ones."""

_MEGATRON_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")

_MTP_LAYER = re.compile(rf"mtp\.layers\.(\d+)\.(?:(?:{'|'.join(MTP_LAYERS)})\.)?(.+)")

_FC = {"1": ("gate_proj.weight", "up_proj.weight"), "2": ("down_proj.weight",)}

_MLP = re.compile(r"(mlp|mlp\.shared_experts)\.linear_fc([12])\.weight$")

# SequentialMLP, then Transformer Engine's grouped MLP.
_EXPERT = re.compile(
    r"mlp\.experts\.(?:local_experts\.(\d+)\.linear_fc([12])\.weight|linear_fc([12])\.weight(\d+))$"
)


def _first_expert(config) -> int:
    """The number of this rank's first expert. Expert parallelism assigns experts in order."""
    ranks = config.expert_model_parallel_size
    if ranks == 1:
        return 0
    from megatron.core import parallel_state

    rank = parallel_state.get_expert_model_parallel_rank()
    return rank * config.num_moe_experts // ranks


def _layer_sources(name: str, first_expert: int) -> tuple[str, ...] | None:
    if name in LAYER_NAMES:
        return LAYER_NAMES[name]
    if match := _MLP.match(name):
        return tuple(f"{match[1]}.{part}" for part in _FC[match[2]])
    if match := _EXPERT.match(name):
        expert, fc = (match[1], match[2]) if match[1] else (match[4], match[3])
        return tuple(f"mlp.experts.{first_expert + int(expert)}.{part}" for part in _FC[fc])
    return None


PADDED = ("embedding.word_embeddings.weight", "output_layer.weight")
"""Their rows are tokens. megatron-core pads them to a multiple of the tensor-parallel ranks."""


def _is_expert(parameter: str) -> bool:
    return ".experts." in parameter


def own_slices(name: str, whole: Sequence[int], own: Sequence[int]) -> tuple[slice, ...]:
    """Which part of a tensor this tensor-parallel rank holds.

    Args:
        name: of the parameter.
        whole: shape of the tensor in the checkpoint.
        own: shape of what the rank holds of it. Of a padded vocabulary the slice has fewer rows:
            those that the checkpoint has.

    Raises:
        CheckpointError: the shapes are not those of a split between the ranks.
    """
    from megatron.core import parallel_state

    if _is_expert(name):
        ranks = parallel_state.get_expert_tensor_parallel_world_size()
        rank = parallel_state.get_expert_tensor_parallel_rank()
    else:
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        rank = parallel_state.get_tensor_model_parallel_rank()
    split = [dim for dim, size in enumerate(own) if dim >= len(whole) or size != whole[dim]]
    slices = [slice(0, size) for size in whole]
    if not split and len(own) == len(whole):
        return tuple(slices)
    dim = split[0] if split else 0
    padded = name in PADDED and dim == 0 and own[0] * ranks > whole[0]
    if len(split) != 1 or len(own) != len(whole) or (own[dim] * ranks != whole[dim] and not padded):
        raise CheckpointError(
            f"{name} has shape {list(own)} on this rank, of {ranks} that share it, and the "
            f"checkpoint {list(whole)}"
        )
    first, last = (min(place * own[dim], whole[dim]) for place in (rank, rank + 1))
    slices[dim] = slice(first, last)
    return tuple(slices)


def own_part(name: str, whole: Sequence[Tensor], like: Tensor) -> Tensor:
    """The part of a parameter on this tensor-parallel rank.

    Args:
        name: of the parameter.
        whole: what makes it, concatenated along dimension 0; each is split by itself.
        like: of this rank's shape.

    Raises:
        CheckpointError: the shapes are not those of a split between the ranks.
    """
    import torch

    own = (like.shape[0] // len(whole), *like.shape[1:])
    part = torch.cat([tensor[own_slices(name, tensor.shape, own)] for tensor in whole])
    padding = like.shape[0] - part.shape[0]
    return torch.cat([part, part.new_zeros(padding, *part.shape[1:])]) if padding else part


def pieces(model: torch.nn.Module) -> Iterator[tuple[str, Tensor, tuple[str, ...]]]:
    """Each tensor of this rank's model with its name and the Hugging Face tensors that make it.

    Raises:
        CheckpointError: a parameter that no GLM-5 checkpoint has.
    """
    layers = model.decoder.layers
    first_expert = _first_expert(model.config)
    tensors = dict(model.named_parameters())
    tensors.update({n: t for n, t in model.named_buffers() if n.endswith("expert_bias")})
    for name, tensor in tensors.items():
        sources = _TOP_NAMES.get(name)
        if sources == ("lm_head.weight",) and model.share_embeddings_and_output_weights:
            sources = ("model.embed_tokens.weight",)  # a copy, on the last pipeline stage
        if match := _MEGATRON_LAYER.match(name):
            # layer_number counts from 1 over all pipeline stages.
            prefix = f"model.layers.{layers[int(match[1])].layer_number - 1}."
            in_layer = _layer_sources(match[2], first_expert)
            sources = in_layer and tuple(prefix + source for source in in_layer)
        elif match := _MTP_LAYER.match(name):
            prefix = f"model.layers.{model.config.num_layers + int(match[1])}."
            in_layer = MTP_NAMES.get(match[2]) or _layer_sources(match[2], first_expert)
            sources = in_layer and tuple(prefix + source for source in in_layer)
        if sources is None:
            raise CheckpointError(f"{name}: no tensor of a GLM-5 checkpoint corresponds to it")
        yield name, tensor, sources


class Part(NamedTuple):
    """One tensor of the checkpoint, or what this rank holds of it."""

    parameter: str
    """The name of the parameter that it is a part of."""
    source: str
    """Hugging Face's name."""
    tensor: Tensor
    """A view of the parameter. A padded vocabulary has more rows than ``slices``."""
    slices: tuple[slice, ...]
    """Where it lies in the whole tensor."""
    whole: tuple[int, ...]
    """The shape of the whole tensor."""


def parts(model: torch.nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Part]:
    """What this rank's model holds of each tensor of a checkpoint.

    Args:
        model: without wrappers.
        shapes: of the whole tensors, by Hugging Face's names.

    Raises:
        CheckpointError: a tensor that is not among them, or that is of another shape.
    """
    for name, parameter, sources in pieces(model):
        absent = [source for source in sources if source not in shapes]
        if absent:
            raise CheckpointError(f"{name} needs {absent[0]}, which is not there")
        rows = parameter.shape[0] // len(sources)
        for number, source in enumerate(sources):
            tensor = parameter.narrow(0, number * rows, rows)
            whole = shapes[source]
            yield Part(name, source, tensor, own_slices(name, whole, tensor.shape), whole)


def split_group(parameter: str) -> Any:
    """The process group that shares out a parameter: of tensor parallelism, or that of experts."""
    from megatron.core import parallel_state

    if _is_expert(parameter):
        return parallel_state.get_expert_tensor_parallel_group()
    return parallel_state.get_tensor_model_parallel_group()


def mtp_layers_of(config: Any) -> int:
    """How many MTP layers a model has: one if it is applied several times.

    Args:
        config: Megatron's.
    """
    layers = config.mtp_num_layers or 0
    return min(layers, 1) if getattr(config, "mtp_use_repeated_layer", False) else layers
