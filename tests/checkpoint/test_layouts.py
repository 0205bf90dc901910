"""Models as trainers have them: wrapped, in chunks, padded, in bf16; and stacked experts."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from glm5_patch.checkpoint.names import own_slices, pieces
from glm5_patch.checkpoint.reader import HFCheckpoint
from glm5_patch.checkpoint.writer import save
from glm5_patch.errors import CheckpointError
from tests.tiny import megatron_config, megatron_model, saved

BIAS = "model.layers.6.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """In bf16, but for a router bias that bf16 can't hold."""
    directory = saved(tmp_path_factory.mktemp("layouts")).directory
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        fp32 = name.endswith("e_score_correction_bias")
        tensors[name] = torch.rand_like(tensor) if fp32 else tensor.bfloat16()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return HFCheckpoint(directory)


def router_bias(model, layer=6):
    found = {source: tensor for _, tensor, (source, *_) in pieces(model)}
    return found[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"]


def built(checkpoint, **overrides):
    from glm5_patch.attention.build import gpt_model

    config = megatron_config(checkpoint.config, params_dtype=torch.bfloat16, bf16=True, **overrides)
    return gpt_model(checkpoint.config, config)


def float16(model):
    from megatron.core.transformer.module import Float16Module

    return Float16Module(model.config, model)


@pytest.mark.parametrize("order", ["load, wrap", "wrap, load", "wrap, load, wrap"])
def test_the_router_bias_stays_fp32_in_any_order(world, checkpoint, order, tmp_path):
    model = inner = built(checkpoint)
    for step in order.split(", "):
        if step == "load":
            checkpoint.load_into(model)
        else:
            model = float16(inner)
    expected = checkpoint.read(BIAS)
    assert not torch.equal(expected, expected.bfloat16().float())
    assert router_bias(inner).dtype == torch.float32
    assert torch.equal(router_bias(inner), expected)
    assert next(inner.parameters()).dtype == torch.bfloat16
    state = model.state_dict()
    assert torch.equal(
        next(v for k, v in state.items() if "layers.6" in k and "expert_bias" in k), expected
    )
    save(model, checkpoint.config, tmp_path / "out")
    assert torch.equal(HFCheckpoint(tmp_path / "out").read(BIAS), expected)


def test_other_models_routers_are_cast_as_before(world, checkpoint):
    model = built(checkpoint)
    model.config.dsa_is_glm5 = False
    for layer in model.decoder.layers:
        layer.mlp.float().bfloat16()
    assert router_bias(model).dtype == torch.bfloat16


def test_a_wrapped_model_and_a_list_of_chunks_are_loaded(world, checkpoint):
    plain, wrapped, listed = (built(checkpoint) for _ in range(3))
    checkpoint.load_into(plain)
    checkpoint.load_into(float16(wrapped))
    seen = []
    checkpoint.load_into([float16(listed)], seen.append)
    assert len(seen) == 1 and seen[0].startswith("model.safetensors, ") and "GB/s" in seen[0]
    for (name, a, _), (_, b, _), (_, c, _) in zip(*map(pieces, (plain, wrapped, listed))):
        assert torch.equal(a, b) and torch.equal(a, c), name


def test_a_padded_vocabulary_is_filled_with_zeros_and_cut_when_it_is_saved(
    world, checkpoint, tmp_path
):
    from glm5_patch.attention.build import gpt_model

    padded = HFCheckpoint(checkpoint.directory)
    padded.config.raw = {**padded.config.raw, "vocab_size": 128}
    model = gpt_model(padded.config, megatron_config(padded.config))
    checkpoint.load_into(model)
    for name, source in (
        ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        ("output_layer.weight", "lm_head.weight"),
    ):
        weight = model.get_parameter(name)
        assert torch.equal(weight[:96], checkpoint.read(source).float())
        assert (weight[96:] == 0).all()
    save(model, checkpoint.config, tmp_path / "out")
    again = HFCheckpoint(tmp_path / "out")
    assert again.shapes == checkpoint.shapes
    assert torch.equal(again.read("lm_head.weight"), checkpoint.read("lm_head.weight").float())


@pytest.mark.parametrize("rank, rows", [(0, (0, 64)), (1, (64, 96)), (2, (96, 96))])
def test_each_rank_has_its_rows_of_a_padded_vocabulary(rank, rows, world, monkeypatch):
    from megatron.core import parallel_state

    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_world_size", lambda: 3)
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_rank", lambda: rank)
    assert own_slices("output_layer.weight", (96, 8), (64, 8)) == (slice(*rows), slice(0, 8))
    with pytest.raises(CheckpointError, match=r"\[64, 8\] on this rank, of 3 that share it"):
        own_slices("decoder.layers.0.x.weight", (96, 8), (64, 8))


def test_stacked_experts_are_the_experts_one_by_one(world, checkpoint, tmp_path):
    from shutil import copytree

    directory = copytree(checkpoint.directory, tmp_path / "stacked")
    tensors = load_file(directory / "model.safetensors")
    for layer in (n for n, is_moe in enumerate(checkpoint.config.moe_layers) if is_moe):
        prefix = f"model.layers.{layer}.mlp.experts"
        parts = {
            part: torch.stack(
                [
                    tensors.pop(f"{prefix}.{e}.{part}.weight")
                    for e in range(checkpoint.config.n_routed_experts)
                ]
            )
            for part in ("gate_proj", "up_proj", "down_proj")
        }
        tensors[f"{prefix}.gate_up_proj"] = torch.cat([parts["gate_proj"], parts["up_proj"]], 1)
        tensors[f"{prefix}.down_proj"] = parts["down_proj"].contiguous()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    stacked = HFCheckpoint(directory)
    assert stacked.shapes == checkpoint.shapes
    assert all(torch.equal(stacked.read(n), checkpoint.read(n)) for n in checkpoint.shapes)
    ours, plain = megatron_model(stacked), megatron_model(checkpoint)
    for (name, a, _), (_, b, _) in zip(pieces(ours), pieces(plain)):
        assert torch.equal(a, b), name


def test_memory_of_reading_is_that_of_the_part(checkpoint):
    """A part of a tensor is read alone: the file is not."""
    part = checkpoint.read("model.embed_tokens.weight", (slice(10, 12), slice(0, 64)))
    assert part.untyped_storage().nbytes() == 2 * 64 * 2
