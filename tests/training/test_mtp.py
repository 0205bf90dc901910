"""One layer of multi-token prediction, applied several times."""

import dataclasses
import re

import pytest
import torch

from glm5_patch.attention.build import (
    HF_LATENT_NORM_EPSILON,
    gpt_model,
    set_latent_norm_epsilon,
)
from glm5_patch.checkpoint.reader import HFCheckpoint
from glm5_patch.checkpoint.writer import save
from glm5_patch.config.huggingface import HFConfig
from glm5_patch.errors import CheckpointError, GLM5PatchError
from tests.distributed.cases import RECOMPUTE
from tests.tiny import (
    add_mtp_layer,
    megatron_config,
    megatron_model,
    packed,
    relative,
    saved,
    tokens,
)

DEPTHS = 3
FIRST = re.compile(r"^mtp\.layers\.\d+\.")
REPEATED = dict(mtp_num_layers=DEPTHS, mtp_use_repeated_layer=True)
SHARED = dict(dsa_indexer_share_for_mtp_iteration=True)
INDEXER_LOSS = dict(dsa_indexer_loss_coeff=0.1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = saved(tmp_path_factory.mktemp("mtp")).directory
    add_mtp_layer(directory)
    return HFCheckpoint(directory)


@pytest.fixture
def repeats(world):
    from megatron.core.transformer.transformer_config import TransformerConfig

    if "mtp_use_repeated_layer" not in {f.name for f in dataclasses.fields(TransformerConfig)}:
        pytest.skip("this megatron-core applies each MTP layer once")


def trained(model, documents=None):
    """Loss, gradients and the top-k that the MTP layer attended to, one for each application."""
    found = []
    core = next(
        m for n, m in model.named_modules() if n.startswith("mtp.") and n.endswith("core_attention")
    )
    core.observer = lambda number, topk_indices: found.append(topk_indices.clone())
    ids = tokens(0, 1 if documents else 2, 40)
    positions = torch.cat([torch.arange(length) for length in documents or (40,)]).expand_as(ids)
    pack = packed(documents) if documents else None
    model.train()
    model.zero_grad()
    output = model(ids, positions, None, labels=ids.roll(-1, 1), packed_seq_params=pack)
    output.mean().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return output.detach(), grads, found


@pytest.mark.parametrize("documents", [None, [1, 30, 9]], ids=["bshd", "thd"])
def test_gradients_of_a_layer_equal_those_without_recompute(world, checkpoint, documents):
    (output, grads, _), (again, recomputed, _) = (
        trained(megatron_model(checkpoint, mtp_num_layers=1, **RECOMPUTE[mode]), documents)
        for mode in ("none", "full")
    )
    assert torch.equal(output, again) and grads.keys() == recomputed.keys()
    assert all(torch.equal(grads[name], recomputed[name]) for name in grads)


def test_a_repeated_layer_is_loaded_trained_and_saved(repeats, checkpoint, tmp_path):
    model = megatron_model(checkpoint, **REPEATED)
    output, grads, found = trained(model)
    assert len(found) == DEPTHS and output.isfinite().all()
    assert any(name.startswith("mtp.") and grad.any() for name, grad in grads.items())
    save(model, checkpoint.config, tmp_path / "out")
    again = HFCheckpoint(tmp_path / "out")
    assert again.shapes == checkpoint.shapes
    assert all(torch.equal(again.read(n), checkpoint.read(n)) for n in checkpoint.shapes)


def test_a_repeated_layer_is_several_layers_of_the_same_weights(repeats, checkpoint):
    repeated = megatron_model(checkpoint, **REPEATED)
    several = gpt_model(
        checkpoint.config, megatron_config(checkpoint.config, mtp_num_layers=DEPTHS)
    )
    set_latent_norm_epsilon(several, HF_LATENT_NORM_EPSILON)
    weights = {**dict(repeated.named_parameters()), **dict(repeated.named_buffers())}
    with torch.no_grad():
        for name, tensor in (*several.named_parameters(), *several.named_buffers()):
            tensor.copy_(weights[FIRST.sub("mtp.layers.0.", name)])
    output, grads, found = trained(repeated)
    expected, parts, _ = trained(several)
    assert torch.equal(output, expected)
    summed = {}
    for name, grad in parts.items():
        first = FIRST.sub("mtp.layers.0.", name)
        summed[first] = summed.get(first, 0) + grad
    assert grads.keys() == summed.keys()
    assert all(torch.allclose(grads[n], summed[n], rtol=1e-4, atol=1e-7) for n in grads)
    assert len({tuple(topk.flatten().tolist()) for topk in found}) == DEPTHS


@pytest.mark.parametrize("mode", ["none", "full", "core_attn"])
@pytest.mark.parametrize("loss", [{}, INDEXER_LOSS], ids=["", "indexer loss"])
def test_iterations_share_the_first_ones_topk(repeats, checkpoint, mode, loss):
    settings = {**REPEATED, **SHARED, **loss}
    (plain, grads, first), (output, again, found) = (
        trained(megatron_model(checkpoint, **settings, **RECOMPUTE[name]))
        for name in ("none", mode)
    )
    assert len(first) == DEPTHS
    assert all(torch.equal(topk, first[0]) for topk in (*first, *found))
    assert torch.equal(output, plain)
    assert grads.keys() == again.keys()
    # The gradients of the iterations add up in another order.
    assert max(relative(again[n], grads[n]) for n in grads if grads[n].any()) < 1e-4
    own, _, each = trained(megatron_model(checkpoint, **REPEATED, **loss))
    assert torch.equal(each[0], first[0]) and not torch.equal(each[1], first[1])
    if loss:  # the indexer learns from the iteration in which it selects
        name = "mtp.layers.0.mtp_model_layer.self_attention.core_attention.indexer.linear_wk.weight"
        assert grads[name].any()


def test_microbatches_in_flight_share_no_topk(repeats, checkpoint):
    """Two forwards before the first backward, under full recompute."""
    model = megatron_model(checkpoint, **REPEATED, **SHARED, **RECOMPUTE["full"])
    model.train()

    def forward(seed):
        ids = tokens(seed, 2, 40)
        return model(ids, torch.arange(40).expand_as(ids), None, labels=ids.roll(-1, 1)).mean()

    def gradients(losses):
        model.zero_grad()
        for loss in losses:
            loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    together = gradients([forward(0), forward(1)])
    first, second = gradients([forward(0)]), gradients([forward(1)])
    for name, grad in together.items():
        assert torch.allclose(grad, first[name] + second[name], rtol=1e-4, atol=1e-7), name


def test_the_published_configuration_asks_for_it(checkpoint):
    raw = {**checkpoint.config.raw, "index_share_for_mtp_iteration": True}
    assert HFConfig(raw).megatron_kwargs()["dsa_indexer_share_for_mtp_iteration"]
    assert not checkpoint.config.megatron_kwargs()["dsa_indexer_share_for_mtp_iteration"]


def test_more_layers_than_the_checkpoint_has_are_refused(world, checkpoint):
    with pytest.raises(CheckpointError, match="MTP layer 2, but num_nextn.* is 1; with mtp_use"):
        megatron_model(checkpoint, mtp_num_layers=2)


def test_a_host_that_can_not_repeat_a_layer_says_so(world, checkpoint):
    from megatron.core.transformer.transformer_config import TransformerConfig

    if "mtp_use_repeated_layer" in {f.name for f in dataclasses.fields(TransformerConfig)}:
        pytest.skip("this megatron-core can")
    with pytest.raises(GLM5PatchError, match="use 0.17 or later"):
        megatron_config(checkpoint.config, **REPEATED)


@pytest.mark.parametrize("mode", ["full", "block"])
def test_an_mtp_layer_under_full_recompute(world, checkpoint, mode):
    (plain, grads, _), (output, again, _) = (
        trained(megatron_model(checkpoint, mtp_num_layers=1, **RECOMPUTE[name]))
        for name in ("none", mode)
    )
    assert torch.equal(output, plain)
    assert all(torch.equal(again[name], grads[name]) for name in grads)
