"""Writing a Megatron model as a Hugging Face directory."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..config.huggingface import HFConfig
from ..errors import CheckpointError
from .files import INDEX, SINGLE
from .names import expected_tensors, pieces
from .reader import HFCheckpoint

MAX_SHARD_BYTES = 5 << 30


def free_directory(output: str | Path) -> Path:
    """Where something may be written; raises CheckpointError if something is there."""
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output}: exists and is not an empty directory")
    return output


def save(
    model: torch.nn.Module,
    config: HFConfig,
    output: str | Path,
    source: HFCheckpoint | None = None,
) -> None:
    """Write a whole, unsplit model as a Hugging Face directory; it appears complete or not at all.

    Args:
        model: the Megatron model.
        config: written as config.json, with the dtype of the weights.
        output: a directory that does not exist, or is empty.
        source: the checkpoint that the model came from; its other files, and the MTP tensors that
            the model does not hold, are carried over.

    Raises:
        CheckpointError: ``output`` has files in it, or the model is split between ranks.
    """
    output = free_directory(output)
    expected = expected_tensors(config, model.config.mtp_num_layers or 0)
    tensors = dict(_unpacked(model, expected))
    absent = expected.keys() - tensors.keys()
    if absent:
        raise CheckpointError(
            f"{output}: this rank does not hold {sorted(absent)[0]} (and {len(absent) - 1} more); "
            "only a whole model can be written here"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
    try:
        if source is not None:
            carried = [name for name in source.report.mtp if name not in tensors]
            tensors.update({name: source.read(name) for name in carried})
            for path in source.extra_files():
                shutil.copy2(path, partial / path.name)
        dtype = str(tensors["model.norm.weight"].dtype).removeprefix("torch.")
        raw = {**config.raw, "dtype": dtype}
        raw.pop("torch_dtype", None)
        (partial / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        write_shards(tensors, partial)
        partial.chmod(0o755)
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_shards(tensors: dict[str, Tensor], directory: Path) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > MAX_SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], directory / SINGLE, metadata={"format": "pt"})
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _unpacked(model, expected) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face names and tensors of everything that this rank holds."""
    for name, tensor, sources in pieces(model):
        parts = tensor.detach().cpu().split([expected[source][0] for source in sources])
        for source, part in zip(sources, parts):
            if tuple(part.shape) != expected[source]:
                raise CheckpointError(
                    f"{name} holds {list(part.shape)} of {source} {list(expected[source])}; "
                    "only unsplit parameters can be written here"
                )
            yield source, part.contiguous()
