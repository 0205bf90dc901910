"""As Megatron-LM's launcher: a parser of the configuration's fields and of more flags."""

import argparse
import dataclasses

from megatron.core.transformer.transformer_config import TransformerConfig

from tests.patches.test_arguments import settings_of

_FLAGS = {
    "--norm-epsilon": dict(dest="layernorm_epsilon", type=float, default=1e-5),
    "--disable-bias-linear": dict(dest="add_bias_linear", action="store_false"),
    "--no-rope-fusion": dict(dest="apply_rope_fusion", action="store_false"),
    "--swiglu": dict(action="store_true"),
    "--squared-relu": dict(action="store_true"),
    "--quick-geglu": dict(action="store_true"),
    "--group-query-attention": dict(action="store_true"),
    "--untie-embeddings-and-output-weights": dict(action="store_true"),
    "--multi-latent-attention": dict(action="store_true"),
    "--qk-layernorm": dict(action="store_true"),
    "--position-embedding-type": dict(default="learned_absolute"),
    "--max-position-embeddings": dict(type=int),
    "--padded-vocab-size": dict(type=int),
    "--num-experts": dict(type=int),
    "--moe-layer-freq": dict(type=eval, default=1),
    "--rotary-base": dict(type=int, default=10000),
    "--rope-type": dict(default=None),
    "--rotary-percent": dict(type=float, default=1.0),
    "--rotary-scaling-factor": dict(type=float, default=1.0),
    "--q-lora-rank": dict(type=int, default=None),
    "--kv-lora-rank": dict(type=int, default=32),
    "--qk-head-dim": dict(type=int, default=128),
    "--qk-pos-emb-head-dim": dict(type=int, default=64),
    "--v-head-dim": dict(type=int, default=128),
    "--yaml-cfg": dict(default=None),
    "--moe-router-load-balancing-type": dict(nargs="+", default="aux_loss"),
    "--load": dict(default=None),
}
_NAMES = """
    num_layers hidden_size ffn_hidden_size num_attention_heads kv_channels normalization
    rotary_interleaved attention_dropout hidden_dropout experimental_attention_variant
    moe_ffn_hidden_size moe_shared_expert_intermediate_size moe_router_topk
    moe_router_score_function moe_router_enable_expert_bias moe_router_topk_scaling_factor
    moe_router_pre_softmax moe_router_dtype mtp_num_layers
    add_qkv_bias
""".split()


def add_megatron_arguments(parser):
    for field in dataclasses.fields(TransformerConfig):
        if field.name in _NAMES or field.name.startswith("dsa_"):
            names, settings = settings_of(field)
            parser.add_argument(*names, **settings)
    for flag, settings in _FLAGS.items():
        parser.add_argument(flag, **settings)
    return parser


def parse_args(extra_args_provider=None, ignore_unknown_args=False):
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    if extra_args_provider is not None:
        parser = extra_args_provider(parser)
    args = parser.parse_known_args()[0] if ignore_unknown_args else parser.parse_args()
    return argparse.Namespace(yaml_cfg=args.yaml_cfg) if args.yaml_cfg else args


def validate_args(args, defaults={}):  # noqa: B006
    return args
