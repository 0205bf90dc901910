"""The indexer's loss against its plain definition, with everything in memory at once."""

import pytest
import torch

from glm5_patch.demo import forward
from glm5_patch.model import blocks
from glm5_patch.model.blocks import Rows, selected_keys, visible_keys
from glm5_patch.model.indexer import IndexerInputs
from glm5_patch.model.indexer_loss import indexer_loss
from tests.tiny import megatron_model, relative, saved, tokens

S, B, HEADS, DIM, SCALE = 24, 2, 3, 8, 0.3


def reference(inputs, query, key, mask, index_scale):
    """KL(attention || indexer), mean over queries (megatron-core 0.19's definition)."""
    scores = torch.einsum("sbhd,tbd->bsht", inputs.query, inputs.key) * index_scale
    scores = torch.einsum("bsht,sbh->bst", scores.relu(), inputs.weights)
    log_predicted = scores.masked_fill(~mask, float("-inf")).log_softmax(-1)
    logits = torch.einsum("sbnd,tbnd->bnst", query, key) * SCALE
    target = logits.masked_fill(~mask[:, None], float("-inf")).softmax(-1).mean(1)
    terms = target * (target.clamp_min(1e-10).log() - log_predicted.masked_fill(~mask, 0.0))
    return terms.masked_fill(~mask, 0.0).sum(-1).mean()


@pytest.fixture(scope="module")
def indexer(world, our_core, tmp_path_factory):
    model = megatron_model(saved(tmp_path_factory.mktemp("loss") / "hf"))
    return model.decoder.layers[0].self_attention.core_attention.indexer


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("rows_per_block", [1, 5, 100])
def test_loss_and_gradients_equal_the_definition(
    indexer, seed, sparse, rows_per_block, monkeypatch
):
    g = torch.Generator().manual_seed(seed)
    n, d = indexer.index_n_heads, indexer.index_head_dim
    monkeypatch.setattr(blocks, "BLOCK_BYTES", rows_per_block * B * n * S * 4)
    shapes = [(S, B, n, d), (S, B, d), (S, B, n)]
    inputs = IndexerInputs(
        *(torch.randn(shape, generator=g, requires_grad=True) for shape in shapes)
    )
    query, key = (torch.randn(S, B, HEADS, DIM, generator=g) for _ in range(2))
    rows = Rows(torch.zeros(S, dtype=torch.int64))
    topk_indices = indexer.select(inputs, rows)
    settings = dict(softmax_scale=SCALE, coefficient=0.7, sparse=sparse)
    loss = indexer_loss(
        indexer, inputs, query, key, topk_indices, rows, **settings, per_token=False
    )
    whole = slice(0, S)
    mask = selected_keys(whole, rows, topk_indices) if sparse else visible_keys(whole, rows)
    mask = mask.expand(B, S, S)
    expected = 0.7 * reference(inputs, query, key, mask, indexer.softmax_scale)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(loss * 3, inputs), torch.autograd.grad(expected * 3, inputs)
    ):
        assert relative(ours, theirs) < 1e-5
    summed = indexer_loss(
        indexer, inputs, query, key, topk_indices, rows, **settings, per_token=True
    )
    assert summed.item() == pytest.approx(loss.item() * S * B, rel=1e-5)


@pytest.mark.parametrize("coefficient", [None, 0.0, 0.1])
def test_only_a_positive_coefficient_trains_the_indexers_and_only_them(
    world, tmp_path, coefficient
):
    checkpoint = saved(tmp_path / "hf")
    ids = tokens(0, 2, 40)
    gradients = {}
    for value in (None, coefficient):
        model = megatron_model(checkpoint, dsa_indexer_loss_coeff=value).train()
        forward(model, ids).square().mean().backward()
        gradients[value] = {name: p.grad for name, p in model.named_parameters()}
    for name, grad in gradients[coefficient].items():
        if ".indexer." in name:
            assert (grad is not None and grad.abs().sum() > 0) == bool(coefficient), name
        else:
            assert torch.equal(grad, gradients[None][name]), name
