"""Attention in blocks of queries: what is as wide as the latent exists for one block at a time."""

import itertools
import weakref
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton", reason="triton is not installed")

from glm5_patch.ops import query_positions
from glm5_patch.ops.query_positions import QueryPositions
from glm5_patch.ops.sparse_attention import absorption
from glm5_patch.ops.sparse_attention.absorption import absorbed_attention
from glm5_patch.ops.sparse_attention.inputs import AttentionInputs
from glm5_patch.ops.sparse_attention.reference import sparse_attention
from tests.ops.test_triton import DEVICE, SMALL, chosen_keys, inputs, layout
from tests.tiny import relative

S, HEADS, K = 9, 2, 3
LAYOUTS = {"bshd": ([S], 2), "thd": ([1, 3, 0, 5], 1)}
KERNELS = "torch", "triton", "deterministic triton"
CASES = [
    # kernels, layout, whether all keys are selected, whether what comes out is kept, seed
    ("torch", "bshd", False, True, 0),
    ("torch", "thd", True, False, 0),
]
MORE = set(itertools.product(KERNELS, LAYOUTS, [False, True], [False, True], range(3))) - {*CASES}


def into_blocks(monkeypatch, b, rows=4, kept=1 << 30):
    """Have blocks of at most so many queries."""
    monkeypatch.setattr(absorption, "BLOCK_ROWS", 1)
    row = b * HEADS * (SMALL.latent + SMALL.rope) * 4
    monkeypatch.setattr(absorption, "ABSORBED_BYTES", rows * row)
    monkeypatch.setattr(absorption, "KEPT_BYTES", kept)


def case(layout_name, seed, all_keys=False):
    lengths, b = LAYOUTS[layout_name]
    queries = layout(lengths)
    topk = None if all_keys else chosen_keys(queries, b, K, seed)
    return inputs(S, b, HEADS, SMALL, seed), topk, queries, b


def result(tensors, topk, queries, core=absorbed_attention):
    """Output, log-sum-exp where there is one, and the gradients of those tensors that need one."""
    output, lse = core(AttentionInputs(*tensors, topk, queries, SMALL, 0.2))
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(9)).to(DEVICE)
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    return output.detach(), lse, torch.autograd.grad(output, wanted, upstream)


@pytest.mark.parametrize(
    "kernels, layout_name, all_keys, kept, seed",
    [*CASES, *(pytest.param(*one, marks=pytest.mark.nightly) for one in sorted(MORE))],
)
def test_blocks_equal_the_whole(
    interpreted, monkeypatch, kernels, layout_name, all_keys, kept, seed
):
    monkeypatch.setenv("GLM5_PATCH_KERNELS", kernels.split()[-1])
    tensors, topk, queries, b = case(layout_name, seed, all_keys)
    reference = result(tensors, topk, queries, sparse_attention)[2]
    with repeatable("deterministic" in kernels):
        output, lse, gradients = result(tensors, topk, queries)
        into_blocks(monkeypatch, b, kept=1 << 30 if kept else 0)
        found = result(tensors, topk, queries)
        again = result(tensors, topk, queries) if "deterministic" in kernels else found
    most = 1e-6
    if kernels == "torch":
        most = 1e-5  # a BLAS computes another number of rows in another way
    else:
        assert torch.equal(found[0], output) and torch.equal(found[1], lse)
    assert relative(found[0], output) < most and relative(found[1], lse) < most
    for ours, whole, theirs in zip(found[2], gradients, reference):
        assert relative(ours, whole) < most
        assert relative(ours, theirs) < 1e-5
    assert all(torch.equal(ours, same) for ours, same in zip(found[2], again[2]))


@contextmanager
def repeatable(asked):
    torch.use_deterministic_algorithms(asked)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def passes_in_torch(interpreted, monkeypatch):
    """The passes over the keys; Triton's interpreter takes seconds for them."""
    monkeypatch.setenv("GLM5_PATCH_KERNELS", "torch")


@pytest.mark.parametrize("frozen", [(2,), (0, 2), (1,)], ids=str)
def test_frozen_inputs(passes_in_torch, monkeypatch, frozen):
    tensors, topk, queries, b = case("bshd", 3)
    into_blocks(monkeypatch, b, kept=0)
    gradients = result(tensors, topk, queries)[2]
    expected = [gradient for place, gradient in enumerate(gradients) if place not in frozen]
    for place in frozen:
        tensors[place].requires_grad_(False)
    found = result(tensors, topk, queries)[2]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected))


def test_some_of_the_queries(passes_in_torch, monkeypatch):
    """As on one rank of a context-parallel group."""
    whole, (query, *others) = layout([9, 5]), inputs(14, 1, HEADS, SMALL, 0)
    positions = torch.randperm(14, generator=torch.Generator().manual_seed(1))[:S].to(DEVICE)
    queries = QueryPositions(whole.starts[positions], positions, 14, whole.longest)
    topk = chosen_keys(whole, 1, K, 0)[:, positions]
    some = [query[positions].detach().requires_grad_(), *others]
    expected = result(some, topk, queries, sparse_attention)
    into_blocks(monkeypatch, 1, kept=0)
    found = result(some, topk, queries)
    for ours, theirs in zip((found[0], *found[2]), (expected[0], *expected[2])):
        assert relative(ours, theirs) < 1e-5


class TensorsSeen(TorchDispatchMode):
    """Sizes of the tensors of numbers that anything returns."""

    def __init__(self):
        super().__init__()
        self.numels = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        found = result if isinstance(result, (tuple, list)) else (result,)
        tensors = [one for one in found if isinstance(one, torch.Tensor)]
        self.numels += [one.numel() for one in tensors if one.is_floating_point()]
        return result


@pytest.mark.parametrize("all_keys", [False, True], ids=["topk", "all keys"])
def test_nothing_as_wide_as_the_latent_exists_for_all_queries(
    passes_in_torch, monkeypatch, all_keys
):
    s, queries, tensors = 100, layout([100]), inputs(100, 1, HEADS, SMALL, 0)
    monkeypatch.setattr(query_positions, "BLOCK_BYTES", 1)  # keys are gathered query by query
    topk = None if all_keys else chosen_keys(queries, 1, K, 0)
    into_blocks(monkeypatch, 1, kept=0)
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    )
    with TensorsSeen() as seen, hooks:
        result(tensors, topk, queries)
    assert max(seen.numels) < s * HEADS * SMALL.latent
    assert [len(one) for one in saved if one.shape[-1] == SMALL.latent] == []


def test_one_block_is_computed_at_once(passes_in_torch, monkeypatch):
    tensors, topk, queries, b = case("bshd", 0)
    rows = []
    run = absorption._forward
    monkeypatch.setattr(
        absorption, "_forward", lambda absorbed: rows.append(len(absorbed.query)) or run(absorbed)
    )
    result(tensors, topk, queries)
    assert rows == [S]
    into_blocks(monkeypatch, b, rows=4)
    result(tensors, topk, queries)
    assert rows[1:] == [3, 3, 3]
    into_blocks(monkeypatch, b, rows=4, kept=0)
    result(tensors, topk, queries)
    assert rows[4:] == [3, 3, 3] * 2


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("rows", [S, 4], ids=["one block", "three"])
def test_a_backward_has_the_absorbed_queries_of_the_last_recompute(
    passes_in_torch, monkeypatch, rows, reentrant, layers
):
    tensors, topk, queries, b = case("bshd", 0)
    into_blocks(monkeypatch, b, rows)
    seen = []
    absorb = absorption.absorb
    monkeypatch.setattr(
        absorption, "absorb", lambda query, *rest: seen.append(len(query)) or absorb(query, *rest)
    )

    def output_of(query, *others):
        for _ in range(layers):
            output = absorbed_attention(AttentionInputs(query, *others, topk, queries, SMALL, 0.2))
            query = query + output[0].mean()
        return output[0]

    def gradients_of(output):
        upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(9))
        output.backward(upstream.to(DEVICE))
        return [tensor.grad for tensor in tensors]

    output = output_of(*tensors)
    expected = [gradient.clone() for gradient in gradients_of(output)]
    for tensor in tensors:
        tensor.grad = None
    seen.clear()
    found = checkpoint(output_of, *tensors, use_reentrant=reentrant)
    gradients = gradients_of(found)
    # Of a checkpoint that is not reentrant, the backward has the forward's own node.
    spared = 1 if reentrant and rows == S else 0
    assert sum(seen) == (3 * layers - spared) * S
    assert torch.equal(found, output)
    assert all(map(torch.equal, gradients, expected))


def test_absorbed_queries_are_freed(passes_in_torch):
    """With the graph of their recompute, and by the backward, which may run again."""
    tensors, topk, queries, _ = case("bshd", 0)
    kept = []

    class Recomputed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, anchor):
            return anchor.clone()

        @staticmethod
        def backward(ctx, gradient):
            with torch.enable_grad():
                output = absorbed_attention(AttentionInputs(*tensors, topk, queries, SMALL, 0.2))[0]
                total = output.sum()
            kept.append(weakref.ref(absorption._KeptQuery._last()._query))
            for _ in range(2):
                total.backward(retain_graph=True)
                kept.append(kept[0]())
            return gradient

    Recomputed.apply(torch.zeros((), requires_grad=True)).backward()
    assert kept[1:] == [None, None] and absorption._KeptQuery._last() is None
    twice = [tensor.grad for tensor in tensors]
    once = torch.autograd.grad(
        absorbed_attention(AttentionInputs(*tensors, topk, queries, SMALL, 0.2))[0].sum(), tensors
    )
    assert all(torch.equal(two, 2 * one) for two, one in zip(twice, once))
