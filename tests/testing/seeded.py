"""Hugging Face's GLM-5 with each known fault put in by hand: in its weights, its modules or its
functions. Nothing here uses the reference that names them."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch.nn.functional import linear
from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as modeling

from glm5_patch.testing.oracle.checkpoint import SIZES

SIZE = SimpleNamespace(**SIZES)
ROPE, NOPE, TOPK = SIZE.qk_rope_head_dim, SIZE.qk_nope_head_dim, SIZE.index_topk
HALF_AS_PAIRS = torch.arange(ROPE).view(2, -1).T.flatten()
"""Rows in this order: a rope of the pairs (2i, 2i + 1) then rotates what was (i, i + r/2)."""


class Proxy:
    """A module with some of its functions replaced."""

    def __init__(self, module, **functions):
        self._module = module
        vars(self).update(functions)

    def __getattr__(self, name):
        return getattr(self._module, name)


def load(directory) -> GlmMoeDsaForCausalLM:
    return GlmMoeDsaForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()


def attentions(model):
    return [layer.self_attn for layer in model.model.layers]


def indexers(model):
    return [attention.indexer for attention in attentions(model) if attention.indexer is not None]


def gates(model):
    return [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]


def reorder_indexer(model, order):
    """The rows that make a head of the queries, and the key."""
    for indexer in indexers(model):
        query = indexer.wq_b.weight.data
        query.copy_(query.view(SIZE.index_n_heads, -1, query.shape[1])[:, order].flatten(0, 1))
        for tensor in (indexer.wk.weight, indexer.k_norm.weight, indexer.k_norm.bias):
            tensor.data.copy_(tensor.data[order])


def indexer_rope_slice(model, patch):
    reorder_indexer(model, torch.arange(SIZE.index_head_dim).roll(ROPE))


def indexer_rope_half_split(model, patch):
    rest = torch.arange(ROPE, SIZE.index_head_dim)
    reorder_indexer(model, torch.cat([HALF_AS_PAIRS, rest]))


def without_rope(of_indexer):
    def seed(model, patch):
        rotate = modeling.apply_rotary_pos_emb_interleave

        def apply(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
            if (unsqueeze_dim == 2) == of_indexer:
                return q, k
            return rotate(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)

        patch.setattr(modeling, "apply_rotary_pos_emb_interleave", apply)

    return seed


def reorder_queries(model, order):
    for attention in attentions(model):
        rows = attention.q_b_proj.weight.data
        heads = rows.view(SIZE.num_attention_heads, -1, rows.shape[1])
        rows.copy_(heads[:, order].flatten(0, 1))


def rope_half_split(model, patch):
    reorder_queries(model, torch.cat([torch.arange(NOPE), NOPE + HALF_AS_PAIRS]))
    for attention in attentions(model):
        rows = attention.kv_a_proj_with_mqa.weight.data[SIZE.kv_lora_rank :]
        rows.copy_(rows[HALF_AS_PAIRS])


def rope_slice(model, patch):
    reorder_queries(model, torch.arange(NOPE + ROPE).roll(-ROPE))


def rope(**changes):
    """Of the base, of the width that the frequencies are spread over, of YaRN's options."""

    def seed(model, patch):
        rotary = model.model.rotary_emb
        own = dict(theta=8e6, width=ROPE, yarn={}) | getattr(rotary, "seeded", {}) | changes
        rotary.seeded = own
        parameters = dict(
            rope_type="yarn" if own["yarn"] else "default",
            rope_theta=own["theta"],
            **own["yarn"],
        )
        config = GlmMoeDsaConfig(**SIZES, rope_parameters=parameters)
        config.head_dim = own["width"]
        make = (
            ROPE_INIT_FUNCTIONS["yarn"] if own["yarn"] else rotary.compute_default_rope_parameters
        )
        inv_freq, rotary.attention_scaling = make(config)
        rotary.inv_freq = inv_freq[: ROPE // 2]
        if "mscale_all_dim" in changes.get("yarn", {}):
            for attention in attentions(model):
                attention.scaling *= (0.1 * math.log(40) + 1) ** 2

    return seed


YARN = dict(factor=40.0, original_max_position_embeddings=4096, beta_fast=32, beta_slow=1)


def softmax_scale(width):
    def seed(model, patch):
        for attention in attentions(model):
            attention.scaling *= (width / (NOPE + ROPE)) ** -0.5

    return seed


def epsilon(value, *names):
    def seed(model, patch):
        for layer in model.model.layers:
            for name in names:
                norm = layer.get_submodule(name) if "model." not in name else model.model.norm
                norm.variance_epsilon = value

    return seed


Q_NORM, KV_NORM = "self_attn.q_a_layernorm", "self_attn.kv_a_layernorm"
LAYER_NORMS = "input_layernorm", "post_attention_layernorm", "model.norm"


def router_bias_unused(model, patch):
    for gate in gates(model):
        gate.e_score_correction_bias.zero_()


def router(of_logits, with_bias=False):
    """Another gate in place of Hugging Face's."""

    def seed(model, patch):
        def forward(gate):
            def run(x):
                logits = linear(x.view(-1, x.shape[-1]), gate.weight)
                scores = of_logits(logits)
                biased = scores + gate.e_score_correction_bias
                chosen = biased.topk(gate.top_k).indices
                weights = (biased if with_bias else scores).gather(1, chosen)
                weights = weights / weights.sum(-1, keepdim=True) * gate.routed_scaling_factor
                return logits, weights, chosen

            return run

        for gate in gates(model):
            gate.forward = forward(gate)

    return seed


def of_gates(name, value):
    def seed(model, patch):
        for gate in gates(model):
            setattr(gate, name, value)

    return seed


def shared_experts_missing(model, patch):
    for layer in model.model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.shared_experts.down_proj.weight.data.zero_()


def mlp_halves_swapped(model, patch):
    for module in model.modules():
        if isinstance(module, modeling.GlmMoeDsaMLP):
            module.gate_proj, module.up_proj = module.up_proj, module.gate_proj
        elif isinstance(module, modeling.GlmMoeDsaExperts):
            halves = module.gate_up_proj.data
            halves.copy_(halves.roll(SIZE.moe_intermediate_size, 1))


def tied_embeddings(model, patch):
    model.lm_head.weight = model.model.embed_tokens.weight


def causal_mask_missing(model, patch):
    def no_mask(inputs_embeds, **kwargs):
        b, s, _ = inputs_embeds.shape
        return torch.zeros(b, 1, s, s)

    patch.setattr(modeling, "create_causal_mask", no_mask)


def attention_mask(change):
    """``change`` gets a layer's additive mask [b, 1, s, t], and the queries with empty places."""

    def seed(model, patch):
        attend = modeling.eager_attention_forward

        def run(module, query, key, value, mask, **kwargs):
            mask = mask.clone()
            change(mask, torch.arange(TOPK - 1))
            return attend(module, query, key, value, mask, **kwargs)

        patch.setattr(modeling, "eager_attention_forward", run)

    return seed


def later_keys(mask, rows):
    mask[:, :, rows, :TOPK] = 0


def key_0(mask, rows):
    mask[:, :, rows, 0] = (TOPK - rows).float().log()  # itself, and TOPK - (row + 1) empty places


def last_key(mask, rows):
    mask[:, :, rows, -1] = 0


def indexer_raw_query_latent(model, patch):
    for attention in attentions(model):
        if attention.indexer is None:
            continue
        kept = {}
        attention.q_a_proj.register_forward_hook(
            lambda module, args, output, kept=kept: kept.update(raw=output)
        )
        attention.indexer.register_forward_pre_hook(
            lambda module, args, kept=kept: (args[0], kept["raw"], *args[2:])
        )


def indexer_residual_input(model, patch):
    for layer in model.model.layers:
        if layer.self_attn.indexer is None:
            continue
        kept = {}
        layer.input_layernorm.register_forward_pre_hook(
            lambda module, args, kept=kept: kept.update(residual=args[0])
        )
        layer.self_attn.indexer.register_forward_pre_hook(
            lambda module, args, kept=kept: (kept["residual"], *args[1:])
        )


def indexer_relu_missing(model, patch):
    patch.setattr(modeling, "F", Proxy(modeling.F, relu=lambda x: x))


def indexer_k_norm(norm):
    def seed(model, patch):
        for indexer in indexers(model):
            indexer.k_norm = norm(indexer.k_norm)

    return seed


def with_epsilon(value):
    def norm(layer_norm):
        layer_norm.eps = value
        return layer_norm

    return norm


def rms(layer_norm):
    norm = torch.nn.RMSNorm(layer_norm.normalized_shape, eps=layer_norm.eps)
    norm.weight = layer_norm.weight
    return norm


def indexer_hadamard_one_side(model, patch):
    size = range(SIZE.index_head_dim)
    signs = [[(-1.0) ** (i & j).bit_count() for j in size] for i in size]
    rotation = torch.tensor(signs) * SIZE.index_head_dim**-0.5

    def matmul(left, right):
        of_queries = left.shape[-2:] == (SIZE.index_n_heads, len(rotation))
        return torch.matmul(left @ rotation if of_queries else left, right)

    patch.setattr(modeling, "torch", Proxy(modeling.torch, matmul=matmul))


def indexer_weights_unused(model, patch):
    for indexer in indexers(model):
        weight = torch.nn.Linear(SIZE.hidden_size, SIZE.index_n_heads)
        weight.weight.data.zero_()
        weight.bias.data.fill_(1.0)
        indexer.weights_proj = weight


def indexer_unused(model, patch):
    for indexer in indexers(model):
        indexer.index_topk = 10**6


def skip_layers(topk_of):
    """``topk_of`` gets the top-k that a skip layer is handed, and that of the first layer."""

    def seed(model, patch):
        first = {}

        def keep(module, args, output):
            first["topk"] = output

        def hand(module, args, kwargs):
            given = kwargs["prev_topk_indices"]
            return args, {**kwargs, "prev_topk_indices": topk_of(given, first["topk"])}

        indexers(model)[0].register_forward_hook(keep)
        for attention in attentions(model):
            if attention.indexer is None:
                attention.register_forward_pre_hook(hand, with_kwargs=True)

    return seed


def everything(given, first):
    b, s, _ = given.shape
    return torch.arange(s, dtype=given.dtype).expand(b, s, s)


def schedule_offset_1(model, patch):
    attentions(model)[1].indexer = None


SEEDED = {
    "rope_half_split": rope_half_split,
    "rope_missing": without_rope(of_indexer=False),
    "rope_slice": rope_slice,
    "rope_theta_default": rope(theta=1e4),
    "rope_theta_other_release": rope(theta=1e6),
    "rope_width_head_dim": rope(width=SIZE.head_dim),
    "rope_width_qk_head_dim": rope(width=NOPE + ROPE),
    "yarn_megatron": rope(yarn=YARN),
    "yarn_deepseek": rope(yarn=dict(YARN, mscale=1.0, mscale_all_dim=1.0)),
    "softmax_scale_nope": softmax_scale(NOPE),
    "softmax_scale_value": softmax_scale(SIZE.v_head_dim),
    "softmax_scale_latent": softmax_scale(SIZE.kv_lora_rank + ROPE),
    "latent_norm_eps": epsilon(SIZE.rms_norm_eps, Q_NORM, KV_NORM),
    "q_latent_norm_eps": epsilon(SIZE.rms_norm_eps, Q_NORM),
    "kv_latent_norm_eps": epsilon(SIZE.rms_norm_eps, KV_NORM),
    "latent_norm_eps_default": epsilon(1e-5, Q_NORM, KV_NORM),
    "rms_norm_eps_default": epsilon(1e-5, *LAYER_NORMS),
    "rms_norm_eps_class_default": epsilon(1e-6, *LAYER_NORMS),
    "router_bias_unused": router_bias_unused,
    "router_bias_in_weights": router(torch.sigmoid, with_bias=True),
    "router_softmax": router(lambda logits: logits.softmax(-1)),
    "router_not_normalised": of_gates("norm_topk_prob", False),
    "routed_scaling_missing": of_gates("routed_scaling_factor", 1.0),
    "routed_scaling_default": of_gates("routed_scaling_factor", 2.5),
    "shared_experts_missing": shared_experts_missing,
    "mlp_halves_swapped": mlp_halves_swapped,
    "tied_embeddings": tied_embeddings,
    "causal_mask_missing": causal_mask_missing,
    "padding_later_keys": attention_mask(later_keys),
    "padding_key_0": attention_mask(key_0),
    "padding_last_key": attention_mask(last_key),
    "indexer_rope_slice": indexer_rope_slice,
    "indexer_rope_half_split": indexer_rope_half_split,
    "indexer_rope_missing": without_rope(of_indexer=True),
    "indexer_raw_query_latent": indexer_raw_query_latent,
    "indexer_residual_input": indexer_residual_input,
    "indexer_relu_missing": indexer_relu_missing,
    "indexer_k_norm_eps": indexer_k_norm(with_epsilon(1e-5)),
    "indexer_k_norm_eps_of_layers": indexer_k_norm(with_epsilon(SIZE.rms_norm_eps)),
    "indexer_k_norm_rms": indexer_k_norm(rms),
    "indexer_k_norm_missing": indexer_k_norm(lambda norm: torch.nn.Identity()),
    "indexer_hadamard_one_side": indexer_hadamard_one_side,
    "indexer_weights_unused": indexer_weights_unused,
    "indexer_unused": indexer_unused,
    "skip_layers_dense": skip_layers(everything),
    "skip_layers_first_source": skip_layers(lambda given, first: first),
    "schedule_offset_1": schedule_offset_1,
}
"""Fault -> what puts it into a model of GLM-5.2; the second argument is pytest's MonkeyPatch."""
SCHEDULES = {
    "schedule_offset_2": dict(index_topk_freq=2),
    "schedule_from_zero": dict(index_topk_freq=2, index_skip_topk_offset=4),
    "schedule_freq_lost": dict(index_topk_freq=1),
}
"""Fault -> the schedule of the class; it runs indexers that no GLM-5 has."""


def with_schedule(**schedule):
    """A function that builds the model from a directory."""

    def build(directory):
        config = GlmMoeDsaConfig.from_pretrained(directory)
        wrong = GlmMoeDsaConfig(**SIZES, **schedule)
        config.indexer_types = wrong.indexer_types
        return GlmMoeDsaForCausalLM.from_pretrained(directory, config=config)

    return build
