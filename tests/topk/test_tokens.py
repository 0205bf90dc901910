"""Which rank holds which tokens, and that gathering puts them back."""

import pytest
import torch

from glm5_patch.errors import GLM5PatchError
from glm5_patch.topk import tokens as context_parallel
from glm5_patch.topk.tokens import ContextParallel
from tests.tiny import packed


class Group:
    def __init__(self, rank, size):
        self.rank, self.size = lambda: rank, lambda: size


def splits(size, lengths, thd, order="zigzag"):
    pack = packed(lengths) if thd else None
    local = sum(lengths) // size
    groups = [Group(rank, size) for rank in range(size)]
    return [ContextParallel(group, pack, local, "cpu", order) for group in groups]


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_hold_a_chunk_from_each_end_of_the_sequence(size):
    ranks = splits(size, [16 * size], thd=False)
    first = ranks[0].queries
    assert first.positions.tolist() == [*range(8), *range(16 * size - 8, 16 * size)]
    assert first.starts.tolist() == [0] * 16
    everything = torch.cat([one.queries.positions for one in ranks])
    assert sorted(everything.tolist()) == list(range(16 * size))


def test_each_document_of_a_pack_is_split_by_itself():
    ranks = splits(2, [4, 0, 8], thd=True)
    assert ranks[0].queries.positions.tolist() == [0, 3, 4, 5, 10, 11]
    assert ranks[0].queries.starts.tolist() == [0, 0, 4, 4, 4, 4]
    assert ranks[1].queries.positions.tolist() == [1, 2, 6, 7, 8, 9]
    assert ranks[1].queries.keys == 12


@pytest.mark.parametrize("thd", [False, True])
def test_in_contiguous_order_a_document_may_cross_ranks(thd):
    ranks = splits(2, [6, 10], thd, order="contiguous")
    assert [one.queries.positions.tolist() for one in ranks] == [[*range(8)], [*range(8, 16)]]
    assert ranks[0].queries.starts.tolist() == ([0] * 6 + [6] * 2 if thd else [0] * 8)
    assert ranks[1].queries.local_positions.tolist() == [*range(2, 10)] if thd else [*range(8, 16)]
    assert ranks[0].queries.longest == (10 if thd else 16)


@pytest.mark.parametrize("order", ["zigzag", "contiguous"])
@pytest.mark.parametrize("thd", [False, True])
def test_gathered_tokens_come_back_in_order(thd, order, monkeypatch):
    ranks = splits(2, [8, 16, 24], thd, order)
    whole = torch.randn(48, 3)
    pieces = torch.cat([whole[one.queries.positions] for one in ranks])
    monkeypatch.setattr(
        context_parallel, "gather_from_sequence_parallel_region", lambda tensor, group: pieces
    )
    assert torch.equal(ranks[0].gather(whole[ranks[0].queries.positions]), whole)


def test_a_document_that_can_not_be_split_is_named():
    with pytest.raises(GLM5PatchError, match="document of 6 tokens.*multiple of 4"):
        splits(2, [6, 10], thd=True)
