"""A GLM-5 small enough for a test, on both sides."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from glm5_patch.attention.build import (
    HF_LATENT_NORM_EPSILON,
    gpt_model,
    set_latent_norm_epsilon,
    transformer_config,
)
from glm5_patch.checkpoint.reader import HFCheckpoint
from glm5_patch.config.huggingface import HFConfig
from glm5_patch.tools.verify import forward, randomize

SHARING = {"index_topk_freq": 4, "index_skip_topk_offset": 3}
FLAVOURS = {"5.2": SHARING, "5.1": {}}
RMS_NORM_EPS = 3e-5
"""Neither that of k_norm and of Hugging Face's latent norms (1e-6) nor a default (1e-5)."""
SMALL = ("q_a_proj.weight", "kv_a_proj_with_mqa.weight", "indexer.wk.weight")
"""What goes into a latent norm or into k_norm."""

transformers.utils.logging.disable_progress_bar()


def hf_config(index_topk: int = 9, flavour: str = "5.2", **changes):
    """Every size differs from the others and from every library's default, so that a setting that
    is dropped, or taken for its neighbour, shows in a shape or in a result."""
    fields = dict(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=112,
        moe_intermediate_size=72,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=6,
        n_shared_experts=2,
        n_routed_experts=10,
        num_experts_per_tok=3,
        routed_scaling_factor=1.7,
        q_lora_rank=48,
        kv_lora_rank=56,
        qk_nope_head_dim=24,
        qk_rope_head_dim=16,
        v_head_dim=80,
        index_topk=index_topk,
        index_head_dim=32,
        index_n_heads=4,
        rms_norm_eps=RMS_NORM_EPS,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 8e6 if flavour == "5.2" else 1e6,
        },
        pad_token_id=None,
    )
    return transformers.GlmMoeDsaConfig(**{**fields, **FLAVOURS[flavour], **changes})


def hf_model(config, seed: int = 0, small: tuple[str, ...] = SMALL):
    torch.manual_seed(seed)
    model = transformers.GlmMoeDsaForCausalLM(config).float()
    model.set_attn_implementation("eager")
    randomize(model)
    # The epsilon of a norm shows only where the variance of its input is about as small.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(small):
                parameter.mul_(0.01)
    return model


def saved(directory: Path, seed: int = 0, **config) -> HFCheckpoint:
    hf_model(hf_config(**config), seed).save_pretrained(directory)
    return HFCheckpoint(directory)


def add_mtp_layer(directory: Path) -> dict[str, torch.Tensor]:
    """Give a saved model of 8 layers an MTP layer, which transformers lacks; its tensors."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    h, dtype = tensors["model.norm.weight"].numel(), tensors["model.norm.weight"].dtype
    made = {
        name.replace(".layers.6.", ".layers.8."): torch.randn_like(tensor)
        for name, tensor in tensors.items()
        if name.startswith("model.layers.6.")  # a MoE layer that computes its top-k
    }
    for name, shape in {
        "enorm.weight": (h,),
        "hnorm.weight": (h,),
        "eh_proj.weight": (h, 2 * h),
        "shared_head.norm.weight": (h,),
    }.items():
        made[f"model.layers.8.{name}"] = torch.randn(shape, dtype=dtype)
    save_file({**tensors, **made}, path, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    return made


def megatron_config(hf: HFConfig, **overrides):
    defaults = dict(
        transformer_impl="local",
        params_dtype=torch.float32,
        use_cpu_initialization=True,
        perform_initialization=False,
        moe_token_dispatcher_type="allgather",
    )
    return transformer_config(hf, **{**defaults, **overrides})


def megatron_model(checkpoint: HFCheckpoint, **overrides):
    """The loaded model; its latent norms have Hugging Face's epsilon and not ``rms_norm_eps``."""
    model = gpt_model(checkpoint.config, megatron_config(checkpoint.config, **overrides))
    set_latent_norm_epsilon(model, HF_LATENT_NORM_EPSILON)
    checkpoint.load_into(model)
    return model


def tokens(seed: int, batch: int, length: int) -> torch.Tensor:
    return torch.randint(96, (batch, length), generator=torch.Generator().manual_seed(seed))


class Operations(TorchDispatchMode):
    """The names of what is computed while it is entered, in order."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def packed(lengths):
    from megatron.core.packed_seq_params import PackedSeqParams  # not every test has megatron-core

    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    longest = max(lengths)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def pack_forward(model, ids, packed_seq_params):
    positions = torch.cat([torch.arange(n) for n in packed_seq_params.cu_seqlens_q.diff().tolist()])
    return model(ids, positions[None], None, packed_seq_params=packed_seq_params)


def loss_of(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def megatron_loss(model, ids: torch.Tensor) -> torch.Tensor:
    return loss_of(forward(model, ids), ids)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()
