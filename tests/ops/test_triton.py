"""The Triton kernels against the blocked torch code, in Triton's interpreter or on a GPU."""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from glm5_patch.errors import GLM5PatchError
from glm5_patch.ops.index_topk import triton as indexer_kernels
from glm5_patch.ops.index_topk.reference import IndexerInputs
from glm5_patch.ops.needs import Call
from glm5_patch.ops.query_positions import (
    QueryPositions,
    document_starts,
    longest_document,
    visible_topk,
)
from glm5_patch.ops.registry import choose, computed_by
from glm5_patch.ops.sparse_attention import absorption
from glm5_patch.ops.sparse_attention import triton as sparse_mla
from glm5_patch.ops.sparse_attention.absorption import absorbed_attention
from glm5_patch.ops.sparse_attention.inputs import AttentionInputs, MLADims
from glm5_patch.ops.sparse_attention.reference import sparse_attention
from glm5_patch.testing.parity import recorded
from glm5_patch.tools.verify import forward
from tests.ops.test_sparse_attention import random_topk
from tests.tiny import loss_of, megatron_model, pack_forward, packed, relative, saved, tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = MLADims(latent=64, nope=24, rope=16, value=20)


def layout(lengths):
    bounds = [0, *itertools.accumulate(lengths)]
    return QueryPositions(document_starts(bounds).to(DEVICE), longest=longest_document(bounds))


def chosen_keys(queries, b, k, seed):
    generator = torch.Generator().manual_seed(seed)
    return random_topk(len(queries.starts), b, k, queries.starts.cpu(), generator).to(DEVICE)


def inputs(s, b, heads, dims, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (s, b, heads, dims.nope + dims.rope),
        (s, b, 1, dims.latent + dims.rope),
        (dims.latent, heads * (dims.nope + dims.value)),
    ]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    return [tensor.to(DEVICE).requires_grad_() for tensor in tensors]


def both(tensors, topk, queries, dims, upstream_seed=9):
    """Output and gradients of the kernels, and of the blocked reference."""
    found = []
    for kind in (absorbed_attention, sparse_attention):
        output, _ = kind(AttentionInputs(*tensors, topk, queries, dims, 0.2))
        upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(upstream_seed))
        found.append((output, *torch.autograd.grad(output, tensors, upstream.to(DEVICE))))
    return found


@pytest.mark.parametrize(
    "heads", [8, *(pytest.param(heads, marks=pytest.mark.nightly) for heads in (16, 32, 64, 72))]
)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.nightly)])
def test_attention_for_each_count_of_heads(interpreted, heads, seed):
    queries, tensors = layout([16]), inputs(16, 1, heads, SMALL, seed)
    topk = chosen_keys(queries, 1, 7, seed)
    for ours, theirs in zip(*both(tensors, topk, queries, SMALL)):
        assert relative(ours, theirs) < 1e-5


@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param([24], id="bshd", marks=pytest.mark.nightly),
        pytest.param([1, 10, 0, 13], id="thd"),
    ],
)
@pytest.mark.parametrize("k", [12, *(pytest.param(k, marks=pytest.mark.nightly) for k in (3, 24))])
def test_attention_of_a_batch_of_documents(interpreted, lengths, k):
    b = 2 if len(lengths) == 1 else 1
    queries, tensors = layout(lengths), inputs(24, b, 3, SMALL, seed=k)
    topk = chosen_keys(queries, b, k, k)
    for ours, theirs in zip(*both(tensors, topk, queries, SMALL)):
        assert relative(ours, theirs) < 1e-5
    for ours, theirs in zip(*both(tensors, None, queries, SMALL)):
        assert relative(ours, theirs) < 1e-5


def test_attention_of_some_of_the_queries(interpreted):
    """As on one rank of a context-parallel group."""
    whole, tensors = layout([24, 16]), inputs(40, 1, 4, SMALL, seed=0)
    topk = chosen_keys(whole, 1, 6, 0)
    positions = torch.randperm(40, generator=torch.Generator().manual_seed(1))[:17].to(DEVICE)
    queries = QueryPositions(whole.starts[positions], positions, 40, whole.longest)
    some = [tensors[0][positions], *tensors[1:]]
    ours, theirs = both(some, topk[:, positions], queries, SMALL)
    for a, e in zip(ours, theirs):
        assert relative(a, e) < 1e-5


@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param([20], id="bshd", marks=pytest.mark.nightly),
        pytest.param([1, 10, 0, 9], id="thd"),
    ],
)
def test_every_visible_key_in_blocks_of_queries(interpreted, monkeypatch, lengths):
    """Dense attention: no top-k of all queries is made, and none is kept for the backward."""
    tensors, queries = inputs(20, 2 if len(lengths) == 1 else 1, 3, SMALL, 5), layout(lengths)
    whole = both(tensors, None, queries, SMALL)
    monkeypatch.setattr(absorption, "BLOCK_ROWS", 8)
    monkeypatch.setattr(absorption, "VISIBLE_PLACES", 1)
    rows = []

    def counted(queries, batch, multiple):
        rows.append(len(queries.starts))
        return visible_topk(queries, batch, multiple)

    monkeypatch.setattr("glm5_patch.ops.sparse_attention.inputs.visible_topk", counted)
    for blocks, reference in (both(tensors, None, queries, SMALL), whole):
        for ours, theirs in zip(blocks, reference):
            assert relative(ours, theirs) < 1e-5
    assert sorted(rows) == [6, 6, 7, 7, 7, 7]


def test_a_product_of_each_head_in_several_tiles(interpreted):
    generator = torch.Generator().manual_seed(3)
    tensor = torch.randn(70, 1, 3, 100 + 16, generator=generator).to(DEVICE)
    weight = torch.randn(300, 3 * 150, generator=generator).to(DEVICE)
    projection = weight.unflatten(-1, (3, 150))[..., :100].permute(1, 2, 0)  # [3, 100, 300]
    out = torch.full((70, 1, 3, 300 + 16), float("nan"), device=DEVICE)
    sparse_mla.project(tensor, projection, out, copied=16)
    product = torch.einsum("sbnx,nxy->sbny", tensor[..., :100], projection)
    assert relative(out[..., :300], product) < 1e-5
    assert torch.equal(out[..., 300:], tensor[..., 100:])


def test_empty_places_and_a_query_without_keys(interpreted):
    queries, tensors = layout([20]), inputs(20, 1, 4, SMALL, seed=0)
    topk = visible_topk(queries, 1)[..., :9].clone()
    topk[0, 5, 2] = topk[0, 12, 0] = -1
    topk[0, 7] = -1
    for ours, theirs in zip(*both(tensors, topk, queries, SMALL)):
        assert relative(ours, theirs) < 1e-5
    attention = AttentionInputs(*tensors, topk, queries, SMALL, 0.2)
    assert absorbed_attention(attention)[0][7].abs().max() == 0


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.nightly
def test_the_deterministic_backward(interpreted, deterministic):
    queries, tensors = layout([24]), inputs(24, 2, 4, SMALL, seed=3)
    topk = chosen_keys(queries, 2, 6, 3)
    for ours, theirs in zip(*both(tensors, topk, queries, SMALL)):
        assert relative(ours, theirs) < 1e-5


def index_inputs(s, b, heads, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = (s, b, heads, dim), (s, b, dim), (s, b, heads)
    return [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]


def by_sorting(query, key, weights, queries, k, scale):
    """The top-k as sets, from all scores at once; the lower position wins among equals."""
    products = torch.einsum("sbhd,tbd->bsht", query, key).mul(scale).relu()
    scores = torch.einsum("bsht,sbh->bst", products, weights)
    at = torch.arange(len(key), device=DEVICE)
    seen = (at <= (queries.starts + queries.local_positions)[:, None]) & (
        at >= queries.starts[:, None]
    )
    scores = scores.masked_fill(~seen, float("-inf"))
    values, columns = scores.sort(dim=-1, descending=True, stable=True)
    local = (columns - queries.starts[:, None]).masked_fill(values == float("-inf"), -1)
    return local[..., :k].sort(-1)[0]


@pytest.mark.parametrize("lengths", [[50], [1, 30, 0, 19]], ids=["bshd", "thd"])
@pytest.mark.parametrize("heads, dim", [(4, 16), (32, 32)])
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in (1, 2))]
)
def test_selection(interpreted, lengths, heads, dim, seed, monkeypatch):
    from glm5_patch.ops import query_positions

    monkeypatch.setattr(query_positions, "BLOCK_BYTES", 21 * 50 * 4)  # 21 queries at a time
    monkeypatch.setattr(indexer_kernels, "FEWEST_QUERIES", 1)
    b = 2 if len(lengths) == 1 else 1
    queries, tensors = layout(lengths), index_inputs(50, b, heads, dim, seed)
    ours = indexer_kernels.index_topk(IndexerInputs(*tensors), queries, 9, dim**-0.5)
    assert torch.equal(ours.sort(-1)[0], by_sorting(*tensors, queries, 9, dim**-0.5).int())


def test_long_rows_are_selected_from_candidates(interpreted, monkeypatch):
    """Of rows that a sample describes, and of rows that it does not."""
    monkeypatch.setattr(indexer_kernels, "IN_REGISTERS", 64)
    k, s = 20, 150
    places = torch.arange(s - 8, s, device=DEVICE)  # the last queries, which see most keys
    queries = QueryPositions(torch.zeros_like(places), places, s, s)
    query, key, weights = index_inputs(s, 1, 4, 16, seed=0)
    query, weights = query[places], weights[places]
    usual = indexer_kernels.index_topk(IndexerInputs(query, key, weights), queries, k, 0.25)
    assert torch.equal(usual.sort(-1)[0], by_sorting(query, key, weights, queries, k, 0.25).int())
    # All scores equal: too many candidates. Whole numbers, whose sums are exact in every order;
    # of others a BLAS may round equal columns differently.
    query, key, weights = (tensor.mul(4).round() for tensor in (query, key, weights))
    key[:] = key[0]
    equal = indexer_kernels.index_topk(IndexerInputs(query, key, weights), queries, k, 0.25)
    assert torch.equal(equal.sort(-1)[0], by_sorting(query, key, weights, queries, k, 0.25).int())


def test_too_few_candidates_are_noticed(monkeypatch):
    """Where the scores of the sample are the highest of a row, fewer than k reach the bar."""
    monkeypatch.setattr(indexer_kernels, "IN_REGISTERS", 64)
    s, k = 150, 20
    scores = torch.rand(4, s, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    sample = indexer_kernels.room_for_candidates(s, k) // 2
    numbers, stride = torch.arange(sample, device=DEVICE), s // sample  # as the kernel samples
    scores[:, stride * numbers + numbers * 7919 % stride] += 10
    ours = torch.full((4, k), -7, dtype=torch.int32, device=DEVICE)
    starts, positions = layout([s]).spans()
    indexer_kernels.select_into(ours, scores, starts[-4:], positions[-4:], s)
    for row, visible in enumerate(range(s - 3, s + 1)):
        best = scores[row, :visible].topk(k).indices
        assert torch.equal(ours[row].long(), best.sort()[0])


@pytest.mark.parametrize("longest", [8192, 32768, 65536, 131072, 262144, 1 << 20])
def test_a_sample_of_a_long_row_seldom_misleads(longest):
    """The share of the scores above the n-th largest of a sample has a beta distribution."""
    k, room = 2048, indexer_kernels.room_for_candidates(longest, 2048)
    sample = room // 2
    expected = k * sample / longest
    wanted = int(expected + indexer_kernels.DEVIATIONS * expected**0.5) + 1
    torch.manual_seed(0)
    share = torch.distributions.Beta(wanted, sample - wanted + 1.0).sample((20000,))
    candidates = share * longest
    misled = ((candidates < k) | (candidates > room)).float().mean()
    assert misled < 5e-3


def test_equal_scores_go_to_the_lower_positions(interpreted):
    """As where every head's product is negative: the scores of many keys are 0."""
    query, key, weights = index_inputs(32, 1, 4, 16, seed=0)
    key[::2] = -query.sum((0, 1, 2)).abs()  # no rule, but many zeros among the scores
    queries = layout([32])
    weights = weights.abs().mul(
        (torch.arange(32, device=DEVICE) % 3 > 0)[:, None, None]
    )  # whole rows of zeros
    ours = indexer_kernels.index_topk(IndexerInputs(query, key, weights), queries, 5, 0.25)
    assert torch.equal(ours.sort(-1)[0], by_sorting(query, key, weights, queries, 5, 0.25).int())


@pytest.mark.parametrize("in_registers", [8192, pytest.param(64, marks=pytest.mark.nightly)])
def test_scores_that_are_not_numbers_stay_in_their_row(in_registers, monkeypatch):
    """As when training diverges: the CUDA NaN, 0x7fffffff, is the largest integer there is."""
    monkeypatch.setattr(indexer_kernels, "IN_REGISTERS", in_registers)
    scores = torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
    scores[60:70, ::3] = float("inf")
    scores.view(torch.int32)[70:80, ::2] = 0x7FFFFFFF
    scores.view(torch.int32)[90:95] = scores.view(torch.int32)[95:, ::2] = 0x7FFFFFFF
    queries, k = layout([100]), 20
    guarded = torch.full((120, k), -7, dtype=torch.int32, device=DEVICE)
    where = *queries.spans(), 100
    indexer_kernels.select_into(guarded[:100], scores.to(DEVICE), *where)
    assert (guarded[100:] == -7).all()
    for row, chosen in enumerate(guarded[:100].tolist()):
        chosen = [key for key in chosen if key >= 0]
        assert len(set(chosen)) == len(chosen) == min(k, row + 1)
        assert max(chosen) <= row


@pytest.mark.parametrize("kernels", ["", "auto", "torch"])
def test_torch_computes_on_the_cpu_unless_triton_is_asked_for(kernels, monkeypatch):
    monkeypatch.setenv("GLM5_PATCH_KERNELS", kernels)
    on_cpu = torch.zeros(1, dtype=torch.bfloat16)
    assert choose("sparse_attention", Call.of(on_cpu)).name == "torch"
    says = "GLM5_PATCH_KERNELS=torch" if kernels == "torch" else "the tensors are on cpu"
    assert computed_by(on_cpu.device, on_cpu.dtype) == f"torch ({says})"


def test_triton_that_can_not_is_no_silent_torch(monkeypatch):
    monkeypatch.setenv("GLM5_PATCH_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    wide = Call.of(torch.zeros(1), kv_lora_rank=512)
    assert choose("sparse_attention", wide).name == "triton"
    with pytest.raises(
        GLM5PatchError, match="kv_lora_rank=48 must be a power of two of at least 64"
    ):
        choose("sparse_attention", Call.of(torch.zeros(1), kv_lora_rank=48))
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(GLM5PatchError, match="=triton: the tensors are on cpu; unset it, or set"):
        choose("sparse_attention", wide)


def test_unknown_kernels_are_named(monkeypatch):
    monkeypatch.setenv("GLM5_PATCH_KERNELS", "cuda")
    says = "='cuda' must be one of auto, triton, gluon, cudnn, flash_mla, deep_gemm, torch"
    with pytest.raises(GLM5PatchError, match=says):
        choose("sparse_attention", Call.of(torch.zeros(1)))


@pytest.mark.parametrize(
    ("lengths", "loss_coeff"),
    [
        pytest.param(None, None, id="bshd", marks=pytest.mark.nightly),
        pytest.param([3, 12], 0.5, id="thd-indexer-loss"),
    ],
)
def test_a_model_on_the_kernels_equals_one_on_torch(
    lengths, loss_coeff, world, interpreted, tmp_path, monkeypatch
):
    """Whole model, selection and a skip layer included, forward and backward, under full
    recompute."""
    wide = dict(kv_lora_rank=64, index_n_heads=16)
    schedule = dict(index_topk_freq=2, index_skip_topk_offset=1)
    checkpoint = saved(tmp_path, num_hidden_layers=2, **schedule, **wide)
    found, programs = {}, []
    run = absorption._forward
    monkeypatch.setattr(
        absorption, "_forward", lambda absorbed: programs.append(kernels) or run(absorbed)
    )
    for kernels in ("torch", "triton"):
        monkeypatch.setenv("GLM5_PATCH_KERNELS", kernels)
        model = megatron_model(
            checkpoint,
            recompute_granularity="full",
            recompute_method="uniform",
            recompute_num_layers=1,
            dsa_indexer_loss_coeff=loss_coeff,
            dsa_indexer_use_sparse_loss=True,
        ).train()
        with recorded(model) as recording:
            if lengths:
                ids = tokens(1, 1, sum(lengths))
                logits = pack_forward(model, ids, packed(lengths))
            else:
                ids = tokens(1, 2, 16)
                logits = forward(model, ids)
            loss = loss_of(logits, ids)
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found[kernels] = loss.item(), grads, recording.topk_indices
    assert programs == ["triton"] * 4  # two layers, each run and run again
    (loss, grads, topk), (expected, truth, chosen) = found["triton"], found["torch"]
    assert loss == pytest.approx(expected, rel=1e-6)
    if not lengths:  # the hosts' own code names keys of other documents, and masks them later
        assert {n: k.sort(-1)[0].tolist() for n, k in topk.items()} == {
            n: k.sort(-1)[0].tolist() for n, k in chosen.items()
        }
    assert grads.keys() == truth.keys()
    assert max(relative(grads[n], truth[n]) for n in grads) < 2e-5
