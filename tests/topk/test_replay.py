"""Replay in one process: padded, packed, partly recorded, and what is refused."""

from dataclasses import replace

import pytest
import torch

from glm5_patch.errors import GLM5PatchError
from glm5_patch.patches import MACHINE
from glm5_patch.testing.parity import recorded
from glm5_patch.tools.verify import forward
from glm5_patch.topk.record import TopkRecording, record_topk
from glm5_patch.topk.replay import replay_topk
from tests.distributed.cases import FULL
from tests.tiny import megatron_model, pack_forward, packed, saved, tokens

LENGTH, COMPUTING = 30, (1, 2, 3, 7)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def rollout(world, checkpoint):
    """Recordings of two sequences by a model with other indexers."""
    model = megatron_model(checkpoint)
    for name, parameter in model.named_parameters():
        if ".indexer." in name:
            parameter.data = parameter.data.flip(0)
    with torch.no_grad(), record_topk() as recorder:
        forward(model, tokens(0, 2, LENGTH))
    return recorder.recordings


@pytest.fixture(scope="module")
def model(world, our_core, checkpoint):
    return megatron_model(checkpoint)


def attended(model, recordings, run, **options):
    """The top-k of each computing layer."""
    with torch.no_grad(), replay_topk(recordings, **options) as report, recorded(model) as found:
        run()
    return {n: found.topk_indices[n] for n in COMPUTING}, report


def assert_replayed(topk, row, first, recording, positions=None):
    """[s, k] from ``first`` on of one sequence has what was recorded."""
    for number, of_layer in topk.items():
        at, keys = recording.keys(number)
        if positions is not None:
            keep = torch.isin(at, positions)
            at, keys = at[keep], keys[keep]
        assert len(at) and torch.equal(of_layer[row, first + at], keys)


def test_a_padded_batch_replays_its_sequences(model, rollout):
    ids = torch.cat([tokens(0, 2, LENGTH), torch.zeros(2, 7, dtype=torch.int64)], 1)
    topk, report = attended(model, rollout, lambda: forward(model, ids), report=True)
    for row in (0, 1):
        assert_replayed(topk, row, 0, rollout[row])
    assert report.counts.keys() == set(COMPUTING)
    rows = 2 * (LENGTH - rollout[0].index_topk)  # the padding is not recorded
    assert {all_ for _, all_ in report.counts.values()} == {rows * rollout[0].index_topk}
    assert max(report.shares.values()) < 0.9
    first = topk[1][0, :9]
    assert first.tolist() == [[*range(n + 1), *[-1] * (8 - n)] for n in range(9)]


def test_a_pack_replays_its_documents_and_selects_for_the_others(model, rollout):
    ids = tokens(0, 2, LENGTH)
    pack = torch.cat([tokens(5, 1, 11)[0], ids[1], ids[0]])[None]
    bounds = packed([11, LENGTH, 0, LENGTH])
    run = lambda: pack_forward(model, pack, bounds)
    topk, _ = attended(model, [None, rollout[1], None, rollout[0]], run)
    assert_replayed(topk, 0, 11, rollout[1])
    assert_replayed(topk, 0, 11 + LENGTH, rollout[0])
    with torch.no_grad(), recorded(model) as alone:
        forward(model, tokens(5, 1, 11))
    assert torch.equal(topk[1][:, :11], alone.topk_indices[1])


def test_of_a_prompt_that_is_not_recorded_the_indexer_selects(model, rollout):
    prompt, ids = 17, tokens(0, 2, LENGTH)
    positions = torch.arange(prompt, LENGTH)
    some = [without_prompt(one, prompt) for one in rollout]
    topk, report = attended(model, some, lambda: forward(model, ids), report=True)
    for row in (0, 1):
        assert_replayed(topk, row, 0, rollout[row], positions)
    with torch.no_grad(), recorded(model) as own:
        forward(model, ids)
    # Of layer 1, whose input is the same.
    assert torch.equal(topk[1][:, :prompt], own.topk_indices[1][:, :prompt])
    assert not torch.equal(topk[1][:, prompt:], own.topk_indices[1][:, prompt:])


def without_prompt(recording, prompt):
    """The same recording, of the queries from ``prompt`` on."""
    later = slice(prompt - recording.index_topk, None)
    layers = {n: [part[later].numpy() for part in recording.keys(n)] for n in COMPUTING}
    return TopkRecording.of_keys(recording.index_topk, LENGTH, layers)


@pytest.mark.parametrize("length", [LENGTH, LENGTH - 1], ids=["whole", "last token missing"])
def test_a_pack_with_padded_documents_replays_their_tokens(model, rollout, length):
    """The real lengths are shorter than the places that the documents have."""
    ids, padding = tokens(0, 2, LENGTH), torch.zeros(5, dtype=torch.int64)
    pack = torch.cat([tokens(5, 1, 11)[0], padding, ids[1], padding, ids[0], padding])[None]
    bounds, real = packed([16, LENGTH + 5, 0, LENGTH + 5]), packed([11, LENGTH, 0, LENGTH])
    bounds.cu_seqlens_q_padded = bounds.cu_seqlens_kv_padded = bounds.cu_seqlens_q
    positions = torch.cat([torch.arange(n) for n in bounds.cu_seqlens_q.diff().tolist()])[None]
    bounds.cu_seqlens_q = bounds.cu_seqlens_kv = real.cu_seqlens_q
    run = lambda: model(pack, positions, None, packed_seq_params=bounds)
    first, second = (replace(one, length=length) for one in rollout)
    topk, report = attended(model, [None, second, None, first], run, report=True)
    rows = 2 * (length - rollout[0].index_topk)  # padding does not count
    assert {all_ for _, all_ in report.counts.values()} == {rows * rollout[0].index_topk}
    before = torch.arange(length)
    assert_replayed(topk, 0, 16, rollout[1], before)
    assert_replayed(topk, 0, 16 + LENGTH + 5, rollout[0], before)
    with torch.no_grad(), recorded(model) as own:
        run()
    assert torch.equal(topk[1][:, :11], own.topk_indices[1][:, :11])  # it has no recording
    if length < LENGTH:  # nor has the last token
        for last in (16 + LENGTH - 1, 16 + LENGTH + 5 + LENGTH - 1):
            assert torch.equal(topk[1][:, last], own.topk_indices[1][:, last])


def test_a_partly_recorded_document_replays_beside_one_without_a_recording(model, rollout):
    prompt, ids, without = 17, tokens(0, 2, LENGTH), tokens(5, 1, LENGTH)[0]
    pack = torch.cat([ids[0], without, ids[1]])[None]
    run = lambda: pack_forward(model, pack, packed([LENGTH] * 3))
    recordings = [without_prompt(rollout[0], prompt), None, rollout[1]]
    topk, _ = attended(model, recordings, run)
    assert_replayed(topk, 0, 0, rollout[0], torch.arange(prompt, LENGTH))
    assert_replayed(topk, 0, 2 * LENGTH, rollout[1])
    with torch.no_grad(), recorded(model) as own:
        run()
    for rows in (slice(prompt), slice(LENGTH, 2 * LENGTH)):
        assert torch.equal(topk[1][:, rows], own.topk_indices[1][:, rows])
    assert not torch.equal(topk[1][:, prompt:LENGTH], own.topk_indices[1][:, prompt:LENGTH])


def test_replaying_what_the_model_selects_changes_nothing(model):
    """The last token of a rollout was never fed: the indexer selects its keys."""
    ids = tokens(3, 2, LENGTH)
    with torch.no_grad(), record_topk() as recorder:
        logits = forward(model, ids)
    recordings = [replace(one, length=LENGTH - 1) for one in recorder.recordings]
    with torch.no_grad(), replay_topk(recordings, report=True) as report:
        assert torch.equal(forward(model, ids), logits)
    assert set(report.shares.values()) == {1.0}


@pytest.mark.parametrize("settings", [{}, FULL], ids=["no recompute", "full recompute"])
def test_two_microbatches_in_flight_replay_each_its_own(model, checkpoint, settings, rollout):
    """Forward, forward, backward, backward: gradients are those of one after the other."""
    model = megatron_model(checkpoint, **settings).train()
    batches = [(tokens(0, 2, LENGTH), rollout), (tokens(1, 2, LENGTH), rollout[::-1])]

    def loss(ids, recordings):
        with replay_topk(recordings):
            return forward(model, ids).float().logsumexp(-1).mean()

    def gradients():
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    for batch in batches:
        loss(*batch).backward()
    expected = gradients()
    in_flight = [loss(*batch) for batch in batches]
    for one in in_flight:
        one.backward()
    found = gradients()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    with torch.no_grad():
        assert torch.equal(loss(*batches[0]), in_flight[0])


def other(recording, **changes):
    return [replace(recording, **changes)] * 2


@pytest.mark.parametrize(
    ("change", "length", "says"),
    [
        (lambda r: r[:1], LENGTH, "1 recordings for a batch of 2 sequences; give replay_topk one"),
        (lambda r: r, LENGTH - 1, "has 30 positions, its document has 29 tokens"),
        (lambda r: other(r[0], index_topk=8), LENGTH, "has index_topk=8, the model has dsa_in"),
        (
            lambda r: other(r[0], layers={n: r[0].layers[n] for n in (1, 2, 3)}),
            LENGTH,
            r"has layers \[1, 2, 3\], the model computes its top-k in layers \[1, 2, 3, 7\]",
        ),
        (
            lambda r: [r[0], replace(r[1], index_topk=8)],
            LENGTH,
            "recordings of one batch have index_topk=",
        ),
    ],
)
def test_a_recording_that_does_not_fit_is_refused(change, length, says, model, rollout):
    with pytest.raises(GLM5PatchError, match=says), torch.no_grad():
        with replay_topk(change(rollout)):
            forward(model, tokens(0, 2, length))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (lambda r: r[0], "recordings is a TopkRecording; give a list"),
        (lambda r: None, "recordings is a NoneType; give a list"),
        (lambda r: [r[0], r[1].keys(1)[1].numpy()], "recording 1 of the batch is a ndarray; give"),
        (lambda r: "recordings", "recording 0 of the batch is a str"),
    ],
)
def test_what_is_no_list_of_recordings_is_refused(given, says, rollout):
    with pytest.raises(GLM5PatchError, match=says):
        with replay_topk(given(rollout)):
            pass


def test_a_recording_of_another_document_of_a_pack_is_refused(model, rollout):
    ids, bounds = tokens(0, 1, LENGTH + 9), packed([LENGTH + 5, 4])
    with pytest.raises(GLM5PatchError, match="recording 0 of the batch has 30 positions"):
        with torch.no_grad(), replay_topk([rollout[0], None]):
            pack_forward(model, ids, bounds)


def test_forwards_without_recordings_are_refused_where_replay_is_required(
    world, our_core, checkpoint, rollout
):
    model = megatron_model(checkpoint, dsa_topk_replay=True)
    with pytest.raises(GLM5PatchError, match="dsa_topk_replay=True, and the forward runs without"):
        forward(model, tokens(0, 2, LENGTH))
    with torch.no_grad(), replay_topk(rollout):
        forward(model, tokens(0, 2, LENGTH))


def test_two_forwards_in_one_block_are_not_recorded(model):
    with pytest.raises(GLM5PatchError, match="layer 1 runs twice in one record_topk block"):
        with torch.no_grad(), record_topk():
            forward(model, tokens(0, 1, LENGTH))
            forward(model, tokens(1, 1, LENGTH))
    with record_topk() as recorder:
        pass
    with pytest.raises(GLM5PatchError, match="nothing was recorded"):
        recorder.recordings  # noqa: B018


@pytest.mark.parametrize("block", ["replay_topk", "record_topk"])
def test_megatrons_own_attention_neither_replays_nor_records(
    block, world, checkpoint, rollout, monkeypatch
):
    row = MACHINE.row("dsa_spec")
    if "under recompute" not in row.reason:
        pytest.skip(f"this host has no attention for a GLM-5: {row.reason}")
    monkeypatch.setenv("GLM5_PATCH_ATTENTION", "host")
    model = megatron_model(checkpoint)
    opened = replay_topk(rollout) if block == "replay_topk" else record_topk()
    with pytest.raises(GLM5PatchError, match="layer 1 has DSAttention as its attention, which"):
        with torch.no_grad(), opened:
            forward(model, tokens(0, 2, LENGTH))
