"""The overlap of selections, as a training log would show it."""

import pytest
import torch

from glm5_patch.testing.parity import recorded, topk_overlap
from glm5_patch.tools.verify import forward
from tests.tiny import megatron_model, saved, tokens


def test_overlap_falls_as_the_indexers_move(world, tmp_path):
    model = megatron_model(saved(tmp_path)).eval()
    ids = tokens(0, 2, 40)

    def selected(tokens):
        with torch.no_grad(), recorded(model) as recording:
            forward(model, tokens)
        return recording.topk_indices

    before = selected(ids)
    assert set(topk_overlap(selected(ids), before).values()) == {1.0}
    shares = []
    for size in (0.1, 1.0):
        for name, parameter in model.named_parameters():
            if ".indexer.linear" in name:
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
                parameter.data += size * parameter.std() * noise
        overlap = topk_overlap(selected(ids), before)
        assert overlap[4] == overlap[5] == overlap[6] == overlap[3]  # skip layers follow
        shares.append(overlap[1])
    assert 0.4 < shares[1] < shares[0] < 1.0  # chance is 0.47
    with pytest.raises(
        ValueError, match=r"layer 1: a batch of \(2, 20\) tokens and one of \(2, 40\)"
    ):
        topk_overlap(selected(ids[:, :20]), before)
    with pytest.raises(ValueError, match="are not the same"):
        topk_overlap({}, before)
