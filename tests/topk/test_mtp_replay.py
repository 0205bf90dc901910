"""Layers of multi-token prediction are recorded, and replay where they are."""

import dataclasses
from contextlib import nullcontext

import pytest
import torch

from glm5_patch.checkpoint.reader import HFCheckpoint
from glm5_patch.errors import GLM5PatchError
from glm5_patch.topk.ahead import Ahead
from glm5_patch.topk.record import LayerName, TopkRecording, record_topk
from glm5_patch.topk.replay import replay_topk
from tests.distributed.cases import FULL
from tests.tiny import add_mtp_layer, megatron_model, packed, saved, tokens

LENGTH = 30
MTP = dict(mtp_num_layers=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = saved(tmp_path_factory.mktemp("mtp")).directory
    add_mtp_layer(directory)
    return HFCheckpoint(directory)


@pytest.fixture(scope="module")
def model(world, our_core, checkpoint):
    return megatron_model(checkpoint, **MTP)


def run(model, ids, documents=None):
    lengths = documents or [ids.shape[1]]
    positions = torch.cat([torch.arange(length) for length in lengths]).expand_as(ids)
    pack = packed(documents) if documents else None
    return model(ids, positions, None, labels=ids.roll(-1, 1), packed_seq_params=pack)


def recordings_of(model, ids, documents=None, replayed=None):
    """What a forward attends to."""
    block = nullcontext() if replayed is None else replay_topk(replayed)
    with torch.no_grad(), block, record_topk() as recorder:
        run(model, ids, documents)
    return recorder.recordings


def flip_indexers(model):
    for name, parameter in model.named_parameters():
        if ".indexer." in name:
            parameter.data = parameter.data.flip(0)


@pytest.fixture(scope="module")
def rollout(model):
    """Recordings of two sequences by a model with other indexers."""
    flip_indexers(model)
    found = recordings_of(model, tokens(0, 2, LENGTH))
    flip_indexers(model)
    return found


def without_mtp(recordings):
    return [dataclasses.replace(one, mtp_layers={}) for one in recordings]


def differ(one, other):
    return not torch.equal(one.keys(1, mtp=True)[1], other.keys(1, mtp=True)[1])


def test_an_mtp_layer_replays_in_every_layout(model, rollout):
    ids = tokens(0, 2, LENGTH)
    assert [sorted(one.mtp_layers) for one in rollout] == [[1], [1]]
    assert recordings_of(model, ids, replayed=rollout) == rollout
    padded = torch.cat([ids, torch.zeros(2, 5, dtype=torch.int64)], 1)
    again = recordings_of(model, padded, replayed=rollout)
    pack = torch.cat([tokens(5, 1, 11)[0], ids[1], ids[0]])[None]
    lengths = [11, LENGTH, LENGTH]
    of_pack = recordings_of(model, pack, lengths, [None, rollout[1], rollout[0]])
    for found, one in (*zip(again, rollout), (of_pack[1], rollout[1]), (of_pack[2], rollout[0])):
        positions, keys = one.keys(1, mtp=True)
        assert torch.equal(found.keys(1, mtp=True)[1][: len(positions)], keys)


def test_an_mtp_layer_is_decoded_beside_the_last_decoder_layer(model, rollout, monkeypatch):
    names, waited, begin, take = [], [], Ahead.begin, Ahead.take
    monkeypatch.setattr(Ahead, "begin", lambda a, name: names.append(name) or begin(a, name))
    monkeypatch.setattr(Ahead, "take", lambda a, name: waited.append(a.begun) or take(a, name))
    ids = tokens(0, 2, LENGTH)
    for _ in range(2):  # two forwards of a block
        recordings_of(model, ids, replayed=rollout)
    last, mtp = LayerName(False, 7), LayerName(True, 1)
    assert names[:9] == [LayerName(False, n) for n in (1, 2, 2, 3, 3, 7)] + [last, mtp, mtp]
    assert waited[3:5] == [(last, mtp), (mtp,)]
    with replay_topk(rollout) as _, torch.no_grad():  # a stack that no MTP layer follows
        model.decoder(torch.randn(LENGTH, 2, 64), None)
    other = [rollout[1], rollout[0]]
    assert recordings_of(model, ids.flip(0), replayed=other) == other


def test_an_mtp_layer_that_is_not_recorded_selects_for_itself(model, rollout):
    ids = tokens(0, 2, LENGTH)
    found = recordings_of(model, ids, replayed=without_mtp(rollout))
    assert [one.layers for one in found] == [one.layers for one in rollout]
    assert all(map(differ, found, rollout))
    one_of_two = recordings_of(model, ids, replayed=[rollout[0], *without_mtp(rollout[1:])])
    assert [differ(*pair) for pair in zip(one_of_two, rollout)] == [False, True]
    says = "recording 1 of the batch has no MTP layer 1, and require_mtp=True; record"
    with pytest.raises(GLM5PatchError, match=says), torch.no_grad():
        with replay_topk([rollout[0], *without_mtp(rollout[1:])], require_mtp=True):
            run(model, ids)


def test_a_model_without_mtp_ignores_its_keys(world, our_core, checkpoint, rollout):
    (first, second) = recordings_of(megatron_model(checkpoint), tokens(0, 2, LENGTH), None, rollout)
    assert [first, second] == without_mtp(rollout)


@pytest.mark.parametrize(
    "settings", [pytest.param({}, marks=pytest.mark.nightly), FULL], ids=["no recompute", "full"]
)
def test_a_step_replays_an_mtp_layer_and_counts_it_once(checkpoint, model, rollout, settings):
    model = megatron_model(checkpoint, **MTP, **settings).train()
    core = model.mtp.layers[0].get_submodule(
        next(n for n, _ in model.mtp.layers[0].named_modules() if n.endswith("core_attention"))
    )
    attended = []
    core.observer = lambda _, topk_indices: attended.append(topk_indices)
    with replay_topk(rollout, report=True) as report:
        run(model, tokens(0, 2, LENGTH)).mean().backward()
    index_topk = rollout[0].index_topk
    assert report.mtp_counts[1][1] == 2 * (LENGTH - index_topk) * index_topk
    assert report.mtp_shares[1] < 0.9
    assert len(attended) == (2 if settings else 1)
    for topk_indices in attended:
        for row, one in zip(topk_indices, rollout):
            positions, keys = one.keys(1, mtp=True)
            assert torch.equal(row[positions], keys)


def test_iterations_of_a_repeated_layer_are_depths(world, our_core, checkpoint):
    from megatron.core.transformer.transformer_config import TransformerConfig

    if "mtp_use_repeated_layer" not in {f.name for f in dataclasses.fields(TransformerConfig)}:
        pytest.skip("this megatron-core applies each MTP layer once")
    repeated = dict(mtp_num_layers=3, mtp_use_repeated_layer=True)
    ids = tokens(0, 1, LENGTH)
    for share, depths in ((False, [1, 2, 3]), (True, [1])):
        model = megatron_model(checkpoint, **repeated, dsa_indexer_share_for_mtp_iteration=share)
        flip_indexers(model)
        (made,) = recordings_of(model, ids)
        flip_indexers(model)
        assert sorted(made.mtp_layers) == depths
        assert recordings_of(model, ids, replayed=[made]) == [made]
        assert recordings_of(model, ids) != [made]


def test_a_file_keeps_them(rollout, tmp_path):
    rollout[0].save(tmp_path / "recording")
    assert TopkRecording.load(tmp_path / "recording") == rollout[0]
