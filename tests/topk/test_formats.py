"""What sglang, vLLM and miles return, written here as they document it, and read back."""

import base64
import io
import json
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from glm5_patch.errors import GLM5PatchError
from glm5_patch.topk.record import LayerName
from glm5_patch.topk.recordings.formats import (
    sglang_request_hash,
    topk_from_array,
    topk_from_sglang,
    topk_from_sglang_log,
    topk_from_vllm,
)
from tests.topk.test_record import K, neighbours

TOKENS = 30
CONFIG = SimpleNamespace(num_layers=4, dsa_indexer_types="FSFS", dsa_indexer_topk=K)
COMPUTING = (1, 3)


def selections(tokens: int = TOKENS) -> np.ndarray:
    """Unsorted, -1 where fewer keys are visible: int32 [tokens, 2, K]."""
    keys = np.full((tokens, len(COMPUTING), K), -1, dtype=np.int32)
    for column in range(len(COMPUTING)):
        for position in range(min(K, tokens)):
            keys[position, column, : position + 1] = np.arange(position + 1)[::-1]
        keys[K:, column] = neighbours(tokens, seed=column)
    return keys


def assert_read(recording, keys, first=K):
    """All that has a choice, from ``first`` on."""
    assert recording.length == len(keys)
    assert sorted(recording.layers) == list(COMPUTING)
    for column, number in enumerate(COMPUTING):
        positions, found = recording.keys(number)
        assert positions.tolist() == list(range(first, len(keys)))
        expected = torch.from_numpy(np.sort(keys[first:, column], axis=-1))
        assert torch.equal(found, expected)


def test_an_array_of_miles():
    keys = selections()
    assert_read(topk_from_array(keys, CONFIG), keys)
    assert_read(topk_from_array(keys.astype(np.int64), CONFIG), keys)


def sglang_answer(keys, **more):
    """All hidden layers: a skip layer repeats what it uses, in another order."""
    every = keys[:, [0, 0, 1, 1]].copy()
    every[:, 1::2] = every[:, 1::2, ::-1]
    return {"indexer_topk": base64.b64encode(every.astype("<i4").tobytes()).decode(), **more}


@pytest.mark.parametrize("more", [{}, {"indexer_topk_num_layers": 4}])
def test_an_answer_of_sglang(more):
    keys = selections(TOKENS - 1)  # the last token was never fed
    for tokens in (TOKENS, np.int64(TOKENS)):
        assert_read(topk_from_sglang(sglang_answer(keys, **more), tokens, CONFIG), keys)


def test_a_prompt_that_sglang_did_not_record_is_left_to_the_indexer():
    keys = selections(TOKENS - 1)
    keys[:12] = -1
    recording = topk_from_sglang(sglang_answer(keys), TOKENS, CONFIG)
    assert_read(recording, keys, first=12)
    assert not recording.covers(LayerName(False, 1), TOKENS - 1)


@pytest.mark.parametrize("start", [0, 11])
def test_an_answer_of_vllm(start):
    keys = selections()
    file = io.BytesIO()
    np.save(file, keys[start:])
    text = base64.b64encode(file.getvalue()).decode()
    assert_read(topk_from_vllm(text, CONFIG, prompt_start=start), keys, first=max(start, K))


def sglang_log(path, requests, **header):
    """As ``SGLTOPK1`` has it: a header, then each decode step of a batch, sorted and as gaps."""
    header = (
        dict(
            version=1,
            topk=K,
            num_model_layers=4,
            layer_ids=[0, 2],
            ids_are_token_positions=True,
            model_path="GLM-5.2",
            rank=0,
        )
        | header
    )
    text = json.dumps(header).encode()
    parts = [b"SGLTOPK1", struct.pack("<I", len(text)), text]
    steps = max(len(keys) - first for first, keys in requests.values())
    for step in range(steps):
        batch = [(n, first + step, keys) for n, (first, keys) in requests.items()]
        batch = [(n, position, keys) for n, position, keys in batch if position < len(keys)]
        rows = np.sort(np.stack([keys[position] for _, position, keys in batch]), axis=-1)
        gaps = np.diff(rows, axis=-1, prepend=np.int32(0)).astype("<i4")
        payload = zlib.compress(gaps.tobytes(), 1)
        parts.append(struct.pack("<QII", step, len(batch), len(payload)))
        parts += [struct.pack("<QI", sglang_request_hash(n), p + 1) for n, p, _ in batch]
        parts.append(payload)
    path.write_bytes(b"".join(parts))


def test_a_log_of_sglang(tmp_path):
    requests = {"one": (9, selections()), "another": (20, selections(26))}
    sglang_log(tmp_path / "log", requests)
    found = topk_from_sglang_log(tmp_path / "log", CONFIG)
    assert found.keys() == {sglang_request_hash(name) for name in requests}
    for name, (first, keys) in requests.items():
        assert_read(found[sglang_request_hash(name)], keys, first=first)


def test_what_does_not_fit_is_refused(tmp_path):
    keys = selections()
    with pytest.raises(GLM5PatchError, match="an array of 3 layers for a model of 4, of which 2"):
        topk_from_array(keys[:, [0, 0, 1]], CONFIG)
    with pytest.raises(GLM5PatchError, match="the model has index_topk=6"):
        topk_from_array(keys[..., :5], CONFIG)
    with pytest.raises(GLM5PatchError, match="layer 2 has other keys than layer 1, whose top-k"):
        topk_from_array(keys[:, [0, 1, 1, 1]], CONFIG)
    with pytest.raises(GLM5PatchError, match=r"\[tokens - 1, layers, index_topk\] of tokens=32"):
        topk_from_sglang(sglang_answer(keys, indexer_topk_num_layers=4), TOKENS + 2, CONFIG)
    with pytest.raises(GLM5PatchError, match="start sglang with --enable-return-indexer-topk"):
        topk_from_sglang({}, TOKENS, CONFIG)
    path = tmp_path / "log"
    sglang_log(path, {"one": (9, keys)}, ids_are_token_positions=False)
    with pytest.raises(GLM5PatchError, match="set SGLANG_DSA_FUSE_TOPK=0"):
        topk_from_sglang_log(path, CONFIG)
    sglang_log(path, {"one": (9, keys)}, layer_ids=[0, 1])
    with pytest.raises(GLM5PatchError, match=r"of layers \[1, 2\] and topk=6; the model computes"):
        topk_from_sglang_log(path, CONFIG)
    sglang_log(path, {"one": (9, keys)})
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(GLM5PatchError, match="cut off or damaged"):
        topk_from_sglang_log(path, CONFIG)


def encoded(array: np.ndarray, save=np.save) -> str:
    file = io.BytesIO()
    save(file, array)
    return base64.b64encode(file.getvalue()).decode()


NUMBERS = np.zeros((3, 2, K), dtype=np.int32)
CUT_OFF = base64.b64encode(base64.b64decode(encoded(NUMBERS))[:-1]).decode()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A",
        "AAAA",
        "!!!!",
        "\u00e4",
        5,
        None,
        encoded(NUMBERS, np.savez),
        CUT_OFF,
        encoded(NUMBERS.astype(object), lambda file, a: np.save(file, a, allow_pickle=True)),
    ],
)
def test_an_answer_of_vllm_that_is_no_array_is_refused(text):
    with pytest.raises(GLM5PatchError, match="indexer_topk is not base64"):
        topk_from_vllm(text, CONFIG)


@pytest.mark.parametrize(
    "array", [np.float32(1), NUMBERS.astype(float), NUMBERS.astype(bool), NUMBERS[0]]
)
def test_arrays_of_other_kinds_are_refused(array):
    with pytest.raises(GLM5PatchError, match="an array of"):
        topk_from_vllm(encoded(array), CONFIG)


@pytest.mark.parametrize("value", [-1, 0.5, None, "3", True])
def test_a_wrong_start_of_an_array_is_refused(value):
    for name in ("first", "mtp_layers"):
        with pytest.raises(GLM5PatchError, match=f"{name}={value!r}; give an integer"):
            topk_from_array(selections(), CONFIG, **{name: value})
    with pytest.raises(GLM5PatchError, match=f"prompt_start={value!r}; give an integer"):
        topk_from_vllm(encoded(selections()), CONFIG, prompt_start=value)


@pytest.mark.parametrize("of", [0, 1], ids=["computing layers", "all layers"])
def test_an_array_with_layers_of_multi_token_prediction(of):
    keys, of_mtp = selections(), selections()[:, ::-1]
    decoder = keys[:, [0, 0, 1, 1]] if of else keys
    read = topk_from_array(np.concatenate([decoder, of_mtp], 1), CONFIG, mtp_layers=2)
    assert_read(read, keys)
    for depth in (1, 2):
        expected = np.sort(of_mtp[K:, depth - 1], axis=-1)
        assert torch.equal(read.keys(depth, mtp=True)[1], torch.from_numpy(expected))
    with pytest.raises(GLM5PatchError, match="4 layers, 1 of them of multi-token prediction, for"):
        topk_from_array(np.concatenate([keys, of_mtp], 1), CONFIG, mtp_layers=1)


def test_tensors_and_lists_are_arrays():
    keys = selections()
    assert_read(topk_from_array(torch.from_numpy(keys), CONFIG), keys)
    assert_read(topk_from_array(keys.tolist(), CONFIG), keys)
    with pytest.raises(GLM5PatchError, match="keys is a list that NumPy takes no array from"):
        topk_from_array([[[1, 2]], [[1]]], CONFIG)
    with pytest.raises(GLM5PatchError, match="config is a dict; give the HFConfig"):
        topk_from_array(keys, {"index_topk": K})


def test_a_document_without_a_token_that_was_fed_has_an_empty_recording():
    """As long as a document of one token, and of none."""
    empty = selections()[:0]
    for read in (
        topk_from_array(empty, CONFIG),
        topk_from_vllm(encoded(empty), CONFIG),
        topk_from_sglang({"indexer_topk": ""}, 1, CONFIG),
        topk_from_sglang({"indexer_topk": "", "indexer_topk_num_layers": 4}, 1, CONFIG),
    ):
        assert (read.length, read.layers) == (0, {1: (), 3: ()})


CHANGES = {
    "a key after the query": lambda row: np.where(row == row.max(), 29, row),
    "a key twice": lambda row: np.where(row == row.max(), row[row >= 0].min(), row),
    "too few keys": lambda row: np.where(row == row.max(), -1, row),
    "a key below -1": lambda row: np.where(row == row.max(), -2, row),
}


@pytest.mark.parametrize("says", CHANGES)
@pytest.mark.parametrize("position", [2, 20], ids=["every key is seen", "with a choice"])
def test_wrong_keys_of_one_query_are_refused_in_every_form(tmp_path, says, position):
    keys = selections()
    keys[position, 1] = CHANGES[says](keys[position, 1])
    sglang_log(tmp_path / "log", {"one": (1, keys)})
    for read in (
        lambda: topk_from_array(keys, CONFIG),
        lambda: topk_from_sglang(sglang_answer(keys), TOKENS + 1, CONFIG),
        lambda: topk_from_vllm(encoded(keys), CONFIG),
        lambda: topk_from_sglang_log(tmp_path / "log", CONFIG),
    ):
        with pytest.raises(GLM5PatchError, match=f"layer 3, position {position}: {says}"):
            read()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"indexer_topk": "A"}, "indexer_topk is not base64"),
        ({"indexer_topk": "!!!!"}, "indexer_topk is not base64"),
        ({"indexer_topk": [1, 2]}, "indexer_topk is not base64"),
        ({"indexer_topk": "AAAA"}, "indexer_topk has 3 bytes"),
        ({"indexer_topk": ""}, "an array of 0 layers"),
        ({"indexer_topk_num_layers": "4"}, "indexer_topk_num_layers='4'"),
        ({"indexer_topk_num_layers": 4.0}, "indexer_topk_num_layers=4.0"),
        ({"indexer_topk_num_layers": -4}, "indexer_topk_num_layers=-4"),
        ({"indexer_topk_num_layers": 0}, "indexer_topk_num_layers=0"),
    ],
)
def test_a_damaged_answer_of_sglang_is_refused(changes, says):
    answer = sglang_answer(selections(TOKENS - 1)) | changes
    with pytest.raises(GLM5PatchError, match=says):
        topk_from_sglang(answer, TOKENS, CONFIG)


@pytest.mark.parametrize("tokens", [0, -3, 2.5, "30", None])
def test_a_wrong_number_of_tokens_is_refused(tokens):
    with pytest.raises(GLM5PatchError, match="tokens="):
        topk_from_sglang(sglang_answer(selections(TOKENS - 1)), tokens, CONFIG)


def log_with_header(path, text: bytes):
    path.write_bytes(b"".join([b"SGLTOPK1", struct.pack("<I", len(text)), text]))


VALID = {"topk": K, "layer_ids": [0, 2], "ids_are_token_positions": True}
WRONG_VALUES = {
    "topk": ["6", None, 6.0, [6], True],
    "layer_ids": ["02", None, 3, {}, [0, "2"], [0, None], [False, 2]],
    "ids_are_token_positions": [None, 1, "true", []],
}


@pytest.mark.parametrize("field", VALID)
def test_a_damaged_header_of_sglangs_log_is_refused(tmp_path, field):
    path = tmp_path / "log"
    headers = [{name: value for name, value in VALID.items() if name != field}]
    headers += [VALID | {field: value} for value in WRONG_VALUES[field]]
    for header in headers:
        log_with_header(path, json.dumps(header).encode())
        with pytest.raises(GLM5PatchError, match=f"log is damaged.*: {field} of its header"):
            topk_from_sglang_log(path, CONFIG)


@pytest.mark.parametrize("text", [b"[]", b"null", b"3", b"{", b"\xff", b"[" * 100_000])
def test_a_header_of_sglangs_log_that_is_no_object_is_refused(tmp_path, text):
    log_with_header(tmp_path / "log", text)
    with pytest.raises(GLM5PatchError, match="log is (cut off or )?damaged"):
        topk_from_sglang_log(tmp_path / "log", CONFIG)


def test_a_log_of_sglang_cut_off_anywhere_is_refused(tmp_path):
    path = tmp_path / "log"
    sglang_log(path, {"one": (27, selections())})
    content = path.read_bytes()
    (size,) = struct.unpack("<I", content[8:12])
    first_step = 12 + size + 16 + 12 + struct.unpack("<QII", content[12 + size :][:16])[2]
    for end in set(range(first_step)) - {12 + size}:
        path.write_bytes(content[:end])
        with pytest.raises(GLM5PatchError, match="log (is cut off|does not begin)"):
            topk_from_sglang_log(path, CONFIG)


def test_a_log_of_sglang_names_the_request_with_a_wrong_position(tmp_path):
    path = tmp_path / "log"
    sglang_log(path, {"one": (-1, selections()[:1])})  # a length of 0
    with pytest.raises(GLM5PatchError, match=r"log, request \d+: recording, layer 1"):
        topk_from_sglang_log(path, CONFIG)
