import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from glm5_patch.errors import GLM5PatchError
from glm5_patch.ops import query_positions
from glm5_patch.ops.query_positions import QueryPositions, document_starts, selected_keys
from glm5_patch.ops.sparse_attention.reference import blocked_attention
from tests.ops import dense
from tests.tiny import relative

HEADS, DIM, VALUE_DIM, SCALE = 3, 16, 8, 0.25


def random_topk(s, b, k, starts, generator):
    """Random visible keys of each query, counted from its document's start, -1 filled up."""
    topk = torch.full((b, s, k), -1, dtype=torch.int32)
    for row in range(s):
        visible = row - int(starts[row]) + 1
        for batch in range(b):
            chosen = torch.randperm(visible, generator=generator)[:k]
            topk[batch, row, : len(chosen)] = chosen.int()
    return topk


def test_starts_of_documents():
    assert document_starts([0, 1, 4, 4, 6]).tolist() == [0, 1, 1, 1, 4, 4]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rows_per_block", [1, 7, 1000])
@pytest.mark.parametrize("lengths", [[40], [1, 20, 0, 19]], ids=["bshd", "thd"])
def test_blocked_equals_dense_forward_and_backward(seed, rows_per_block, lengths, monkeypatch):
    generator = torch.Generator().manual_seed(seed)
    s, b, k = 40, 1 if len(lengths) > 1 else 2, 6
    monkeypatch.setattr(query_positions, "BLOCK_BYTES", rows_per_block * b * HEADS * s * 4)
    starts = dense.starts_of(lengths)
    topk = random_topk(s, b, k, starts, generator)
    tensors = [
        torch.randn(s, b, HEADS, d, generator=generator, requires_grad=True)
        for d in (DIM, DIM, VALUE_DIM)
    ]
    output = blocked_attention(*tensors, topk, QueryPositions(starts), SCALE)
    expected = dense.attention(*tensors, dense.selected(topk, lengths), SCALE)
    assert relative(output, expected) < 1e-6
    upstream = torch.randn(output.shape, generator=generator)
    ours = torch.autograd.grad(output, tensors, upstream)
    theirs = torch.autograd.grad(expected, tensors, upstream)
    for a, e in zip(ours, theirs):
        assert relative(a, e) < 1e-6


@pytest.mark.parametrize("rows_per_block", [1, 7, 1000])
def test_queries_may_stand_anywhere_among_the_keys(rows_per_block, monkeypatch):
    """As on one rank of a context-parallel group: its rows are those of the whole."""
    generator = torch.Generator().manual_seed(0)
    s, b, k = 40, 2, 6
    monkeypatch.setattr(query_positions, "BLOCK_BYTES", rows_per_block * b * HEADS * s * 4)
    starts = dense.starts_of([24, 16])
    topk = random_topk(s, b, k, starts, generator)
    query, key, value = (
        torch.randn(s, b, HEADS, d, generator=generator) for d in (DIM, DIM, VALUE_DIM)
    )
    positions = torch.randperm(s, generator=generator)[:17]
    queries = QueryPositions(starts[positions], positions, s)
    some = blocked_attention(query[positions], key, value, topk[:, positions], queries, SCALE)
    whole = blocked_attention(query, key, value, topk, QueryPositions(starts), SCALE)
    assert relative(some, whole[positions]) < 1e-6


def test_selection_never_reaches_another_document():
    starts = dense.starts_of([5, 3])
    topk = torch.tensor([0, 2, -1], dtype=torch.int32).expand(1, 8, 3)
    mask = selected_keys(slice(0, 8), QueryPositions(starts), topk)[0]
    assert mask[7].nonzero().flatten().tolist() == [5, 7]
    assert mask[4].nonzero().flatten().tolist() == [0, 2]


def test_a_query_without_keys_gets_zeros_and_no_nan():
    topk = torch.full((1, 4, 2), -1, dtype=torch.int32)
    tensors = [torch.randn(4, 1, HEADS, d, requires_grad=True) for d in (DIM, DIM, VALUE_DIM)]
    output = blocked_attention(
        *tensors, topk, QueryPositions(torch.zeros(4, dtype=torch.int64)), SCALE
    )
    assert output.abs().sum() == 0
    assert all(g.abs().sum() == 0 for g in torch.autograd.grad(output.sum(), tensors))


def test_cu_seqlens_that_do_not_cover_the_pack_are_refused():
    class Packed:
        qkv_format = "thd"
        cu_seqlens_q = torch.tensor([0, 3])
        cu_seqlens_q_padded = None

    with pytest.raises(GLM5PatchError, match="ends at 3, but the pack has 5"):
        QueryPositions.of(Packed, 5, "cpu")


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return result


def test_the_largest_tensor_grows_linearly(monkeypatch):
    """No [heads, s, s] tensor and no [s, s] mask: with a fixed block, twice the length is at
    most twice the largest tensor."""
    monkeypatch.setattr(query_positions, "BLOCK_BYTES", 1 << 16)
    largest = {}
    for s in (512, 1024, 2048):
        starts = torch.zeros(s, dtype=torch.int64)
        topk = random_topk(s, 1, 4, starts, torch.Generator().manual_seed(0))
        tensors = [torch.randn(s, 1, HEADS, d, requires_grad=True) for d in (DIM, DIM, VALUE_DIM)]
        with LargestTensor() as seen:
            blocked_attention(*tensors, topk, QueryPositions(starts), SCALE).sum().backward()
        largest[s] = seen.numel
    assert largest[1024] <= 2.1 * largest[512]
    assert largest[2048] <= 2.1 * largest[1024]
    assert largest[2048] < 2048 * 2048 / 10
