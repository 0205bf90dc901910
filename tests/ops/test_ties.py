"""Equal index scores: the lower position is selected, by every backend and at every length."""

import pytest
import torch

from glm5_patch.ops import query_positions
from glm5_patch.ops.index_topk import triton as indexer_kernels
from glm5_patch.ops.index_topk.operation import index_topk
from glm5_patch.ops.index_topk.reference import IndexerInputs, selection
from glm5_patch.ops.query_positions import QueryPositions
from tests.ops import dense
from tests.ops.test_triton import DEVICE


def lowest_of_equals(scores, k):
    """[rows, t], row i sees keys 0 to i: int32 [rows, k], ascending, -1 last. In plain Python."""
    rows = []
    for number, row in enumerate(scores.tolist()):
        order = sorted(range(number + 1), key=lambda key: (-row[key], key))
        chosen = sorted(order[:k])
        rows.append(chosen + [-1] * (k - len(chosen)))
    return torch.tensor(rows, dtype=torch.int32)


def whole_numbers(length, kind, seed=0):
    """Indexer inputs whose scores are exact in every order of summation."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randint(-2, 3, shape, generator=generator).float()
    query, key, weights = draw(length, 1, 16, 16), draw(length, 1, 16), draw(length, 1, 16)
    if kind == "zeros":  # every product of most keys is negative: their scores are 0
        query, key = query.abs(), -key.abs()
        key[::7] *= -1
    elif kind == "negative zeros":  # a negative weight times a product of 0
        query, key, weights = query.abs(), -key.abs(), -weights.abs() - 1
        key[::5] *= -1
    elif kind == "threshold":
        key[:] = key[torch.arange(length) % 3]
    return IndexerInputs(query, key, weights)


@pytest.mark.parametrize(
    "kind, length",
    [
        ("zeros", 70),
        ("negative zeros", 70),
        *(
            pytest.param(kind, length, marks=pytest.mark.nightly)
            for kind in ("zeros", "negative zeros", "threshold", "many values")
            for length in (71, 301)
        ),
    ],
)
def test_the_lower_position_is_selected(kind, length, monkeypatch):
    monkeypatch.setattr(query_positions, "BLOCK_BYTES", 37 * length * 4)
    monkeypatch.setattr(indexer_kernels, "FEWEST_QUERIES", 1)
    inputs, k = whole_numbers(length, kind), 11
    scores = dense.index_scores(*inputs, 1.0)[0]
    expected = lowest_of_equals(scores, k)
    kth = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -1e9).sort(descending=True)[0]
    if kind != "many values":  # or there is nothing to choose
        assert (kth[:, k - 1] == kth[:, k])[k:].float().mean() > 0.5
    places = torch.arange(length)
    topk = {}
    if DEVICE == "cuda":  # whole numbers are exact in bf16, which Triton takes there
        query, key, weights = (tensor.to(DEVICE) for tensor in inputs)
        inputs = IndexerInputs(query.bfloat16(), key.bfloat16(), weights)
    for kernels, rows in (("torch", places), ("triton", places[-2:])):  # the interpreter is slow
        monkeypatch.setenv("GLM5_PATCH_KERNELS", kernels)
        rows = rows.to(DEVICE)
        queries = QueryPositions(torch.zeros_like(rows), rows, length, length)
        own = inputs._replace(query=inputs.query[rows], weights=inputs.weights[rows])
        topk[kernels] = index_topk(own, queries, k, 1.0)[0].cpu()
    monkeypatch.setattr(indexer_kernels, "IN_REGISTERS", 16)
    topk["triton, from candidates"] = index_topk(own, queries, k, 1.0)[0].cpu()
    wrong = {n: int((found != expected[-len(found) :]).sum()) for n, found in topk.items()}
    assert set(wrong.values()) == {0}, wrong


@pytest.mark.parametrize("in_registers", [4096, 16])
def test_both_zeros_are_equal_scores(in_registers, monkeypatch):
    monkeypatch.setattr(indexer_kernels, "IN_REGISTERS", in_registers)
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(-1, 2, (60, 60), generator=generator).float()
    scores[torch.rand(scores.shape, generator=generator) < 0.5] *= -1  # half of the zeros are -0.0
    positions = torch.arange(56, 60, dtype=torch.int32)
    last = [tensor.to(DEVICE) for tensor in (scores[-4:], torch.zeros_like(positions), positions)]
    expected = lowest_of_equals(scores, 8)[-4:]
    assert torch.equal(indexer_kernels.selection(*last, 60, 8).cpu(), expected)
    assert torch.equal(selection(*last, 60, 8).cpu(), expected)


def test_the_choice_does_not_depend_on_the_length():
    """``torch.topk`` answers otherwise for a prefix of the same row."""
    inputs = whole_numbers(301, "zeros")
    topk = {}
    for length in (40, 301):
        queries = QueryPositions(torch.zeros(length, dtype=torch.int64), longest=length)
        cut = IndexerInputs(*(tensor[:length] for tensor in inputs))
        topk[length] = index_topk(cut, queries, 11, 1.0)[0, :40]
    assert torch.equal(topk[40], topk[301])
