"""Which rank holds which tokens, and that gathering puts them back."""

import pytest
import torch

from glm5_patch.errors import GLM5PatchError
from glm5_patch.model import context_parallel
from glm5_patch.model.context_parallel import ContextParallel
from tests.patches.test_recompute import packed


class Group:
    def __init__(self, rank, size):
        self.rank, self.size = lambda: rank, lambda: size


def splits(size, lengths, thd):
    pack = packed(lengths) if thd else None
    local = sum(lengths) // size
    return [ContextParallel(Group(rank, size), pack, local, "cpu") for rank in range(size)]


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_hold_a_chunk_from_each_end_of_the_sequence(size):
    ranks = splits(size, [16 * size], thd=False)
    first = ranks[0].rows
    assert first.positions.tolist() == [*range(8), *range(16 * size - 8, 16 * size)]
    assert first.starts.tolist() == [0] * 16
    everything = torch.cat([one.rows.positions for one in ranks])
    assert sorted(everything.tolist()) == list(range(16 * size))


def test_each_document_of_a_pack_is_split_by_itself():
    ranks = splits(2, [4, 0, 8], thd=True)
    assert ranks[0].rows.positions.tolist() == [0, 3, 4, 5, 10, 11]
    assert ranks[0].rows.starts.tolist() == [0, 0, 4, 4, 4, 4]
    assert ranks[1].rows.positions.tolist() == [1, 2, 6, 7, 8, 9]
    assert ranks[1].rows.keys == 12


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("thd", [False, True])
def test_gathered_tokens_come_back_in_order(thd, tp_size):
    ranks = splits(2, [8, 16, 24], thd=thd)
    shards = [one.rows.positions.chunk(tp_size) for one in ranks]
    # Gathered over the context-parallel ranks first, over the tensor-parallel ones after.
    gathered = torch.cat([shards[cp][tp] for tp in range(tp_size) for cp in range(2)])
    assert gathered[ranks[1].order(tp_size)].tolist() == list(range(48))


def test_gather_uses_the_group_and_the_order(monkeypatch):
    ranks = splits(2, [16], thd=False)
    whole = torch.randn(16, 3)
    pieces = torch.cat([whole[one.rows.positions] for one in ranks])
    monkeypatch.setattr(
        context_parallel, "gather_from_sequence_parallel_region", lambda tensor, group: pieces
    )
    assert torch.equal(ranks[0].gather(whole[ranks[0].rows.positions]), whole)


def test_a_document_that_can_not_be_split_is_named():
    with pytest.raises(GLM5PatchError, match="document of 6 tokens.*multiple of 4"):
        splits(2, [6, 10], thd=True)
