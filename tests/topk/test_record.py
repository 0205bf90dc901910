"""Recordings: what is kept of them, and what is refused."""

import json
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from glm5_patch.errors import GLM5PatchError
from glm5_patch.ops.recorded_keys.frame import Frame
from glm5_patch.topk.record import LayerName, TopkRecording
from glm5_patch.topk.recordings.file import FAMILY, HEAD, MAGIC

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
    mtp_layers = {1: (np.arange(K, length), neighbours(length, seed=4))}
    return TopkRecording.of_keys(K, length, layers | changes, mtp_layers)


@pytest.mark.parametrize("new", [1, K], ids=["of neighbours", "of strangers"])
@pytest.mark.parametrize("rows_of_a_frame", [1, 7, 256])
def test_the_keys_come_back(new, rows_of_a_frame, monkeypatch):
    monkeypatch.setattr("glm5_patch.topk.recordings.checks.FRAME_ROWS", rows_of_a_frame)
    rows = neighbours(60, new=new)
    shuffled = np.random.default_rng(0).permuted(rows, axis=1)
    made = TopkRecording.of_keys(K, 60, {2: (np.arange(K, 60), shuffled)})
    positions, keys = made.keys(2)
    assert positions.tolist() == list(range(K, 60))
    assert torch.equal(keys, torch.from_numpy(np.sort(rows, axis=1)).int())


def test_neighbours_take_less_than_their_keys():
    rows = neighbours(400)
    frame = Frame.encode(K, rows[:256])
    alone = len(Frame.encode(K, neighbours(400, new=K)[:256]).data)
    assert len(frame.data) < 0.8 * alone


def test_queries_that_see_few_keys_are_not_stored():
    keys = np.full((10, K), -1)
    for position in range(10):
        seen = min(position + 1, K)
        keys[position, :seen] = np.arange(position + 1)[-seen:]
    made = TopkRecording.of_keys(K, 10, {1: (np.arange(10), keys)})
    assert made.keys(1)[0].tolist() == list(range(K, 10))
    assert made.covers(LayerName(False, 1), 10) and not made.covers(LayerName(False, 1), 11)


def test_a_recording_of_some_positions_covers_no_more():
    rows = neighbours(40)
    made = TopkRecording.of_keys(K, 40, {1: (np.arange(20, 40), rows[20 - K :])})
    assert made.covers(LayerName(False, 1), K) and not made.covers(LayerName(False, 1), 40)


def test_parts_are_merged():
    whole, rows = recording(), {n: neighbours(40, seed=n) for n in (1, 3)}
    positions = np.arange(K, 40)
    even = positions // 10 % 2 == 0
    parts = [
        TopkRecording.of_keys(K, 40, {n: (positions[own], rows[n][own])})
        for n in (1, 3)
        for own in (even, ~even)
    ]
    parts.append(TopkRecording(K, 40, {}, whole.mtp_layers))  # of the last stage
    merged = TopkRecording.merge([*parts, parts[0]])
    for layer, mtp in ((1, False), (3, False), (1, True)):
        for ours, theirs in zip(merged.keys(layer, mtp=mtp), whole.keys(layer, mtp=mtp)):
            assert torch.equal(ours, theirs)
    assert merged.layers.keys() == {1, 3} and merged.mtp_layers == whole.mtp_layers
    with pytest.raises(GLM5PatchError, match="layer 1: two parts have other keys for position 6"):
        other = {1: (positions, neighbours(40, seed=9))}
        TopkRecording.merge([whole, TopkRecording.of_keys(K, 40, other)])
    with pytest.raises(GLM5PatchError, match=r"length=\[40, 41\] are not of one document"):
        TopkRecording.merge([whole, recording(41)])


def test_a_file_comes_back(tmp_path):
    path = tmp_path / "recording"
    for one in (
        recording(),
        replace(recording(), length=39),
        TopkRecording.of_keys(np.int64(K), np.int64(0), {}),
    ):
        one.save(path)
        assert TopkRecording.load(path) == one


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("recordings") / "whole"
    recording(12).save(path)
    return path.read_bytes()


def refused(path: Path, content: bytes, says: str) -> None:
    path.write_bytes(content)
    with pytest.raises(GLM5PatchError, match=says):
        TopkRecording.load(path)


DAMAGED = (
    "recording is (not a recording|a recording of another version of glm5-patch: .*; record it "
    "again|cut off or damaged: .*; copy it or record it again)"
)


def test_a_file_cut_off_or_changed_anywhere_is_refused(saved, tmp_path):
    path = tmp_path / "recording"
    for place in range(len(saved)):
        refused(path, saved[:place], DAMAGED)
        for bit in (1, 128):
            flipped = bytes([saved[place] ^ bit])
            refused(path, saved[:place] + flipped + saved[place + 1 :], DAMAGED)
    refused(path, saved + b"\0", DAMAGED)


def test_a_file_of_the_first_version_says_so(tmp_path):
    says = "is a recording of another version of glm5-patch: its format is b'K', this one reads"
    refused(tmp_path / "recording", FAMILY + b"K" + bytes(100), says)


def with_header(saved: bytes, change) -> bytes:
    """The file with another header and the right checksum."""
    begin = len(MAGIC) + HEAD.size
    size, _ = HEAD.unpack(saved[len(MAGIC) : begin])
    header = change(json.loads(saved[begin : begin + size]))
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    content = text + saved[begin + size :]
    return MAGIC + HEAD.pack(len(text), zlib.crc32(content)) + content


@pytest.mark.parametrize("header", [{}, [], None, 3, "x", b"{", b"\xff", b"[" * 100_000])
def test_a_header_of_another_kind_is_refused(saved, tmp_path, header):
    refused(tmp_path / "recording", with_header(saved, lambda _: header), "its header is")


@pytest.mark.parametrize("field", ["index_topk", "length"])
@pytest.mark.parametrize("value", ["6", None, 6.0, True, -1, 2**31, 10**400, [6], {}])
def test_a_wrong_number_in_the_header_is_refused(saved, tmp_path, field, value):
    content = with_header(saved, lambda header: header | {field: value})
    refused(tmp_path / "recording", content, f"recording is .*damaged: {field}=.* not an integer")


@pytest.mark.parametrize("field", ["index_topk", "length", "layers", "mtp_layers"])
def test_a_header_without_a_field_is_refused(saved, tmp_path, field):
    def drop(header):
        return {name: value for name, value in header.items() if name != field}

    refused(tmp_path / "recording", with_header(saved, drop), "not an object with")


@pytest.mark.parametrize(
    "layers",
    [
        [],
        None,
        3,
        "1",
        {"x": []},
        {"0": []},
        {"-1": []},
        {"1.5": []},
        {"": []},
        {"\u0661": []},
        {"9" * 5000: []},
    ],
)
def test_wrong_layers_in_the_header_are_refused(saved, tmp_path, layers):
    for kind in ("layers", "mtp_layers"):
        content = with_header(saved, lambda header, kind=kind: header | {kind: layers})
        refused(tmp_path / "recording", content, f"damaged: {kind}(=| has ).*not")


@pytest.mark.parametrize("place", [0, 1, 2], ids=["position", "rows", "bytes"])
@pytest.mark.parametrize("value", ["6", None, 1.5, True, -10, 0, 2**31, [6]])
def test_a_wrong_frame_in_the_header_is_refused(saved, tmp_path, place, value):
    def change(header):
        header["layers"]["1"][0][place] = value
        return header

    refused(tmp_path / "recording", with_header(saved, change), "layer 1 has a frame")


@pytest.mark.parametrize(
    "frames", [None, 3, {}, "x", [3], [[]], [[6, 6]], [[6, 6, 9, 9]], [[6, 2, 9], [7, 2, 9]]]
)
def test_wrong_frames_in_the_header_are_refused(saved, tmp_path, frames):
    def change(header):
        header["layers"]["1"] = frames
        return header

    refused(tmp_path / "recording", with_header(saved, change), "layer 1 (is|has a frame)")


def test_frames_of_other_lengths_than_the_file_are_refused(saved, tmp_path):
    def change(header):
        header["layers"]["3"][0][2] += 1
        return header

    refused(tmp_path / "recording", with_header(saved, change), "bytes, its header says")


def test_wrong_frames_of_an_mtp_layer_are_refused(saved, tmp_path):
    def change(header):
        header["mtp_layers"]["1"][0][1] = 0
        return header

    refused(tmp_path / "recording", with_header(saved, change), "MTP layer 1 has a frame")


@pytest.mark.parametrize("rows", [1, 7, 200])
def test_a_frame_with_the_data_of_another_is_refused(rows):
    frame = recording().layers[1][0]
    with pytest.raises(GLM5PatchError, match="the data of positions 6 to .* is damaged"):
        frame._replace(rows=rows).unpack()
    with pytest.raises(GLM5PatchError, match="the data of positions 6 to 39 .* is damaged"):
        frame._replace(data=frame.data[:-rows]).unpack()


def test_writers_of_one_file_do_not_share_a_temporary_file(tmp_path, monkeypatch):
    names = []
    monkeypatch.setattr(Path, "replace", lambda self, _: names.append(self.name))
    for _ in range(2):
        recording(12).save(tmp_path / "recording")
    assert len(set(names)) == 2


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    (tmp_path / "recording").mkdir()  # no file can replace it
    with pytest.raises(OSError):
        recording(12).save(tmp_path / "recording")
    assert [path.name for path in tmp_path.iterdir()] == ["recording"]


@pytest.mark.parametrize(
    ("positions", "says"),
    [
        ([7, 6, *range(8, 40)], "position 6 follows 7; sort"),
        ([6, 6, *range(8, 40)], "position 6 follows 6; sort"),
        ([*range(6, 39), 40], "position 40 is not a position of a document of length=40"),
        ([-1, *range(7, 40)], "position -1 is not a position"),
        ([float(position) for position in range(6, 40)], "positions are float64"),
        ([[position] for position in range(6, 40)], "positions are int64 .*integers .rows."),
    ],
)
def test_positions_that_no_document_has_are_refused(positions, says):
    with pytest.raises(GLM5PatchError, match=f"recording, layer 3: {says}"):
        TopkRecording.of_keys(K, 40, {3: (np.array(positions), neighbours(40))})


@pytest.mark.parametrize("value", [-1, 2.5, None, "6", True])
def test_numbers_that_are_none_are_refused(value):
    rows = {3: (np.arange(K, 40), neighbours(40))}
    for name, given in (
        ("index_topk", (value, 40, rows)),
        ("length", (K, value, rows)),
        ("layer number", (K, 40, {value: rows[3]})),
    ):
        with pytest.raises(GLM5PatchError, match=f"{name}={value!r}; give an integer"):
            TopkRecording.of_keys(*given)


def test_keys_that_are_no_integers_are_refused():
    with pytest.raises(GLM5PatchError, match="layer 3: keys of float64; keys must be integers"):
        TopkRecording.of_keys(K, 40, {3: (np.arange(K, 40), neighbours(40).astype(float))})


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
