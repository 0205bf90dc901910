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

from ..config.huggingface import HFConfig
from ..config.schedule import IndexSchedule
from ..errors import GLM5PatchError
from .record import TopkRecording

SGLANG_MAGIC = b"SGLTOPK1"
_STEP, _REQUEST = struct.Struct("<QII"), struct.Struct("<QI")


def topk_from_array(keys: np.ndarray, config: Any, *, first: int = 0) -> TopkRecording:
    """Of an array, which is what miles keeps as ``sample.rollout_indexer_topk``.

    Args:
        keys: int [tokens, layers, index_topk], in any order, -1 for an empty place. layers are all
            decoder layers, or the computing layers alone. A row of -1 alone is not recorded.
        config: the ``HFConfig`` or the ``TransformerConfig`` of the model.
        first: position of the first token of the array.

    Raises:
        GLM5PatchError: the array does not fit the model, a skip layer has other keys than its
            source, or a query has keys that it can't have.
    """
    schedule, index_topk = _model(config)
    if keys.ndim != 3 or keys.shape[2] != index_topk:
        raise GLM5PatchError(
            f"an array of shape {list(keys.shape)}, where [tokens, layers, index_topk] is needed "
            f"and the model has index_topk={index_topk}"
        )
    computing, length = schedule.computing_layers, first + len(keys)
    if keys.shape[1] == schedule.num_layers:
        for number in range(1, schedule.num_layers + 1):
            _check_shared(keys, number, schedule.source(number))
        keys = keys[:, [number - 1 for number in computing]]
    elif keys.shape[1] != len(computing):
        raise GLM5PatchError(
            f"an array of {keys.shape[1]} layers for a model of {schedule.num_layers}, of which "
            f"{len(computing)} compute their top-k; give all layers, or the computing ones"
        )
    positions = np.arange(first, length)
    layers = {}
    for column, number in enumerate(computing):
        recorded = (keys[:, column] >= 0).any(1)
        layers[number] = positions[recorded], keys[recorded, column]
    return TopkRecording.of_keys(index_topk, length, layers)


def topk_from_sglang(meta_info: Mapping[str, Any], tokens: int, config: Any) -> TopkRecording:
    """Of ``meta_info`` of a request with ``return_indexer_topk=True``
    (``--enable-return-indexer-topk``, sglang #24392 and #26684).

    Its ``indexer_topk`` is base64 of int32 [tokens - 1, layers, index_topk]: the last token was
    never fed to the model. miles' fork adds ``indexer_topk_num_layers``.

    Args:
        meta_info: of the response.
        tokens: of prompt and response.
        config: as of ``topk_from_array``.

    Raises:
        GLM5PatchError: as of ``topk_from_array``; the number of bytes is another.
    """
    found = meta_info.get("indexer_topk")
    if found is None:
        raise GLM5PatchError(
            "meta_info has no indexer_topk; start sglang with --enable-return-indexer-topk and "
            "send return_indexer_topk=true"
        )
    numbers = np.frombuffer(base64.b64decode(found), dtype="<i4")
    schedule, index_topk = _model(config)
    of_token = max(1, tokens - 1) * index_topk
    layers = meta_info.get("indexer_topk_num_layers") or len(numbers) // of_token
    if len(numbers) != (tokens - 1) * layers * index_topk:
        raise GLM5PatchError(
            f"indexer_topk has {len(numbers)} numbers, which are not [tokens - 1, layers, "
            f"index_topk] of tokens={tokens} and index_topk={index_topk}; count the tokens of "
            "prompt and response"
        )
    return topk_from_array(numbers.reshape(tokens - 1, layers, index_topk), config)


def topk_from_vllm(indexer_topk: str, config: Any, *, prompt_start: int = 0) -> TopkRecording:
    """Of ``indexer_topk`` of a choice of vLLM's answer (``--enable-return-indexer-topk``,
    vLLM #49555): base64 of an ``.npy`` file, int32 [tokens, computing layers, index_topk].

    Args:
        indexer_topk: the text.
        config: as of ``topk_from_array``.
        prompt_start: ``indexer_topk_prompt_start`` of the request: how many tokens of the prompt
            were left out.

    Raises:
        GLM5PatchError: as of ``topk_from_array``; it is no ``.npy``.
    """
    try:
        keys = np.load(io.BytesIO(base64.b64decode(indexer_topk)), allow_pickle=False)
    except ValueError as error:
        raise GLM5PatchError(f"indexer_topk is no base64 of an .npy file: {error}") from error
    return topk_from_array(keys, config, first=prompt_start)


def topk_from_sglang_log(path: str | Path, config: Any) -> dict[int, TopkRecording]:
    """Of a file ``indexer_topk_rank*.bin`` that sglang writes to ``SGLANG_INDEXER_TOPK_LOG_DIR``:
    the decoded tokens of many requests, of the computing layers. Prompts are not in it.

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
                raise GLM5PatchError(f"{path} is cut off or damaged: {error}") from error
            for (request, length), of_layers in zip(requests, keys):
                found.setdefault(request, {})[length - 1] = of_layers
    recordings = {}
    for request, rows in found.items():
        positions = np.array(sorted(rows))
        keys = np.stack([rows[position] for position in positions.tolist()])
        recordings[request] = TopkRecording.of_keys(
            index_topk,
            int(positions[-1]) + 1,
            {number: (positions, keys[:, column]) for column, number in enumerate(layers)},
        )
    return recordings


def sglang_request_hash(request_id: str) -> int:
    """What sglang's log calls a request: CRC-32 of its id, and Adler-32 in the upper half."""
    name = request_id.encode()
    return zlib.crc32(name) | zlib.adler32(name) << 32


def _sglang_header(file: BinaryIO, path: str | Path) -> dict[str, Any]:
    if file.read(len(SGLANG_MAGIC)) != SGLANG_MAGIC:
        raise GLM5PatchError(
            f"{path} does not begin with {SGLANG_MAGIC.decode()}: it is no such log"
        )
    (size,) = _unpack(struct.Struct("<I"), file.read(4), path)
    try:
        return json.loads(file.read(size))
    except ValueError as error:
        raise GLM5PatchError(f"{path} is cut off or damaged: {error}") from error


def _unpack(form: struct.Struct, data: bytes, path: str | Path) -> tuple[int, ...]:
    if len(data) != form.size:
        raise GLM5PatchError(f"{path} is cut off")
    return form.unpack(data)


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
    return IndexSchedule.from_megatron(config).of_attention, config.dsa_indexer_topk
