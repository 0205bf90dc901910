"""Recordings from what others return of a rollout: sglang, its log, vLLM, miles.

All count keys from the start of the document, and layers from 0.
"""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ...config.huggingface import HFConfig
from ...config.schedule import IndexSchedule
from ...errors import GLM5PatchError
from ..record import TopkRecording
from .checks import as_array, check_integer

SGLANG_MAGIC = b"SGLTOPK1"
_STEP, _REQUEST = struct.Struct("<QII"), struct.Struct("<QI")


def topk_from_array(
    keys: np.ndarray, config: Any, *, first: int = 0, mtp_layers: int = 0
) -> TopkRecording:
    """Read a recording from an array, such as miles' ``sample.rollout_indexer_topk``.

    Args:
        keys: int [tokens, layers, index_topk], in any order, -1 for an empty place. layers are all
            decoder layers, or the computing layers alone. A row of -1 alone is not recorded.
        config: the ``HFConfig`` or the ``TransformerConfig`` of the model.
        first: position of the first token of the array.
        mtp_layers: so many layers of multi-token prediction follow the others, by depth.

    Raises:
        GLM5PatchError: the array does not fit the model, a skip layer has other keys than its
            source, or a query has keys that it can't have.
    """
    schedule, index_topk = _model(config)
    check_integer("first", first, 0)
    check_integer("mtp_layers", mtp_layers, 0)
    keys = as_array("keys", keys)
    if keys.dtype.kind not in "iu":
        raise GLM5PatchError(f"an array of {keys.dtype}; the keys must be integers")
    if keys.ndim != 3 or keys.shape[2] != index_topk:
        raise GLM5PatchError(
            f"an array of shape {list(keys.shape)}, where [tokens, layers, index_topk] is needed "
            f"and the model has index_topk={index_topk}"
        )
    computing, length = schedule.computing_layers, first + len(keys)
    columns = keys.shape[1] - mtp_layers
    of_mtp = keys[:, max(0, columns) :]
    if columns == schedule.num_layers:
        for number in range(1, schedule.num_layers + 1):
            _check_shared(keys, number, schedule.source(number))
        keys = keys[:, [number - 1 for number in computing]]
    elif columns != len(computing):
        beside = f", {mtp_layers} of them of multi-token prediction," if mtp_layers else ""
        raise GLM5PatchError(
            f"an array of {keys.shape[1]} layers{beside} for a model of {schedule.num_layers}, of "
            f"which {len(computing)} compute their top-k; give all layers, or the computing ones"
        )
    layers, depths = (
        {number: _recorded(first, columns[:, column]) for column, number in enumerate(numbers)}
        for columns, numbers in ((keys, computing), (of_mtp, range(1, mtp_layers + 1)))
    )
    return TopkRecording.of_keys(index_topk, length, layers, depths)


def _recorded(first: int, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions and keys of the queries of one layer that are not empty."""
    rows = np.flatnonzero((keys != -1).any(1))
    return first + rows, keys[rows]


def topk_from_sglang(meta_info: Mapping[str, Any], tokens: int, config: Any) -> TopkRecording:
    """Read a recording from sglang's ``meta_info`` of a request with ``return_indexer_topk=True``
    (``--enable-return-indexer-topk``, sglang #24392 and #26684).

    Its ``indexer_topk`` is base64 of int32 [tokens - 1, layers, index_topk]: the last token was
    never fed to the model. miles' fork adds ``indexer_topk_num_layers``.

    Args:
        meta_info: of the response.
        tokens: of prompt and response.
        config: as of ``topk_from_array``.

    Raises:
        GLM5PatchError: as of ``topk_from_array``; ``indexer_topk`` is not base64, or does not have
            the keys of that many tokens.
    """
    found = meta_info.get("indexer_topk")
    if found is None:
        raise GLM5PatchError(
            "meta_info has no indexer_topk; start sglang with --enable-return-indexer-topk and "
            "send return_indexer_topk=true"
        )
    content = _decode(found)
    if len(content) % 4:
        raise GLM5PatchError(
            f"indexer_topk has {len(content)} bytes, which are not whole int32 numbers; give the "
            "text as sglang sent it"
        )
    if not isinstance(tokens, (int, np.integer)) or tokens < 1:
        raise GLM5PatchError(f"tokens={tokens!r}; give the number of tokens of prompt and response")
    numbers = np.frombuffer(content, dtype="<i4")
    schedule, index_topk = _model(config)
    layers = meta_info.get("indexer_topk_num_layers")
    if layers is None and tokens == 1:
        layers = len(schedule.computing_layers)  # of no token
    elif layers is None:
        layers = len(numbers) // (max(1, tokens - 1) * index_topk)
    elif type(layers) is not int or layers < 1:
        raise GLM5PatchError(
            f"indexer_topk_num_layers={layers!r} is not a number of layers; give meta_info as "
            "sglang sent it"
        )
    if len(numbers) != (tokens - 1) * layers * index_topk:
        raise GLM5PatchError(
            f"indexer_topk has {len(numbers)} numbers, which are not [tokens - 1, layers, "
            f"index_topk] of tokens={tokens} and index_topk={index_topk}; count the tokens of "
            "prompt and response"
        )
    return topk_from_array(numbers.reshape(tokens - 1, layers, index_topk), config)


def topk_from_vllm(indexer_topk: str, config: Any, *, prompt_start: int = 0) -> TopkRecording:
    """Read a recording from ``indexer_topk`` of a choice of vLLM's answer
    (``--enable-return-indexer-topk``, vLLM #49555): base64 of an ``.npy`` file, int32
    [tokens, computing layers, index_topk].

    Args:
        indexer_topk: the text.
        config: as of ``topk_from_array``.
        prompt_start: ``indexer_topk_prompt_start`` of the request: how many tokens of the prompt
            were left out.

    Raises:
        GLM5PatchError: as of ``topk_from_array``; it is not base64 of an ``.npy`` file.
    """
    check_integer("prompt_start", prompt_start, 0)
    content = io.BytesIO(_decode(indexer_topk))
    try:
        keys = np.lib.format.read_array(content, allow_pickle=False)
    except Exception as error:  # NumPy raises many kinds, also those of its header's parser
        raise GLM5PatchError(
            f"indexer_topk is not base64 of an .npy file ({error}); give the text as vLLM sent it"
        ) from error
    return topk_from_array(keys, config, first=prompt_start)


def topk_from_sglang_log(path: str | Path, config: Any) -> dict[int, TopkRecording]:
    """Read recordings from a file ``indexer_topk_rank*.bin``, which sglang writes to
    ``SGLANG_INDEXER_TOPK_LOG_DIR``. It has the decoded tokens of many requests, of the computing
    layers. Prompts are not in it.

    Args:
        path: of the file.
        config: as of ``topk_from_array``.

    Returns:
        Recording by the hash of its request, see ``sglang_request_hash``; the file's
        ``.rids.jsonl`` has the ids.

    Raises:
        GLM5PatchError: as of ``topk_from_array``; the file is another, is cut off, or holds slots
            of a cache.
    """
    schedule, index_topk = _model(config)
    found: dict[int, dict[int, np.ndarray]] = {}
    with open(path, "rb") as file:
        header = _sglang_header(file, path)
        layers = [number + 1 for number in header["layer_ids"]]
        wrong = layers != list(schedule.computing_layers) or header["topk"] != index_topk
        if wrong:
            raise GLM5PatchError(
                f"{path} is of layers {layers} and topk={header['topk']}; the model computes in "
                f"layers {list(schedule.computing_layers)} with index_topk={index_topk}"
            )
        if not header["ids_are_token_positions"]:
            raise GLM5PatchError(
                f"{path} holds slots of sglang's cache (ids_are_token_positions is false); set "
                "SGLANG_DSA_FUSE_TOPK=0 for the rollout"
            )
        while step := file.read(_STEP.size):
            _, batch, size = _unpack(_STEP, step, path)
            requests = [_unpack(_REQUEST, file.read(_REQUEST.size), path) for _ in range(batch)]
            try:
                gaps = np.frombuffer(zlib.decompress(file.read(size)), dtype="<i4")
                keys = gaps.reshape(batch, len(layers), index_topk).cumsum(-1, dtype=np.int32)
            except (ValueError, zlib.error) as error:
                raise GLM5PatchError(
                    f"{path} is cut off or damaged: {error}; copy it again"
                ) from error
            for (request, length), of_layers in zip(requests, keys):
                found.setdefault(request, {})[length - 1] = of_layers
    recordings = {}
    for request, rows in found.items():
        positions = np.array(sorted(rows))
        keys = np.stack([rows[position] for position in positions.tolist()])
        of_layers = {number: (positions, keys[:, column]) for column, number in enumerate(layers)}
        try:
            recordings[request] = TopkRecording.of_keys(
                index_topk, int(positions[-1]) + 1, of_layers
            )
        except GLM5PatchError as error:
            raise GLM5PatchError(f"{path}, request {request}: {error}") from error
    return recordings


def sglang_request_hash(request_id: str) -> int:
    """What sglang's log calls a request: CRC-32 of its id, and Adler-32 in the upper half."""
    name = request_id.encode()
    return zlib.crc32(name) | zlib.adler32(name) << 32


def _sglang_header(file: BinaryIO, path: str | Path) -> dict[str, Any]:
    if file.read(len(SGLANG_MAGIC)) != SGLANG_MAGIC:
        raise GLM5PatchError(
            f"{path} does not begin with {SGLANG_MAGIC.decode()}; give a log of sglang's indexer"
        )
    (size,) = _unpack(struct.Struct("<I"), file.read(4), path)
    try:
        header = json.loads(file.read(size))
    except (ValueError, RecursionError) as error:
        raise GLM5PatchError(f"{path} is cut off or damaged: {error}; copy it again") from error
    if not isinstance(header, dict):
        raise GLM5PatchError(f"{path} is damaged: its header is not an object; copy it again")
    layers = header.get("layer_ids")
    for field, valid in (
        ("layer_ids", isinstance(layers, list) and all(type(n) is int for n in layers)),
        ("topk", type(header.get("topk")) is int),
        ("ids_are_token_positions", type(header.get("ids_are_token_positions")) is bool),
    ):
        if not valid:
            value = repr(header[field]) if field in header else "missing"
            raise GLM5PatchError(
                f"{path} is damaged or of another version of sglang: {field} of its header is "
                f"{value}; copy it again"
            )
    return header


def _unpack(form: struct.Struct, data: bytes, path: str | Path) -> tuple[int, ...]:
    if len(data) != form.size:
        raise GLM5PatchError(f"{path} is cut off; copy it again")
    return form.unpack(data)


def _decode(indexer_topk: Any) -> bytes:
    try:
        return base64.b64decode(indexer_topk, validate=True)
    except (ValueError, TypeError) as error:
        raise GLM5PatchError(
            f"indexer_topk is not base64 ({error}); give the text as the server sent it"
        ) from error


def _check_shared(keys: np.ndarray, number: int, source: int) -> None:
    if number == source:
        return
    ours, theirs = (np.sort(keys[:, n - 1], axis=-1) for n in (number, source))
    differ = (ours != theirs).any(-1) & (ours >= 0).any(-1)
    if differ.any():
        raise GLM5PatchError(
            f"layer {number} has other keys than layer {source}, whose top-k it reuses, at token "
            f"{int(differ.argmax())} of the array; record a model with the same index schedule"
        )


def _model(config: Any) -> tuple[IndexSchedule, int]:
    """Which layers of a model compute, and how many keys they select."""
    if isinstance(config, HFConfig):
        return config.schedule, config.index_topk
    if not hasattr(config, "dsa_indexer_topk"):
        raise GLM5PatchError(
            f"config is a {type(config).__name__}; give the HFConfig or the TransformerConfig of "
            "the model"
        )
    return IndexSchedule.from_megatron(config).of_attention, config.dsa_indexer_topk
