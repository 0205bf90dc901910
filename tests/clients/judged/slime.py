"""slime's and miles' attention and indexer, for ``python -m tests.clients.judge``.

Their own classes stand in the place of Hugging Face's attention. Plain torch computes what needs
CUDA: their TileLang kernels, Transformer Engine's layers and apex's rope. Casts to bf16 are left
out, and ``index_topk`` is that of the checkpoint: both programs have 2048 in their code.
"""

from __future__ import annotations

import importlib
import sys
import types
from unittest import mock

import torch
from torch import nn
from torch.nn.functional import rms_norm

from glm5_patch.config.huggingface import HFConfig


def slime(directory):
    """With rows of the indexer in the order that its converter writes."""
    return _swapped(directory, "slime", rope_last=True)


def slime_without_its_converter(directory):
    return _swapped(directory, "slime", rope_last=False)


def miles(directory):
    """With rows of the indexer in the order that its converter writes."""
    return _swapped(directory, "miles", rope_last=True)


class Linear(nn.Module):
    def __init__(self, input_size, output_size, *, config, **_):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(output_size, input_size))

    def forward(self, x):
        return x @ self.weight.T, None


class NormAndLinear(Linear):
    def __init__(self, input_size, output_size, **kwargs):
        super().__init__(input_size, output_size, **kwargs)
        self.layer_norm_weight = nn.Parameter(torch.ones(input_size))

    def forward(self, x):
        eps = self.config.layernorm_epsilon
        return super().forward(rms_norm(x, x.shape[-1:], self.layer_norm_weight, eps))


class KeyNorm(nn.LayerNorm):
    def __init__(self, hidden_size, config, eps):
        super().__init__(hidden_size, eps=eps)


class NoCore(nn.Module):
    def __init__(self, *_, **__):
        super().__init__()


def index_logits(q, k, weights, starts, ends, clean_logits=True):
    """q [s, n, d], k [t, d] -> [s, t]."""
    logits = (torch.einsum("shd,td->sht", q, k.view(len(k), -1)).relu() * weights[..., None]).sum(1)
    keys = torch.arange(len(k))
    visible = (keys >= starts[:, None]) & (keys < ends[:, None])
    return logits.masked_fill(~visible, float("-inf"))


def sparse_attention(width):
    def run(q, kv, indices, sm_scale):
        """q [s, n, d], kv [t, 1, d], indices [s, 1, k] with -1 in empty places."""
        keys, kv = indices[:, 0].long(), kv[:, 0]
        selected = torch.zeros(len(q), len(kv) + 1, dtype=torch.bool)
        selected.scatter_(1, keys % (len(kv) + 1), True)  # -1 goes to the spare last column
        scores = torch.einsum("shd,td->sht", q, kv) * sm_scale
        scores = scores.masked_fill(~selected[:, None, :-1], float("-inf"))
        return torch.einsum("sht,td->shd", scores.softmax(-1), kv[:, :width]), None

    return run


def rope(x, cu_seqlens, freqs):
    """x [s, n, r] of one sequence."""
    freqs = freqs.view(len(freqs), 1, -1)[: len(x)]
    first, second = x.chunk(2, -1)
    return x * freqs.cos() + torch.cat([-second, first], -1) * freqs.sin()


class NoReplay:
    def __getattr__(self, name):
        return lambda function, *args, **kwargs: function


def _module(name: str, **values) -> None:
    module = types.ModuleType(name)
    vars(module).update(values)
    sys.modules[name] = module


def _load(program: str, config):
    """The program's module."""
    from megatron.core.extensions import transformer_engine

    transformer_engine.TELinear = Linear
    transformer_engine.TEColumnParallelLinear = NormAndLinear
    root = f"{program}_plugins.models.glm5"
    attend = sparse_attention(config.kv_lora_rank)
    _module(f"{root}.ops.tilelang_indexer_fwd", indexer_fwd_interface=index_logits)
    _module(f"{root}.ops.tilelang_indexer_bwd", indexer_bwd_interface=None)
    _module(f"{root}.ops.tilelang_sparse_mla_fwd", sparse_mla_fwd_interface=attend)
    _module(f"{root}.ops.tilelang_sparse_mla_bwd", sparse_mla_bwd=None)
    _module("apex.transformer.functional", fused_apply_rotary_pos_emb_thd=rope)
    _module("miles.utils.replay_base", indexer_replay_manager=NoReplay())
    _module("miles.utils.hf_config", load_hf_config=None)
    for package in ("apex", "apex.transformer"):
        _module(package)
    module = importlib.import_module(f"{root}.glm5")
    gate = types.SimpleNamespace(apply=lambda x, weight, bias, dtype: x @ weight.T)
    module.WeightLinearFunction = gate  # a GEMM of Transformer Engine
    return module


def _config(hf: HFConfig):
    """As both programs' scripts for GLM-5.2 and ``get_glm5_spec`` set it."""
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    config = MLATransformerConfig(
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        num_attention_heads=hf.num_attention_heads,
        q_lora_rank=hf.q_lora_rank,
        kv_lora_rank=hf.kv_lora_rank,
        qk_head_dim=hf.qk_nope_head_dim,
        qk_pos_emb_head_dim=hf.qk_rope_head_dim,
        v_head_dim=hf.v_head_dim,
        qk_layernorm=True,
        layernorm_epsilon=hf.rms_norm_eps,
        add_bias_linear=False,
        rotary_base=hf.raw["rope_parameters"]["rope_theta"],
        rotary_scaling_factor=1.0,
        params_dtype=torch.float32,
        use_cpu_initialization=True,
        perform_initialization=False,
    )
    config.index_num_attention_heads = hf.index_n_heads
    for name in ("index_head_dim", "index_topk_freq", "index_skip_topk_offset"):
        setattr(config, name, hf.raw[name])
    config.indexer_rope_interleave = hf.raw["indexer_rope_interleave"]
    return config


class OnPacks(nn.Module):
    """Attention in a layer of Hugging Face's: a pack for each sequence, which all layers see."""

    def __init__(self, attention, packs):
        super().__init__()
        self.attention, self.packs = attention, packs

    def forward(self, hidden_states, **_):
        from megatron.core.packed_seq_params import PackedSeqParams

        s = hidden_states.shape[1]
        ends = torch.tensor([0, s], dtype=torch.int32)
        lengths = dict(cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=s, max_seqlen_kv=s)
        out = []
        for number, sequence in enumerate(hidden_states):
            pack = self.packs.setdefault(number, PackedSeqParams(qkv_format="thd", **lengths))
            found, _ = self.attention(sequence[:, None], None, packed_seq_params=pack)
            out.append(found[:, 0])
        return torch.stack(out), None, None


def _swapped(directory, program: str, rope_last: bool):
    from megatron.core import parallel_state
    from transformers import GlmMoeDsaForCausalLM

    parallel_state.get_tensor_model_parallel_group()  # raises outside of a world
    hf = HFConfig.from_directory(directory)
    config = _config(hf)
    module = _load(program, config)
    model = GlmMoeDsaForCausalLM.from_pretrained(directory)
    packs: dict = {}
    model.register_forward_pre_hook(lambda *_: packs.clear())
    for number, layer in enumerate(model.model.layers, 1):
        ours = module.DSAMLASelfAttention(
            config, _submodules(module), number, module.AttnMaskType.causal
        )
        ours.index_topk = hf.index_topk
        _fill(ours, layer.self_attn, hf, rope_last)
        layer.self_attn = OnPacks(ours, packs)

    def logits(ids):
        with mock.patch.object(torch.Tensor, "bfloat16", lambda x: x):
            return model(ids).logits

    return logits


def _submodules(module):
    return module.DSASelfAttentionSubmodules(
        linear_q_down_proj=Linear,
        linear_q_up_proj=NormAndLinear,
        linear_kv_down_proj=Linear,
        linear_kv_up_proj=NormAndLinear,
        core_attention=NoCore,
        linear_proj=Linear,
        q_layernorm=module.IdentityOp,
        kv_layernorm=module.IdentityOp,
        wq_b=Linear,
        wk=Linear,
        k_norm=KeyNorm,
        weights_proj=Linear,
    )


@torch.no_grad()
def _fill(ours, theirs, hf: HFConfig, rope_last: bool) -> None:
    for parameter, source in {
        ours.linear_q_down_proj.weight: theirs.q_a_proj,
        ours.linear_q_up_proj.weight: theirs.q_b_proj,
        ours.linear_q_up_proj.layer_norm_weight: theirs.q_a_layernorm,
        ours.linear_kv_down_proj.weight: theirs.kv_a_proj_with_mqa,
        ours.linear_kv_up_proj.weight: theirs.kv_b_proj,
        ours.linear_kv_up_proj.layer_norm_weight: theirs.kv_a_layernorm,
        ours.linear_proj.weight: theirs.o_proj,
    }.items():
        parameter.copy_(source.weight)
    indexer = theirs.indexer
    if indexer is None:
        return
    rows = torch.arange(hf.index_head_dim).roll(-hf.qk_rope_head_dim if rope_last else 0)
    heads = indexer.wq_b.weight.view(hf.index_n_heads, hf.index_head_dim, -1)
    ours.wq_b.weight.copy_(heads[:, rows].flatten(0, 1))
    ours.wk.weight.copy_(indexer.wk.weight[rows])
    ours.k_norm.weight.copy_(indexer.k_norm.weight[rows])
    ours.k_norm.bias.copy_(indexer.k_norm.bias[rows])
    ours.weights_proj.weight.copy_(indexer.weights_proj.weight)
