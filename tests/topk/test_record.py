"""Recordings: what is kept of them, and what is refused."""

import numpy as np
import pytest
import torch

from glm5_patch.errors import GLM5PatchError
from glm5_patch.topk import codec
from glm5_patch.topk.record import TopkRecording

K = 6


def neighbours(length: int, seed: int = 0, new: int = 1) -> np.ndarray:
    """Keys of the queries from K on, each mostly those of the query before: [length - K, K]."""
    generator = np.random.default_rng(seed)
    rows, kept = [], np.arange(K)
    for position in range(K, length):
        others = np.setdiff1d(np.arange(position + 1), kept)
        drawn = generator.permutation(others)[:new]
        kept = np.concatenate([generator.permutation(kept)[len(drawn) :], drawn])
        rows.append(kept)
    return np.array(rows)


def recording(length: int = 40, **changes) -> TopkRecording:
    layers = {n: (np.arange(K, length), neighbours(length, seed=n)) for n in (1, 3)}
    return TopkRecording.of_keys(K, length, layers | changes)


@pytest.mark.parametrize("new", [1, K], ids=["of neighbours", "of strangers"])
@pytest.mark.parametrize("rows_of_a_frame", [1, 7, 256])
def test_the_keys_come_back(new, rows_of_a_frame, monkeypatch):
    monkeypatch.setattr("glm5_patch.topk.record.FRAME_ROWS", rows_of_a_frame)
    rows = neighbours(60, new=new)
    shuffled = np.random.default_rng(0).permuted(rows, axis=1)
    made = TopkRecording.of_keys(K, 60, {2: (np.arange(K, 60), shuffled)})
    positions, keys = made.keys(2)
    assert positions.tolist() == list(range(K, 60))
    assert torch.equal(keys, torch.from_numpy(np.sort(rows, axis=1)).int())


def test_neighbours_take_less_than_their_keys():
    rows = neighbours(400)
    frame = codec.Frame.encode(K, rows[:256])
    alone = len(codec.Frame.encode(K, neighbours(400, new=K)[:256]).data)
    assert len(frame.data) < 0.8 * alone
    assert recording(400).nbytes < 2 * rows.size * 4 / 4


def test_queries_that_see_few_keys_are_not_stored():
    keys = np.full((10, K), -1)
    for position in range(10):
        seen = min(position + 1, K)
        keys[position, :seen] = np.arange(position + 1)[-seen:]
    made = TopkRecording.of_keys(K, 10, {1: (np.arange(10), keys)})
    assert made.keys(1)[0].tolist() == list(range(K, 10))
    assert made.covers(1, 10) and not made.covers(1, 11)


def test_a_recording_of_some_positions_covers_no_more():
    rows = neighbours(40)
    made = TopkRecording.of_keys(K, 40, {1: (np.arange(20, 40), rows[20 - K :])})
    assert made.covers(1, K) and not made.covers(1, 40)


def test_parts_are_merged():
    whole, rows = recording(), {n: neighbours(40, seed=n) for n in (1, 3)}
    positions = np.arange(K, 40)
    even = positions // 10 % 2 == 0
    parts = [
        TopkRecording.of_keys(K, 40, {n: (positions[own], rows[n][own])})
        for n in (1, 3)
        for own in (even, ~even)
    ]
    merged = TopkRecording.merge([*parts, parts[0]])
    for layer in (1, 3):
        for ours, theirs in zip(merged.keys(layer), whole.keys(layer)):
            assert torch.equal(ours, theirs)
    with pytest.raises(GLM5PatchError, match="layer 1: two parts have other keys for position 6"):
        other = {1: (positions, neighbours(40, seed=9))}
        TopkRecording.merge([whole, TopkRecording.of_keys(K, 40, other)])
    with pytest.raises(GLM5PatchError, match=r"length=\[40, 41\] are not of one document"):
        TopkRecording.merge([whole, recording(41)])


def test_a_file_comes_back_and_a_damaged_one_is_refused(tmp_path):
    path = tmp_path / "recording"
    recording().save(path)
    assert TopkRecording.load(path) == recording()
    content = path.read_bytes()
    for end in (len(content) - 1, 30, 3):
        path.write_bytes(content[:end])
        with pytest.raises(GLM5PatchError, match="cut off|not a recording|its header says"):
            TopkRecording.load(path)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ([0, 1, 2, 3, 4, 999], "position 6: a key after the query; keys are positions"),
        ([0, 1, 2, 3, 4, 4], "position 6: a key twice"),
        ([0, 1, 2, 3, 4, -1], "position 6: too few keys"),
    ],
)
def test_keys_that_no_query_can_have_are_refused(row, says):
    rows = neighbours(40)
    rows[0] = row
    with pytest.raises(GLM5PatchError, match=f"layer 3, {says}"):
        TopkRecording.of_keys(K, 40, {3: (np.arange(K, 40), rows)})
    with pytest.raises(GLM5PatchError, match=r"keys of shape \[34, 5\], where \[34, 6\]"):
        TopkRecording.of_keys(K, 40, {3: (np.arange(K, 40), rows[:, :5])})
