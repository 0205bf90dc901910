"""GLM-5 in plain torch, with each convention that implementations get wrong as a field.

The letters of the shapes: b sequences, s tokens, h hidden size, n heads, d the width of a head,
t keys, r the rotary width. It shares no code with ``attention`` or ``ops``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, one_hot, silu

NEAR_TIE = 1e-5
"""Two scores this close, relative to the largest of their row, may fall either way in fp32."""
HF_LATENT_NORM_EPS = 1e-6
"""Hugging Face's latent norms have the default of their class, whatever ``rms_norm_eps`` is."""


@dataclass(frozen=True)
class Yarn:
    """A scaled rope, as in Megatron's ``MLATransformerConfig`` and DeepSeek-V3's config.json."""

    factor: float = 40.0
    original_length: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def amplitude(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0


@dataclass(frozen=True)
class Conventions:
    """What an implementation does. ``of`` gives GLM-5's; the names with ``index_`` change only
    which keys are selected, so they have no effect on the first ``index_topk`` tokens."""

    rope_theta: float
    rope_width: int
    """The divisor of the exponents of the frequencies."""
    softmax_scale: float
    rms_norm_eps: float
    routed_scaling_factor: float
    index_topk: int | None
    """None: every query attends to all keys."""
    index_computing_layers: tuple[int, ...]
    """Numbers of the layers that run their indexer, from 1."""
    rope_pairing: Literal["interleaved", "half", "none"] = "interleaved"
    rope_place: Literal["first", "last"] = "last"
    """Of the rotary part of a head of q_b_proj."""
    yarn: Yarn | None = None
    q_latent_norm_eps: float = HF_LATENT_NORM_EPS
    kv_latent_norm_eps: float = HF_LATENT_NORM_EPS
    router_scores: Literal["sigmoid", "softmax"] = "sigmoid"
    router_bias: Literal["selects", "unused", "selects and weighs"] = "selects"
    router_normalizes: bool = True
    shared_experts: bool = True
    mlp_gate: Literal["gate_proj", "up_proj"] = "gate_proj"
    """Which half of an MLP goes through silu."""
    output_layer: Literal["lm_head", "embedding"] = "lm_head"
    causal: bool = True
    """Whether a query sees only the keys up to itself, in the attention and in the selection."""
    empty_places: Literal["nothing", "later keys", "key 0", "last key"] = "nothing"
    """What the places of a top-k attend to where a query has fewer keys."""
    index_rope_pairing: Literal["interleaved", "half", "none"] = "interleaved"
    index_rope_place: Literal["first", "last"] = "first"
    index_query: Literal["normalised", "raw"] = "normalised"
    """The query latent that wq_b gets: after or before q_a_layernorm."""
    index_input: Literal["normalised", "residual"] = "normalised"
    """What wk and weights_proj get: after or before input_layernorm."""
    index_relu: bool = True
    index_k_norm: Literal["layer", "rms", "none"] = "layer"
    index_k_norm_eps: float = 1e-6
    index_hadamard: Literal["none or both", "one side"] = "none or both"
    index_weights: Literal["signed", "equal"] = "signed"
    """How the heads are added up: by weights_proj or with equal weights."""
    index_skip_layers: Literal["share", "all keys"] = "share"
    """What a skip layer attends to: its source's top-k or everything before it."""
    index_source: Literal["last", "first"] = "last"
    """The computing layer whose top-k a skip layer reuses."""

    @classmethod
    def of(cls, config: SimpleNamespace) -> Conventions:
        """GLM-5's, for the fields of a config.json."""
        types = enumerate(config.indexer_types, 1)
        return cls(
            rope_theta=config.rope_parameters["rope_theta"],
            rope_width=config.qk_rope_head_dim,
            softmax_scale=config.qk_head_dim**-0.5,
            rms_norm_eps=config.rms_norm_eps,
            routed_scaling_factor=config.routed_scaling_factor,
            index_topk=config.index_topk,
            index_computing_layers=tuple(n for n, kind in types if kind == "full"),
        )


@dataclass
class Forward:
    """What a forward gives."""

    logits: Tensor
    """[b, s, vocab]."""
    hidden: list[Tensor]
    """Of the output of each layer, [b, s, h]."""
    intact: Tensor
    """bool [b, s]: tokens that no near tie, of keys or of experts, has touched."""


class Reference:
    """A GLM-5 with given weights, under any conventions.

    Args:
        config: the fields of a config.json.
        weights: published name -> fp32 tensor.
    """

    def __init__(self, config: SimpleNamespace, weights: dict[str, Tensor]):
        self.config = config
        self.weights = dict(weights)
        for layer, kind in enumerate(config.mlp_layer_types):
            if kind == "sparse":
                self._stack_experts(f"model.layers.{layer}.mlp.experts.")

    def _stack_experts(self, prefix: str) -> None:
        for kind in ("gate_proj", "up_proj", "down_proj"):
            names = [f"{prefix}{n}.{kind}.weight" for n in range(self.config.n_routed_experts)]
            self.weights[f"{prefix}{kind}"] = torch.stack([self.weights.pop(n) for n in names])

    @torch.no_grad()
    def __call__(self, ids: Tensor, conventions: Conventions) -> Forward:
        """ids int64 [b, s]."""
        return _Run(self, conventions, ids).forward(ids)


class _Run:
    """One forward: its rope tables, its masks and the last top-k."""

    def __init__(self, model: Reference, conventions: Conventions, ids: Tensor):
        self.config, self.w, self.c = model.config, model.weights, conventions
        b, s = ids.shape
        embedding = self.w["model.embed_tokens.weight"]
        self.cos, self.sin = rope_table(conventions, model.config.qk_rope_head_dim, s, embedding)
        visible = torch.ones(s, s, dtype=torch.bool)
        self.visible = visible.tril() if conventions.causal else visible  # [s, t]
        self.intact = torch.ones(b, s, dtype=torch.bool)
        self.selected: dict[int, Tensor] = {}
        """Number of a computing layer -> bool [b, s, t]."""

    def forward(self, ids: Tensor) -> Forward:
        x = self.w["model.embed_tokens.weight"][ids]  # [b, s, h]
        hidden = []
        for number in range(1, self.config.num_hidden_layers + 1):
            layer = f"model.layers.{number - 1}."
            x = x + self.attention(number, f"{layer}self_attn.", x, self.norm(x, f"{layer}input_"))
            normed = self.norm(x, f"{layer}post_attention_")
            kind = self.config.mlp_layer_types[number - 1]
            x = x + (self.mlp if kind == "dense" else self.moe)(f"{layer}mlp.", normed)
            hidden.append(x)
        normed = rms_norm(x, self.w["model.norm.weight"], self.c.rms_norm_eps)
        name = "lm_head" if self.c.output_layer == "lm_head" else "model.embed_tokens"
        return Forward(linear(normed, self.w[f"{name}.weight"]), hidden, self.intact)

    def norm(self, x: Tensor, which: str) -> Tensor:
        return rms_norm(x, self.w[f"{which}layernorm.weight"], self.c.rms_norm_eps)

    def attention(self, number: int, layer: str, residual: Tensor, x: Tensor) -> Tensor:
        c, config, w = self.c, self.config, self.w
        b, s, _ = x.shape
        nope, rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        raw = linear(x, w[f"{layer}q_a_proj.weight"])  # [b, s, q_lora_rank]
        q_latent = rms_norm(raw, w[f"{layer}q_a_layernorm.weight"], c.q_latent_norm_eps)
        q = linear(q_latent, w[f"{layer}q_b_proj.weight"]).view(b, s, -1, nope + rope)
        if c.rope_place == "last":
            q_nope, q_rope = q.split([nope, rope], dim=-1)  # [b, s, n, d]
        else:
            q_rope, q_nope = q.split([rope, nope], dim=-1)
        latent = linear(x, w[f"{layer}kv_a_proj_with_mqa.weight"])
        latent, k_rope = latent.split([config.kv_lora_rank, rope], dim=-1)
        latent = rms_norm(latent, w[f"{layer}kv_a_layernorm.weight"], c.kv_latent_norm_eps)
        up = linear(latent, w[f"{layer}kv_b_proj.weight"]).view(b, s, -1, nope + config.v_head_dim)
        k_nope, value = up.split([nope, config.v_head_dim], dim=-1)
        q_rope = self.rotate(q_rope, c.rope_pairing)
        k_rope = self.rotate(k_rope[:, :, None], c.rope_pairing)[:, :, 0]  # [b, t, r]

        scores = torch.einsum("bsnd,btnd->bnst", q_nope, k_nope)
        scores = scores + torch.einsum("bsnd,btd->bnst", q_rope, k_rope)
        scores = scores * self.softmax_scale()
        query = q_latent if c.index_query == "normalised" else raw
        source = x if c.index_input == "normalised" else residual
        selected = self.selection(number, layer, source, query)  # [b, s, t]
        scores = scores.masked_fill(~selected[:, None], float("-inf"))
        if c.empty_places == "key 0" and c.index_topk is not None:
            empty = (c.index_topk - self.visible.sum(-1)).clamp(min=0)  # [s]
            scores[..., 0] += (1 + empty).to(scores).log()  # key 0 counts so many times
        out = torch.einsum("bnst,btnd->bsnd", scores.softmax(-1), value)
        return linear(out.flatten(2), w[f"{layer}o_proj.weight"])

    def softmax_scale(self) -> float:
        yarn = self.c.yarn
        if yarn is None or not yarn.mscale_all_dim:
            return self.c.softmax_scale
        return self.c.softmax_scale * yarn.amplitude(yarn.mscale_all_dim) ** 2

    def rotate(self, x: Tensor, pairing: str) -> Tensor:
        """x [b, s, n, r]."""
        cos, sin = self.cos[:, None], self.sin[:, None]  # [s, 1, r / 2]
        if pairing == "none":
            return x
        if pairing == "half":
            first, second = x.chunk(2, dim=-1)
        else:
            first, second = x[..., 0::2], x[..., 1::2]
        # Queries and keys leave in one order, whichever it is: only their products count.
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def selection(self, number: int, layer: str, x: Tensor, q_latent: Tensor) -> Tensor:
        """bool [b, s, t]: the keys that this layer attends to."""
        c = self.c
        everything = self.visible.expand(len(x), -1, -1)
        if c.index_topk is None:
            return everything
        if number in c.index_computing_layers:
            self.selected[number] = self.top(self.index_scores(layer, x, q_latent))
            return self.selected[number]
        if c.index_skip_layers == "all keys":
            return everything
        return self.selected[(max if c.index_source == "last" else min)(self.selected)]

    def index_scores(self, layer: str, x: Tensor, q_latent: Tensor) -> Tensor:
        """[b, s, t]. Positive factors are left out: they change no order."""
        c, config, w = self.c, self.config, self.w
        b, s, _ = x.shape
        q = linear(q_latent, w[f"{layer}indexer.wq_b.weight"])
        q = self.rotate_index(q.view(b, s, config.index_n_heads, -1))  # [b, s, n, d]
        k = self.norm_index_key(
            f"{layer}indexer.k_norm.", linear(x, w[f"{layer}indexer.wk.weight"])
        )
        k = self.rotate_index(k[:, :, None])[:, :, 0]  # [b, t, d]
        if c.index_hadamard == "one side":
            q = q @ hadamard(config.index_head_dim)
        per_head = torch.einsum("bsnd,btd->bsnt", q, k)
        if c.index_relu:
            per_head = per_head.relu()
        if c.index_weights == "equal":
            return per_head.sum(2)
        return torch.einsum(
            "bsn,bsnt->bst", linear(x, w[f"{layer}indexer.weights_proj.weight"]), per_head
        )

    def norm_index_key(self, name: str, k: Tensor) -> Tensor:
        kind, weight, eps = self.c.index_k_norm, self.w[f"{name}weight"], self.c.index_k_norm_eps
        if kind == "layer":
            return layer_norm(k, weight.shape, weight, self.w[f"{name}bias"], eps)
        return k if kind == "none" else rms_norm(k, weight, eps)

    def rotate_index(self, x: Tensor) -> Tensor:
        """x [b, s, n, d]."""
        rope = self.config.qk_rope_head_dim
        if self.c.index_rope_place == "first":
            parts = self.rotate(x[..., :rope], self.c.index_rope_pairing), x[..., rope:]
        else:
            parts = x[..., :-rope], self.rotate(x[..., -rope:], self.c.index_rope_pairing)
        return torch.cat(parts, dim=-1)

    def top(self, scores: Tensor) -> Tensor:
        """bool [b, s, t]: the keys of the ``index_topk`` largest scores, lower positions first
        among equals."""
        k, s = self.c.index_topk, scores.shape[1]
        scores = scores.masked_fill(~self.visible, float("-inf"))
        values, order = scores.sort(dim=-1, descending=True, stable=True)
        if k < s:
            largest = scores.masked_fill(~self.visible, 0).abs().amax(-1)
            near = values[..., k - 1] - values[..., k] <= NEAR_TIE * largest
            self.touch(near & (self.visible.sum(-1) > k))  # the others select all that they see
        selected = torch.zeros_like(scores, dtype=torch.bool)
        selected.scatter_(-1, order[..., :k], True)
        if self.c.empty_places == "later keys":
            return selected
        selected &= self.visible
        if self.c.empty_places == "last key":
            selected[..., -1] |= self.visible.sum(-1) < k
        return selected

    def touch(self, near: Tensor) -> None:
        """A token with a near tie, bool [b, s], and those that see it may differ from here on."""
        touched = near.long().cumsum(-1) if self.c.causal else near.any(-1, keepdim=True)
        self.intact &= touched == 0

    def mlp(self, name: str, x: Tensor) -> Tensor:
        w = self.w
        gate = linear(x, w[f"{name}gate_proj.weight"])
        up = linear(x, w[f"{name}up_proj.weight"])
        return linear(self.gated(gate, up), w[f"{name}down_proj.weight"])

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return silu(gate) * up if self.c.mlp_gate == "gate_proj" else gate * silu(up)

    def moe(self, name: str, x: Tensor) -> Tensor:
        w, c = self.w, self.c
        weights = self.route(name, x)  # [b, s, e]; 0 of an expert that is not selected
        gate = torch.einsum("bsh,eih->bsei", x, w[f"{name}experts.gate_proj"])
        up = torch.einsum("bsh,eih->bsei", x, w[f"{name}experts.up_proj"])
        down = w[f"{name}experts.down_proj"]
        out = torch.einsum("bsei,ehi->bsh", self.gated(gate, up) * weights[..., None], down)
        return out + self.mlp(f"{name}shared_experts.", x) if c.shared_experts else out

    def route(self, name: str, x: Tensor) -> Tensor:
        c, k = self.c, self.config.num_experts_per_tok
        logits = linear(x, self.w[f"{name}gate.weight"])  # [b, s, e]
        scores = logits.sigmoid() if c.router_scores == "sigmoid" else logits.softmax(-1)
        biased = scores + self.w[f"{name}gate.e_score_correction_bias"]
        values, order = (scores if c.router_bias == "unused" else biased).sort(-1, descending=True)
        self.touch(values[..., k - 1] - values[..., k] <= NEAR_TIE)
        selected = one_hot(order[..., :k], scores.shape[-1]).sum(-2)
        weights = (biased if c.router_bias == "selects and weighs" else scores) * selected
        if c.router_normalizes:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights * c.routed_scaling_factor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def hadamard(size: int) -> Tensor:
    """The orthonormal matrix [size, size] of Sylvester's construction; size is a power of 2."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix]), torch.cat([matrix, -matrix])], 1)
    return matrix * size**-0.5


def rope_table(c: Conventions, rope_dim: int, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, each [s, r / 2]."""
    pairs = torch.arange(rope_dim // 2, dtype=like.dtype)
    frequencies = c.rope_theta ** (-2 * pairs / c.rope_width)
    amplitude = 1.0
    if c.yarn is not None:
        yarn = c.yarn

        def pair_of(turns: float) -> float:
            """The pair that makes so many turns in the original length."""
            period = yarn.original_length / (turns * 2 * math.pi)
            return c.rope_width * math.log(period) / (2 * math.log(c.rope_theta))

        low = max(math.floor(pair_of(yarn.beta_fast)), 0)
        high = min(math.ceil(pair_of(yarn.beta_slow)), c.rope_width - 1)
        slowed = ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)
        frequencies = frequencies * (1 - slowed + slowed / yarn.factor)
        amplitude = yarn.amplitude(yarn.mscale) / yarn.amplitude(yarn.mscale_all_dim)
    angles = torch.outer(torch.arange(length, dtype=like.dtype), frequencies)
    return angles.cos() * amplitude, angles.sin() * amplitude
