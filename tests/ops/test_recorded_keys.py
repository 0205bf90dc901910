"""Frames of recorded keys: what goes in comes out, in NumPy and in Triton, in few bytes."""

from math import comb, log2

import numpy as np
import pytest
import torch

from glm5_patch.errors import GLM5PatchError
from glm5_patch.ops.recorded_keys import triton as on_gpu
from glm5_patch.ops.recorded_keys.frame import FRAME_ROWS, Frame
from glm5_patch.ops.recorded_keys.operation import recorded_keys
from glm5_patch.ops.recorded_keys.reference import recorded_keys as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def selections(first: int, rows: int, k: int, kept: float, seed: int = 0) -> np.ndarray:
    """Ascending keys of consecutive queries, each with that share of the keys of the one before:
    [rows, k]."""
    generator = np.random.default_rng(seed)
    found = [generator.permutation(first + 1)[:k]]
    for position in range(first + 1, first + rows):
        stay = generator.permutation(found[-1])[: round(kept * k)]
        others = np.setdiff1d(np.arange(position + 1), found[-1])
        new = generator.permutation(others)[: k - len(stay)]
        rest = generator.permutation(np.setdiff1d(found[-1], stay))[: k - len(stay) - len(new)]
        found.append(np.concatenate([stay, new, rest]))
    return np.sort(found, axis=1)


CASES = {
    "neighbours": selections(70, 40, 24, 0.8),
    "strangers": selections(200, 12, 9, 0.0),
    "the same": np.arange(30)[None].repeat(5, 0),
    "one query": selections(9, 1, 4, 0.5),
    "nearly all that is seen": selections(40, 20, 40, 0.9),
    "one key": selections(3, 8, 1, 0.5),
    "far apart": np.array([[0, 40_000], [40_000, 40_001], [0, 1]]),
}


def frames_and_keys():
    """Frames of documents of one index_topk, and all their keys."""
    parts = [(70, selections(70, 5, 24, 0.8)), (400, selections(400, 2, 24, 0.3, seed=1))]
    frames = [Frame.encode(first, keys).unpack() for first, keys in parts]
    return frames, torch.from_numpy(np.concatenate([keys for _, keys in parts])).int()


@pytest.mark.parametrize("case", CASES)
def test_keys_in_any_order_come_back_ascending(case):
    keys = CASES[case]
    first = int(keys.max()) + 1 if case == "far apart" else max(int(keys.max()), len(keys))
    shuffled = np.random.default_rng(1).permuted(keys, axis=1)
    for dtype in (np.int32, np.int64, np.uint32):
        frame = Frame.encode(first, shuffled.astype(dtype))
        found = reference([frame.unpack()], torch.arange(len(keys)), keys.shape[1], "cpu")
        assert found.dtype == torch.int32 and torch.equal(found, torch.from_numpy(keys).int())


def test_queries_of_several_frames_are_decoded_in_any_order():
    frames, keys = frames_and_keys()
    wanted = torch.tensor([6, 3, 5, 0])
    assert torch.equal(reference(frames, wanted, 24, "cpu"), keys[wanted])
    assert reference([], torch.arange(0), 24, "cpu").shape == (0, 24)


@pytest.mark.parametrize(
    "at_once", [pytest.param(1 << 20, marks=pytest.mark.nightly), 1], ids=["at once", "one by one"]
)
def test_triton_decodes_the_same(monkeypatch, at_once):
    pytest.importorskip("triton", reason="triton is not installed")
    if DEVICE == "cpu":
        monkeypatch.setenv("GLM5_PATCH_KERNELS", "triton")
    monkeypatch.setattr(on_gpu, "GROUP_BYTES", at_once)
    frames, keys = frames_and_keys()
    wanted = torch.tensor([6, 3, 5, 0, 4])
    found = recorded_keys(frames, wanted, 24, DEVICE)
    assert torch.equal(found.cpu(), keys[wanted])


@pytest.mark.parametrize(
    ("first", "k", "kept"),
    [
        (4096, 1024, 0.83),
        *(pytest.param(8192, 2048, kept, marks=pytest.mark.nightly) for kept in (0.4, 0.65, 0.83)),
    ],
)
def test_bytes_are_close_to_what_independent_changes_need(first, k, kept):
    """A query that keeps that share of the keys before it, any of them, and takes any others."""
    keys = selections(first, FRAME_ROWS, k, kept)
    dropped = k - round(kept * k)
    bits = log2(comb(first + 1, k))
    bits += sum(
        log2(comb(k, dropped)) + log2(comb(position + 1 - k, dropped))
        for position in range(first + 1, first + FRAME_ROWS)
    )
    assert len(Frame.encode(first, keys).data) < 1.06 * bits / 8


def test_queries_that_select_as_several_before_take_less():
    """Rows of two kinds alternate: each frame's queries refer to their own kind."""
    kinds = selections(300, 2, 64, 0.0)
    changes = np.random.default_rng(0).integers(0, 64, 60)
    rows = []
    for row, place in enumerate(changes):
        keys = kinds[row % 2].copy()
        keys[place] = np.setdiff1d(np.arange(300), keys)[place]
        rows.append(keys)
    alone = len(Frame.encode(301, np.array(rows[:2])).data)
    assert len(Frame.encode(301, np.array(rows)).data) < alone + 60 * 24


def test_a_change_of_any_byte_gives_keys_or_an_error():
    frame = Frame.encode(70, selections(70, 6, 12, 0.7))
    for place in range(len(frame.data)):
        for bit in (1, 16, 128):
            changed = bytes([frame.data[place] ^ bit])
            data = frame.data[:place] + changed + frame.data[place + 1 :]
            try:
                keys = reference([frame._replace(data=data).unpack()], torch.arange(6), 12, "cpu")
            except GLM5PatchError as error:
                assert "the data of positions 70 to 75 of a recording is damaged" in str(error)
            else:
                assert keys.shape == (6, 12) and (0 <= keys).all() and (keys < 76).all()
