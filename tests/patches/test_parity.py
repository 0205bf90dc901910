"""The patched host against Hugging Face's own model: selections, logits, gradients."""

import random

import pytest
import torch

from glm5_patch.attention.build import HF_LATENT_NORM_EPSILON, gpt_model, set_latent_norm_epsilon
from glm5_patch.checkpoint.names import pieces
from glm5_patch.checkpoint.reader import HFCheckpoint, chunks_of
from glm5_patch.testing.parity import LowerTies, compare_topk, kept_share, recorded, recorded_hf
from glm5_patch.tools.verify import forward
from tests.tiny import (
    hf_config,
    hf_model,
    loss_of,
    megatron_config,
    megatron_model,
    relative,
    saved,
    tokens,
)

# One sequence length and index_topk for each seed.
SIZES = {0: (64, 8), 1: (128, 16), 2: (256, 32), 3: (512, 64), 4: (192, 8)}


def compared(ours, theirs, ids_of):
    """Compare selections and logits, on other tokens again until a sequence is without near ties.

    How many near ties there are is a matter of rounding, so of the processor and its BLAS. Each of
    them is looked at, and tokens behind one see other keys: they can't be compared.

    Returns:
        The sequences without near ties, and how many layers selected.
    """
    for draw in range(8):
        ids = ids_of(draw)
        with torch.no_grad(), recorded(ours) as our_topk, recorded_hf(theirs) as their_topk:
            logits, expected = forward(ours, ids), theirs(ids, use_cache=False).logits
        topk = compare_topk(our_topk, their_topk)
        assert topk.differing == 0
        layers = len(our_topk.topk_indices)
        assert (logits - expected)[topk.intact].abs().max() <= 2e-5 * max(1, layers / 8)
        untouched = ids[topk.intact.all(-1)]
        if len(untouched):
            return untouched, layers
    pytest.fail("every sequence of eight draws has near ties")


@pytest.mark.parametrize("flavour", ["5.2", "5.1"])
@pytest.mark.parametrize("seed", SIZES)
def test_topk_logits_and_gradients_equal_hugging_face(world, tmp_path, seed, flavour):
    length, index_topk = SIZES[seed]
    theirs = hf_model(hf_config(index_topk, flavour), seed)
    theirs.save_pretrained(tmp_path / "hf")
    ours = megatron_model(HFCheckpoint(tmp_path / "hf"))
    untouched, layers = compared(ours, theirs, lambda draw: tokens(seed + 100 * draw, 2, length))
    assert layers == 8
    assert_gradients(ours, theirs, untouched)


def assert_gradients(ours, theirs, ids):
    """Of the same loss, parameter by parameter; an indexer has none."""
    loss_of(forward(ours, ids), ids).backward()
    with LowerTies():
        loss_of(theirs(ids, use_cache=False).logits, ids).backward()
    references = dict(theirs.named_parameters())
    (chunk,) = chunks_of(ours)
    for name, parameter, sources in pieces(chunk):
        if ".indexer." in name or name.endswith("expert_bias"):
            assert parameter.grad is None, name
        elif ".experts.local_experts." in name:
            assert relative(*_expert_gradients(name, parameter, references)) < 1e-5, name
        else:
            reference = torch.cat([references[source].grad for source in sources])
            assert relative(parameter.grad, reference) < 1e-5, name


def _expert_gradients(name, parameter, references):
    """transformers holds all experts of a layer in one parameter."""
    parts = name.split(".")
    layer, expert, fc = parts[2], int(parts[6]), parts[7]
    stacked = "gate_up_proj" if fc == "linear_fc1" else "down_proj"
    reference = references[f"model.layers.{layer}.mlp.experts.{stacked}"].grad[expert]
    ours = parameter.grad if parameter.grad is not None else torch.zeros_like(reference)
    if not reference.any():
        return ours + 1, reference + 1
    return ours, reference


def test_short_rows_select_exactly_what_they_see(world, our_core, tmp_path):
    model = megatron_model(saved(tmp_path / "hf", index_topk=16))
    with torch.no_grad(), recorded(model) as found:
        forward(model, tokens(0, 2, 48))
    for topk_indices in found.topk_indices.values():
        assert topk_indices.dtype == torch.int32
        for row in range(16):
            keys = topk_indices[:, row]
            assert (keys.sort(-1)[0][:, -row - 1 :] == torch.arange(row + 1)).all()
            assert (keys == -1).sum() == 2 * (15 - row)


def test_skip_layers_have_no_indexer_and_use_their_sources_topk(world, tmp_path):
    model = megatron_model(saved(tmp_path / "hf"))
    with torch.no_grad(), recorded(model) as found:
        forward(model, tokens(0, 1, 40))
    sources = {1: 1, 2: 2, 3: 3, 4: 3, 5: 3, 6: 3, 7: 7, 8: 7}
    for layer in model.decoder.layers:
        number = layer.layer_number
        has_indexer = any(".indexer." in name for name, _ in layer.named_parameters())
        assert has_indexer == (number in (1, 2, 3, 7))
        assert torch.equal(found.topk_indices[number], found.topk_indices[sources[number]])


@pytest.mark.parametrize("pattern", ["FSFSSFFS", "FFSSSSSS", "FSSSSSSF"])
def test_any_pattern_equals_hugging_face(world, tmp_path, pattern):
    kinds = ["full" if letter == "F" else "shared" for letter in pattern]
    theirs = hf_model(hf_config(indexer_types=kinds), 1)
    theirs.save_pretrained(tmp_path / "hf")
    ours = megatron_model(HFCheckpoint(tmp_path / "hf"))
    _, layers = compared(ours, theirs, lambda draw: tokens(1 + draw, 2, 64))
    assert layers == 8


def test_a_pattern_of_78_layers_equals_hugging_face(world, tmp_path):
    rng = random.Random(0)
    pattern = "F" + "".join(rng.choice("FSSS") for _ in range(77))
    kinds = ["full" if letter == "F" else "shared" for letter in pattern]
    small = dict(num_hidden_layers=78, indexer_types=kinds, n_routed_experts=4, hidden_size=32)
    theirs = hf_model(hf_config(**small), 2)
    theirs.save_pretrained(tmp_path / "hf")
    ours = megatron_model(HFCheckpoint(tmp_path / "hf"))
    _, layers = compared(ours, theirs, lambda draw: tokens(2 + draw, 4, 32))
    assert layers == 78


def test_latent_norm_epsilon_is_where_hugging_face_stands_alone(world, tmp_path):
    """By default the host's latent norms have rms_norm_eps, by design."""
    theirs = hf_model(hf_config())
    theirs.save_pretrained(tmp_path / "hf")
    checkpoint = HFCheckpoint(tmp_path / "hf")
    assert checkpoint.config.rms_norm_eps != HF_LATENT_NORM_EPSILON
    ids = tokens(0, 1, 48)
    with LowerTies():
        expected = theirs(ids, use_cache=False).logits
    model = gpt_model(checkpoint.config, megatron_config(checkpoint.config))
    checkpoint.load_into(model)
    by_default = forward(model, ids)
    set_latent_norm_epsilon(model, HF_LATENT_NORM_EPSILON)
    with_knob = forward(model, ids)
    assert (with_knob - expected).abs().max() < 2e-5
    assert (by_default - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("setting", "value"),
    [("dsa_indexer_rope_interleaved", False), ("dsa_indexer_k_norm_epsilon", 0.5)],
)
def test_a_wrong_setting_shows(world, tmp_path, setting, value):
    """The comparison can fail: one wrong setting loses keys."""
    theirs = hf_model(hf_config())
    theirs.save_pretrained(tmp_path / "hf")
    ours = megatron_model(HFCheckpoint(tmp_path / "hf"), **{setting: value})
    ids = tokens(0, 2, 96)
    with torch.no_grad(), recorded(ours) as found, recorded_hf(theirs) as expected:
        forward(ours, ids), theirs(ids, use_cache=False)
    assert compare_topk(found, expected).differing > 0
    assert kept_share(found.topk_indices[1], expected[1]) < 0.999


def test_host_checkpoints_with_fused_latent_norms_load(world, tmp_path):
    model = megatron_model(saved(tmp_path / "hf"))
    fused = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("kv_layernorm.weight", "linear_kv_up_proj.layer_norm_weight")
        name = name.replace("q_layernorm.weight", "linear_q_up_proj.layer_norm_weight")
        fused[name] = tensor.clone() if isinstance(tensor, torch.Tensor) else tensor
    assert sum("layer_norm_weight" in name for name in fused) == 16
    other = megatron_model(saved(tmp_path / "other", seed=1))
    other.load_state_dict(fused)
    ids = tokens(0, 1, 32)
    assert torch.equal(forward(other, ids), forward(model, ids))
