"""slime and miles: their command line and their way of building, with this package's attention."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import glm5_patch
from glm5_patch.checkpoint.reader import HFCheckpoint
from glm5_patch.errors import GLM5PatchError
from glm5_patch.tools.cli import main
from glm5_patch.tools.verify import forward
from tests.clients.parity import assert_equals_hugging_face, assert_recomputes, loaded
from tests.tiny import hf_config, saved, tokens

# slime's script for GLM-5.2, at toy size. It has no flag of sparse attention, of the rope's type or
# of its fusion, and `kv_channels` without the rotary width.
ARGUMENTS = dict(
    num_layers=8,
    hidden_size=64,
    ffn_hidden_size=112,
    num_attention_heads=6,
    kv_channels=24,
    multi_latent_attention=True,
    q_lora_rank=48,
    kv_lora_rank=56,
    qk_head_dim=24,
    qk_pos_emb_head_dim=16,
    v_head_dim=80,
    qk_layernorm=True,
    normalization="RMSNorm",
    layernorm_epsilon=3e-5,
    add_bias_linear=False,
    add_qkv_bias=False,
    swiglu=True,
    squared_relu=False,
    quick_geglu=False,
    group_query_attention=False,
    untie_embeddings_and_output_weights=True,
    position_embedding_type="rope",
    rotary_base=8000000,
    rotary_percent=1.0,
    rotary_interleaved=False,
    rotary_scaling_factor=1.0,
    mscale=1.0,
    mscale_all_dim=0.0,
    num_experts=10,
    moe_layer_freq=[0] * 3 + [1] * 5,
    moe_ffn_hidden_size=72,
    moe_shared_expert_intermediate_size=144,
    moe_router_topk=3,
    moe_router_score_function="sigmoid",
    moe_router_pre_softmax=True,
    moe_router_enable_expert_bias=True,
    moe_router_load_balancing_type="seq_aux_loss",
    moe_router_topk_scaling_factor=1.7,
    moe_router_dtype="fp32",
    moe_aux_loss_coeff=0.0,
    moe_token_dispatcher_type="allgather",
    experimental_attention_variant=None,
    padded_vocab_size=96,
    max_position_embeddings=64,
    allgather_cp=True,
    transformer_impl="local",
    use_cpu_initialization=True,
    perform_initialization=False,
    attention_dropout=0.0,
    hidden_dropout=0.0,
    spec=["glm5_patch.attention.spec", "get_glm5_spec"],
    mtp_num_layers=None,
)


def arguments(directory, **changes):
    return SimpleNamespace(**{**ARGUMENTS, "hf_checkpoint": str(directory), **changes})


def config_of(args, **overrides):
    """As ``core_transformer_config_from_args`` makes it."""
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    known = MLATransformerConfig.__dataclass_fields__
    fields = {name: value for name, value in vars(args).items() if name in known}
    swiglu = dict(gated_linear_unit=True, activation_func=torch.nn.functional.silu)
    fields |= dict(swiglu, num_moe_experts=args.num_experts, params_dtype=torch.float32)
    return MLATransformerConfig(**{**fields, **overrides})


def provider(args, config, vp_stage=None):
    """As slime's and miles' ``model_provider``."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
    from megatron.core.transformer.spec_utils import import_module

    spec = import_module(args.spec)(args, config, vp_stage)
    kwargs = {}
    if args.mtp_num_layers:
        kwargs["mtp_block_spec"] = get_gpt_mtp_block_spec(
            config, spec, use_transformer_engine=False
        )
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_base=args.rotary_base,
        **kwargs,
    )


def build(checkpoint, **overrides):
    args = arguments(checkpoint.directory)
    model = provider(args, config_of(args, **overrides))
    return loaded(model, checkpoint)


@pytest.mark.parametrize("seed", range(3))
def test_it_is_right(world, tmp_path, seed):
    assert_equals_hugging_face(build, tmp_path / "hf", seed)
    assert_recomputes(build, tmp_path / "hf", seed)


def test_its_attention_is_the_plugin_s(world, tmp_path):
    model = build(saved(tmp_path / "hf"))
    glm5_patch.require(model=model)
    assert {type(x.self_attention).__module__ for x in model.decoder.layers} == {
        "glm5_patch.attention.mla"
    }
    computing = [x.layer_number for x in model.decoder.layers if _has_indexer(x)]
    assert computing == [1, 2, 3, 7]


def _has_indexer(module):
    return any(".indexer." in name for name, _ in module.named_parameters())


def test_its_mtp_layer_is_a_glm5_s(world, tmp_path):
    saved(tmp_path / "hf")
    args = arguments(tmp_path / "hf", mtp_num_layers=1)
    model = provider(args, config_of(args))
    assert _has_indexer(model.mtp)
    ids = tokens(0, 1, 32)
    model(ids, torch.arange(32)[None], None, labels=ids).sum().backward()


def test_context_parallelism_is_that_of_its_batches(world, tmp_path):
    """Contiguous parts with --allgather-cp, Megatron's zigzag without it."""
    from glm5_patch.attention.spec import get_glm5_spec

    saved(tmp_path / "hf")
    for allgather, order in ((True, "contiguous"), (False, "zigzag")):
        args = arguments(tmp_path / "hf", allgather_cp=allgather)
        config = config_of(args, context_parallel_size=2)
        get_glm5_spec(args, config, None)
        assert config.dsa_context_parallel_order == order
        assert config.cp_comm_type == "allgather"


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(hidden_size=128), "--hidden-size 64"),
        (dict(rotary_base=10000), "--rotary-base 8000000"),
        (dict(moe_router_score_function="softmax"), "--moe-router-score-function sigmoid"),
        (dict(layernorm_epsilon=1e-5), "--norm-epsilon 3e-05"),
        (dict(dsa_indexer_topk_freq=2), "--dsa-indexer-topk-freq 4"),
        (dict(position_embedding_type="learned_absolute"), "--position-embedding-type rope"),
    ],
)
def test_a_command_line_of_another_model_is_refused(world, tmp_path, changes, message):
    from glm5_patch.attention.spec import get_glm5_spec

    hf_config().save_pretrained(tmp_path / "hf")
    args = arguments(tmp_path / "hf", **changes)
    with pytest.raises(GLM5PatchError, match=f"contradicts .*config.json: .*{message}"):
        get_glm5_spec(args, config_of(arguments(tmp_path / "hf")), None)


def test_a_split_that_starts_on_a_skip_layer_is_refused(world, tmp_path):
    from glm5_patch.attention.spec import get_glm5_spec

    hf_config().save_pretrained(tmp_path / "hf")
    args = arguments(tmp_path / "hf")
    config = config_of(args, pipeline_model_parallel_size=2, pipeline_dtype=torch.float32)
    with pytest.raises(GLM5PatchError, match="skip layer"):
        get_glm5_spec(args, config, None)


def test_the_recipe_converts_a_checkpoint_of_the_other_row_order(world, tmp_path):
    """A trainer's converter may have put the rotary rows of the indexers last."""
    published, theirs, corrected = (tmp_path / n for n in ("published", "theirs", "corrected"))
    expected = forward(build(saved(published)), tokens(0, 1, 48))
    options = ["--from", "rope-first", "--to", "rope-last"]
    assert main(["checkpoint", "convert", str(published), str(theirs), *options]) == 0
    file = theirs / "model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt"})
    assert (forward(build(HFCheckpoint(theirs)), tokens(0, 1, 48)) - expected).abs().max() > 1e-3
    like = ["--like", str(published)]
    assert main(["checkpoint", "check", str(theirs), *like]) == 1
    assert main(["checkpoint", "convert", str(theirs), str(corrected), *like]) == 0
    assert torch.equal(forward(build(HFCheckpoint(corrected)), tokens(0, 1, 48)), expected)
