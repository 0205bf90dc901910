"""Writing a Megatron model as a Hugging Face directory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..config.huggingface import HFConfig
from ..errors import CheckpointError
from .files import INDEX, SINGLE
from .names import MTP_COPIES, PADDED, expected_tensors, pieces
from .quantization import SETTINGS
from .reader import HFCheckpoint, unwrapped
from .staging import Staging, free_directory

MAX_SHARD_BYTES = 5 << 30


def save(
    model: torch.nn.Module,
    config: HFConfig,
    output: str | Path,
    source: HFCheckpoint | None = None,
) -> None:
    """Write a whole, unsplit model as a Hugging Face directory. No partial directory is left.

    Args:
        model: the Megatron model.
        config: written as config.json, with the dtype of the weights.
        output: a directory that does not exist, or is empty.
        source: the checkpoint that the model came from; its other files, and the MTP tensors that
            the model does not hold, are carried over. Copies of the embedding and of the head in
            an MTP layer are the model's.

    Raises:
        CheckpointError: ``output`` has files in it or can't be written, or the model is split
            between ranks.
    """
    output = free_directory(output)
    model = unwrapped(model)
    expected = expected_tensors(config, model.config.mtp_num_layers or 0)
    tensors = dict(_unpacked(model, expected))
    absent = expected.keys() - tensors.keys()
    if absent:
        raise CheckpointError(
            f"{output}: this rank does not hold {sorted(absent)[0]} (and {len(absent) - 1} more); "
            "only a whole model can be written here"
        )
    extra = list(source.extra_files()) if source is not None else []
    if source is not None:
        carried = [name for name in source.report.mtp if name not in tensors]
        tensors.update({name: _copy_of(name, tensors, source) for name in carried})
    needed = sum(tensor.nbytes for tensor in tensors.values())
    staging = Staging(output, {"save": str(output)}, needed, anew=True)
    try:
        for path in extra:
            staging.copy(path, path.name)
        raw = {key: value for key, value in config.raw.items() if key not in _NOT_SAVED}
        raw["dtype"] = str(tensors["model.norm.weight"].dtype).removeprefix("torch.")
        with staging.file("config.json") as target:
            target.write_text(json.dumps(raw, indent=2) + "\n")
        weights = write_shards(tensors, staging)
        staging.publish({"config.json", *weights, *(path.name for path in extra)})
    except BaseException:
        staging.discard()
        raise


_NOT_SAVED = ("torch_dtype", *SETTINGS)
"""Fields of the source's config.json that do not hold for the output."""


def _copy_of(name: str, tensors: dict[str, Tensor], source: HFCheckpoint) -> Tensor:
    """A tensor of the source's MTP layer; where it repeats the embedding or the head, the model's
    own, or training would leave it behind."""
    for suffix, original in MTP_COPIES.items():
        if name.endswith(suffix):
            head = original if original in tensors else "model.embed_tokens.weight"
            return tensors[head].clone()
    return source.read(name)


def write_shards(tensors: dict[str, Tensor], staging: Staging) -> list[str]:
    """Write files of at most ``MAX_SHARD_BYTES``, and the index of several; their names."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > MAX_SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = SINGLE if len(shards) == 1 else file
        with staging.file(file) as target:
            write_tensors(shard, target, {"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    if len(shards) == 1:
        return [SINGLE]
    write_index(weight_map, sum(tensor.nbytes for tensor in tensors.values()), staging)
    return [INDEX, *weight_map.values()]


def write_index(weight_map: dict[str, str], total_size: int, staging: Staging) -> None:
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    with staging.file(INDEX) as target:
        target.write_text(json.dumps(index, indent=2) + "\n")


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write one safetensors file. A disk error raises OSError."""
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from None


def _unpacked(model, expected) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face names and tensors of everything that this rank holds."""
    for name, tensor, sources in pieces(model):
        tensor = tensor.detach().cpu()
        if len(sources) == 1 and name in PADDED:
            tensor = tensor[: expected[sources[0]][0]]
        parts = tensor.split([expected[source][0] for source in sources])
        for source, part in zip(sources, parts):
            if tuple(part.shape) != expected[source]:
                raise CheckpointError(
                    f"{name} holds {list(part.shape)} of {source} {list(expected[source])}; "
                    "only unsplit parameters can be written here"
                )
            yield source, part.contiguous()
