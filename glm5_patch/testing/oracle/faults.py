"""The known faults: what implementations of GLM-5 get wrong, each as a change of the conventions.

A fault that no logit shows is not here: a positive factor on the indexer's scores (its softmax
scale, the scale of ``weights_proj``) changes no selection, and neither does a Hadamard rotation of
both queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from ...errors import GLM5PatchError
from .checkpoint import computing_layers
from .reference import Conventions, Yarn


@dataclass(frozen=True)
class Fault:
    """One row of the table."""

    id: str
    means: str
    """What the implementation does, and what GLM-5 does."""
    look_at: str
    """Where in an implementation this is decided."""
    changes: dict[str, Any]
    """Field of ``Conventions`` -> its wrong value, or a function of the configuration."""
    all_indexers: bool = False
    """It runs indexers of skip layers. A checkpoint of GLM-5 has none there, so it shows only on
    one that has them."""

    @property
    def selects(self) -> bool:
        """Whether it changes only which keys are selected."""
        return all(name.startswith("index_") for name in self.changes)

    @property
    def leaks(self) -> bool:
        """Whether the first tokens then depend on all others, and so on the selection."""
        return "causal" in self.changes or self.changes.get("empty_places") == "last key"

    def applied(self, conventions: Conventions, config: SimpleNamespace) -> Conventions:
        values = {k: v(config) if callable(v) else v for k, v in self.changes.items()}
        return replace(conventions, **values)


def _computing(freq: int | None = None, offset: int | None = None) -> Callable:
    """The computing layers of another schedule."""

    def layers(config: SimpleNamespace) -> tuple[int, ...]:
        return computing_layers(
            config.num_hidden_layers,
            freq or config.index_topk_freq,
            config.index_skip_topk_offset if offset is None else offset,
        )

    return layers


FAULTS = (
    Fault(
        "rope_half_split",
        "The attention's rope rotates the pairs (i, i + r/2); GLM-5's rotates (2i, 2i + 1).",
        "the attention's rope function; rotary_interleaved, rope_interleave",
        dict(rope_pairing="half"),
    ),
    Fault(
        "rope_missing",
        "The attention has no rope.",
        "position_embedding_type, and whether the rope function is called",
        dict(rope_pairing="none"),
    ),
    Fault(
        "rope_slice",
        "A query's head is split as [rope | nope]; q_b_proj makes [nope | rope].",
        "the split of q_b_proj's output",
        dict(rope_place="first"),
    ),
    Fault(
        "rope_theta_default",
        "The rope's base is 10000, the default of Megatron and of Hugging Face; config.json has "
        "it in rope_parameters.",
        "rotary_base, rope_theta; rope_parameters may be nested or flat in config.json",
        dict(rope_theta=1e4),
    ),
    Fault(
        "rope_theta_other_release",
        "The rope's base is that of another release: GLM-5.1 has 1e6, GLM-5.2 has 8e6.",
        "rotary_base, rope_theta",
        dict(rope_theta=lambda c: 1e6 if c.rope_parameters["rope_theta"] == 8e6 else 8e6),
    ),
    Fault(
        "rope_width_head_dim",
        "The rope's frequencies are spread over head_dim of config.json; GLM-5 spreads them over "
        "qk_rope_head_dim.",
        "the divisor of the exponent of the frequencies; head_dim is 192 in GLM-5.2's config.json",
        dict(rope_width=lambda c: c.head_dim),
    ),
    Fault(
        "rope_width_qk_head_dim",
        "The rope's frequencies are spread over the whole head; GLM-5 spreads them over "
        "qk_rope_head_dim.",
        "the divisor of the exponent of the frequencies; kv_channels",
        dict(rope_width=lambda c: c.qk_head_dim),
    ),
    Fault(
        "yarn_megatron",
        "The rope is YaRN with the defaults of Megatron's MLATransformerConfig (factor 40); "
        "GLM-5's is not scaled.",
        'rope_type: it must be "rope", and its default is "yarn"',
        dict(yarn=Yarn()),
    ),
    Fault(
        "yarn_deepseek",
        "The rope and the softmax scale are those of DeepSeek-V3's YaRN (factor 40, "
        "mscale_all_dim 1); GLM-5's rope is not scaled.",
        "rope_scaling, mscale_all_dim",
        dict(yarn=Yarn(mscale_all_dim=1.0)),
    ),
    Fault(
        "softmax_scale_nope",
        "The attention's scale is qk_nope_head_dim ** -0.5; GLM-5's is (qk_nope_head_dim + "
        "qk_rope_head_dim) ** -0.5.",
        "softmax_scale, scaling",
        dict(softmax_scale=lambda c: c.qk_nope_head_dim**-0.5),
    ),
    Fault(
        "softmax_scale_value",
        "The attention's scale is v_head_dim ** -0.5; GLM-5's is (qk_nope_head_dim + "
        "qk_rope_head_dim) ** -0.5.",
        "softmax_scale, scaling",
        dict(softmax_scale=lambda c: c.v_head_dim**-0.5),
    ),
    Fault(
        "softmax_scale_latent",
        "The attention's scale is (kv_lora_rank + qk_rope_head_dim) ** -0.5, of the absorbed "
        "form's width; GLM-5's is (qk_nope_head_dim + qk_rope_head_dim) ** -0.5.",
        "softmax_scale of the kernel of the absorbed form",
        dict(softmax_scale=lambda c: (c.kv_lora_rank + c.qk_rope_head_dim) ** -0.5),
    ),
    Fault(
        "latent_norm_eps",
        "The latent norms have rms_norm_eps. So have vLLM, SGLang, Megatron and slime; Hugging "
        "Face's have 1e-6. Not a fault if the serving engine does the same.",
        "the epsilon of q_a_layernorm and kv_a_layernorm",
        dict(
            q_latent_norm_eps=lambda c: c.rms_norm_eps, kv_latent_norm_eps=lambda c: c.rms_norm_eps
        ),
    ),
    Fault(
        "q_latent_norm_eps",
        "q_a_layernorm alone has rms_norm_eps; Hugging Face's latent norms have 1e-6.",
        "the epsilon of q_a_layernorm",
        dict(q_latent_norm_eps=lambda c: c.rms_norm_eps),
    ),
    Fault(
        "kv_latent_norm_eps",
        "kv_a_layernorm alone has rms_norm_eps; Hugging Face's latent norms have 1e-6.",
        "the epsilon of kv_a_layernorm",
        dict(kv_latent_norm_eps=lambda c: c.rms_norm_eps),
    ),
    Fault(
        "latent_norm_eps_default",
        "The latent norms have the epsilon 1e-5; Hugging Face's have 1e-6.",
        "the epsilon of q_a_layernorm and kv_a_layernorm; layernorm_epsilon",
        dict(q_latent_norm_eps=1e-5, kv_latent_norm_eps=1e-5),
    ),
    Fault(
        "rms_norm_eps_default",
        "The norms of layers have the epsilon 1e-5, whatever rms_norm_eps of config.json is.",
        "layernorm_epsilon, rms_norm_eps",
        dict(rms_norm_eps=1e-5),
    ),
    Fault(
        "rms_norm_eps_class_default",
        "The norms of layers have the epsilon 1e-6, whatever rms_norm_eps of config.json is.",
        "the epsilon given to input_layernorm and post_attention_layernorm",
        dict(rms_norm_eps=1e-6),
    ),
    Fault(
        "router_bias_unused",
        "The router selects experts without e_score_correction_bias.",
        "moe_router_enable_expert_bias; whether the bias is loaded",
        dict(router_bias="unused"),
    ),
    Fault(
        "router_bias_in_weights",
        "The weights of the experts contain e_score_correction_bias; it only selects them.",
        "what the weights are gathered from: the scores without the bias",
        dict(router_bias="selects and weighs"),
    ),
    Fault(
        "router_softmax",
        "The router's scores are a softmax; GLM-5's are sigmoids.",
        'moe_router_score_function, scoring_func: "sigmoid"',
        dict(router_scores="softmax"),
    ),
    Fault(
        "router_not_normalised",
        "The weights of the selected experts are not divided by their sum.",
        "norm_topk_prob; moe_router_pre_softmax with the sigmoid",
        dict(router_normalizes=False),
    ),
    Fault(
        "routed_scaling_missing",
        "The sum of the routed experts is not multiplied by routed_scaling_factor.",
        "moe_router_topk_scaling_factor, routed_scaling_factor",
        dict(routed_scaling_factor=1.0),
    ),
    Fault(
        "routed_scaling_default",
        "The sum of the routed experts is multiplied by 2.5, whatever routed_scaling_factor of "
        "config.json is.",
        "moe_router_topk_scaling_factor, routed_scaling_factor",
        dict(routed_scaling_factor=2.5),
    ),
    Fault(
        "shared_experts_missing",
        "The shared experts are not added.",
        "moe_shared_expert_intermediate_size, n_shared_experts",
        dict(shared_experts=False),
    ),
    Fault(
        "mlp_halves_swapped",
        "silu is applied to up_proj's output; GLM-5 applies it to gate_proj's.",
        "the order of gate and up in a fused projection, at conversion",
        dict(mlp_gate="up_proj"),
    ),
    Fault(
        "tied_embeddings",
        "The logits are products with the embedding; GLM-5 has an lm_head of its own.",
        "tie_word_embeddings, share_embeddings_and_output_weights",
        dict(output_layer="embedding"),
    ),
    Fault(
        "causal_mask_missing",
        "Queries attend to keys after them.",
        "the mask that the attention and the indexer get; without one they must make their own",
        dict(causal=False),
    ),
    Fault(
        "padding_later_keys",
        "A query with fewer than index_topk keys attends to keys after it: top-k fills its places "
        "with masked keys.",
        "whether the causal mask is applied again after the selection",
        dict(empty_places="later keys"),
    ),
    Fault(
        "padding_key_0",
        "The empty places of a query with fewer than index_topk keys attend to key 0, which then "
        "counts several times.",
        "what empty places of topk_indices hold: -1, which the kernel must skip, and not 0",
        dict(empty_places="key 0"),
    ),
    Fault(
        "padding_last_key",
        "The empty places of a query with fewer than index_topk keys attend to the last key: -1 is "
        "used as an index.",
        "gather and scatter with topk_indices that hold -1",
        dict(empty_places="last key"),
    ),
    Fault(
        "indexer_rope_slice",
        "The indexer rotates the last qk_rope_head_dim of each head; GLM-5 rotates the first.",
        "the split of the indexer's queries and keys; megatron-core 0.16 to 0.18 have it wrong",
        dict(index_rope_place="last"),
    ),
    Fault(
        "indexer_rope_half_split",
        "The indexer's rope rotates the pairs (i, i + r/2), as DeepSeek-V3.2's; GLM-5's rotates "
        "(2i, 2i + 1).",
        "dsa_indexer_rope_interleaved, indexer_rope_interleave",
        dict(index_rope_pairing="half"),
    ),
    Fault(
        "indexer_rope_missing",
        "The indexer's queries and keys have no rope.",
        "whether the indexer's forward calls the rope function",
        dict(index_rope_pairing="none"),
    ),
    Fault(
        "indexer_raw_query_latent",
        "wq_b gets the query latent before q_a_layernorm, or without its weight; GLM-5's gets it "
        "after.",
        "what the attention hands to the indexer where that norm is fused into q_b_proj",
        dict(index_query="raw"),
    ),
    Fault(
        "indexer_residual_input",
        "wk and weights_proj get the residual stream; GLM-5's get it after input_layernorm.",
        "what the attention hands to the indexer where that norm is fused into q_a_proj",
        dict(index_input="residual"),
    ),
    Fault(
        "indexer_relu_missing",
        "The indexer's scores of each head have no relu.",
        "dsa_indexer_scoring_relu; the line before the heads are added up",
        dict(index_relu=False),
    ),
    Fault(
        "indexer_k_norm_eps",
        "The indexer's k_norm has the epsilon 1e-5; GLM-5's has 1e-6.",
        "dsa_indexer_k_norm_epsilon; 1e-5 is the default of torch.nn.LayerNorm and of Megatron",
        dict(index_k_norm_eps=1e-5),
    ),
    Fault(
        "indexer_k_norm_eps_of_layers",
        "The indexer's k_norm has rms_norm_eps of config.json; GLM-5's has 1e-6.",
        "dsa_indexer_k_norm_epsilon, layernorm_epsilon",
        dict(index_k_norm_eps=lambda c: c.rms_norm_eps),
    ),
    Fault(
        "indexer_k_norm_rms",
        "The indexer's k_norm is an RMSNorm; GLM-5's is a LayerNorm with a bias.",
        "the class of k_norm, and whether its bias is loaded",
        dict(index_k_norm="rms"),
    ),
    Fault(
        "indexer_k_norm_missing",
        "The indexer's keys have no norm.",
        "whether the indexer's forward calls k_norm",
        dict(index_k_norm="none"),
    ),
    Fault(
        "indexer_hadamard_one_side",
        "A Hadamard matrix rotates the indexer's queries or its keys; GLM-5 rotates neither, and "
        "both are equal to neither.",
        "dsa_indexer_rotate_activation, rotate_activation",
        dict(index_hadamard="one side"),
    ),
    Fault(
        "indexer_weights_unused",
        "The indexer's heads are added up with equal weights; GLM-5's have those of weights_proj.",
        "weights_proj, and whether it is loaded",
        dict(index_weights="equal"),
    ),
    Fault(
        "indexer_unused",
        "Every query attends to all keys before it: no selection.",
        "index_topk; experimental_attention_variant; whether the attention gets topk_indices",
        dict(index_topk=None),
    ),
    Fault(
        "skip_layers_dense",
        "Skip layers attend to all keys; GLM-5.2's reuse the top-k of the last computing layer.",
        "what a layer without an indexer does",
        dict(index_skip_layers="all keys"),
    ),
    Fault(
        "skip_layers_first_source",
        "Skip layers reuse the top-k of the first computing layer; GLM-5.2's reuse the last one's.",
        "where the top-k is kept between layers",
        dict(index_source="first"),
    ),
    Fault(
        "schedule_offset_1",
        "The schedule's offset is 1 (Megatron's default 0 is used as 1); layers that have an "
        "indexer reuse a top-k.",
        "index_skip_topk_offset, dsa_indexer_skip_topk_offset",
        dict(index_computing_layers=_computing(offset=1)),
    ),
    Fault(
        "schedule_offset_2",
        "The schedule's offset is 2, Hugging Face's default; layers without an indexer run one.",
        "index_skip_topk_offset, dsa_indexer_skip_topk_offset",
        dict(index_computing_layers=_computing(offset=2)),
        all_indexers=True,
    ),
    Fault(
        "schedule_from_zero",
        "The schedule counts layers from 0; its rule is for numbers from 1.",
        "max(n - offset, 0) % freq == 0: n is the layer's number from 1",
        dict(index_computing_layers=lambda c: _computing(offset=c.index_skip_topk_offset + 1)(c)),
        all_indexers=True,
    ),
    Fault(
        "schedule_freq_lost",
        "Every layer runs an indexer; index_topk_freq is not applied.",
        "index_topk_freq, dsa_indexer_topk_freq, indexer_types",
        dict(index_computing_layers=_computing(freq=1)),
        all_indexers=True,
    ),
)


def known(ids: Collection[str]) -> tuple[str, ...]:
    """``ids``, if each is in the table.

    Raises:
        GLM5PatchError: one is not.
    """
    names = [fault.id for fault in FAULTS]
    for one in ids:
        if one not in names:
            raise GLM5PatchError(f"no fault is called {one!r}; the known ones: {', '.join(names)}")
    return tuple(ids)
