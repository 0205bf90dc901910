"""The indexer's loss against its plain definition, with everything in memory at once."""

import itertools

import pytest
import torch

from glm5_patch.ops import query_positions
from glm5_patch.ops.index_loss import triton
from glm5_patch.ops.index_loss.operation import index_loss
from glm5_patch.ops.index_topk.operation import index_topk
from glm5_patch.ops.index_topk.reference import IndexerInputs
from glm5_patch.ops.query_positions import (
    QueryPositions,
    document_starts,
    longest_document,
)
from glm5_patch.ops.sparse_attention import absorption
from glm5_patch.ops.sparse_attention.inputs import AttentionInputs, MLADims
from glm5_patch.ops.sparse_attention.operation import sparse_attention
from glm5_patch.tools.verify import forward
from tests.ops import dense
from tests.tiny import megatron_model, relative, saved, tokens

S, B, HEADS, SCALE = 24, 2, 3, 0.3
INDEX_HEADS, INDEX_DIM, INDEX_TOPK, INDEX_SCALE = 16, 16, 8, 0.25
SETTINGS = dict(index_scale=INDEX_SCALE, coefficient=0.7)
DIMS = MLADims(latent=64, nope=24, rope=16, value=8)


def random_inputs(seed, s=S, b=B):
    """The indexer's inputs, and queries, latent and up-projection of the attention."""
    g = torch.Generator().manual_seed(seed)
    n, d = INDEX_HEADS, INDEX_DIM
    shapes = [(s, b, n, d), (s, b, d), (s, b, n)]
    inputs = IndexerInputs(
        *(torch.randn(shape, generator=g, requires_grad=True) for shape in shapes)
    )
    shapes = [
        (s, b, HEADS, DIMS.nope + DIMS.rope),
        (s, b, 1, DIMS.latent + DIMS.rope),
        (DIMS.latent, HEADS * (DIMS.nope + DIMS.value)),
    ]
    return inputs, [torch.randn(shape, generator=g) / shape[0] ** 0.25 for shape in shapes]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("rows_per_block", [1, 5, 100])
def test_loss_and_gradients_equal_the_definition(seed, sparse, rows_per_block, monkeypatch):
    monkeypatch.setattr(query_positions, "BLOCK_BYTES", rows_per_block * B * INDEX_HEADS * S * 4)
    inputs, attention = random_inputs(seed)
    queries = QueryPositions(torch.zeros(S, dtype=torch.int64))
    scores = dense.index_scores(*inputs, INDEX_SCALE)
    mask = dense.visible([S]).expand(B, S, S)
    if sparse:
        mask = dense.best(scores.detach(), mask, INDEX_TOPK)
    topk_indices = torch.full((B, S, INDEX_TOPK), -1, dtype=torch.int32)
    for b, row in itertools.product(range(B), range(S)):
        chosen = mask[b, row].nonzero().flatten()[:INDEX_TOPK]
        topk_indices[b, row, : len(chosen)] = chosen
    settings = dict(SETTINGS, sparse=sparse)
    given = (inputs, AttentionInputs(*attention, topk_indices, queries, DIMS, SCALE))
    loss = index_loss(*given, **settings, per_token=False)
    key, _ = dense.keys_and_values(*attention[1:], DIMS.nope, DIMS.value)
    probs = dense.probabilities(attention[0], key, mask, SCALE)
    expected = 0.7 * dense.index_loss(scores, probs, mask)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(loss * 3, inputs), torch.autograd.grad(expected * 3, inputs)
    ):
        assert relative(ours, theirs) < 1e-5
    summed = index_loss(*given, **settings, per_token=True)
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


@pytest.mark.parametrize(
    ("lengths", "kind"),
    [
        pytest.param([1, 14, 0, 9], "deterministic", id="thd-deterministic"),
        pytest.param([1, 14, 0, 9], "known lse", id="thd-lse"),
        pytest.param([12], "known lse of all keys", id="bshd-dense-lse"),
        pytest.param([9], "lse of some, loss over all keys", id="bshd-dense-other-lse"),
        *(
            pytest.param(lengths, kind, id=f"{layout}-{name}", marks=pytest.mark.nightly)
            for lengths, layout, kind, name in (
                ([S], "bshd", "deterministic", "deterministic"),
                ([S], "bshd", "as they come", "as they come"),
                ([S], "bshd", "everything selected", "all"),
                ([S], "bshd", "over all keys", "dense"),
                ([1, 14, 0, 9], "thd", "as they come", "as they come"),
                ([1, 14, 0, 9], "thd", "everything selected", "all"),
                ([1, 14, 0, 9], "thd", "over all keys", "dense"),
            )
        ),
    ],
)
def test_triton_computes_the_same_loss_and_gradients(lengths, kind, interpreted, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    b = B if len(lengths) == 1 else 1
    inputs, attention = random_inputs(len(kind), s=sum(lengths), b=b)
    bounds = [0, *itertools.accumulate(lengths)]
    queries = QueryPositions(document_starts(bounds), longest=longest_document(bounds))
    topk = (
        None
        if kind in ("everything selected", "known lse of all keys")
        else index_topk(inputs, queries, INDEX_TOPK, INDEX_SCALE)
    )
    settings = dict(SETTINGS, sparse="all keys" not in kind, per_token=False)
    given = AttentionInputs(*attention, topk, queries, DIMS, SCALE)
    # Blocks of queries, the last one shorter.
    monkeypatch.setattr(triton, "VISIBLE_PLACES", 0)
    monkeypatch.setattr(absorption, "ABSORBED_BYTES", 0)
    monkeypatch.setattr(absorption, "BLOCK_ROWS", 7)
    found = []
    for kernels in ("torch", "triton"):
        monkeypatch.setenv("GLM5_PATCH_KERNELS", kernels)
        if kernels == "triton":
            monkeypatch.delattr("glm5_patch.ops.index_loss.reference._IndexLoss")
        torch.use_deterministic_algorithms(kind == "deterministic")
        if "lse" in kind and kernels == "triton":
            _, lse = sparse_attention(given)
            given = given._replace(lse=lse)
            # With another, each head would weigh differently.
            changed = given._replace(lse=lse + torch.arange(HEADS))
            wrong = index_loss(inputs, changed, **settings)
        loss = index_loss(inputs, given, **settings)
        torch.use_deterministic_algorithms(False)
        found.append((loss, *torch.autograd.grad(loss * 3, inputs)))
    for theirs, ours in zip(*found):
        assert relative(ours, theirs) < 1e-5
    if "lse" in kind:
        assert (relative(wrong, loss) > 1e-3) == ("known" in kind)
