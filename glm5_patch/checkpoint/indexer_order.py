"""The order of an indexer's dimensions in a checkpoint, and converting one order into the other.

Hugging Face has the rotary dimensions first in ``wq_b``, ``wk`` and ``k_norm``. Trainers on
megatron-core 0.16 to 0.18, which rotates the last dimensions, may have moved them to the end at
conversion, and such a checkpoint selects other keys on every host that is right. The two can't be
told apart by one checkpoint alone, but by a relative of it whose order is known.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..config.huggingface import HFConfig
from ..errors import CheckpointError
from ..tools.report import progress
from .reader import HFCheckpoint
from .writer import free_directory

ROPE_FIRST, ROPE_LAST = "rope-first", "rope-last"
"""Hugging Face's order, and that of megatron-core 0.16 to 0.18."""

_ORDERED = re.compile(r"\.self_attn\.indexer\.(wq_b\.weight|wk\.weight|k_norm\.(weight|bias))$")
_MANIFEST = "conversion.json"
_ALIKE, _BY = 0.5, 0.1
"""How similar relatives are at least (cosine), and by how much more in one order than the other."""


def order_beside(checkpoint: HFCheckpoint, relative: HFCheckpoint) -> str:
    """ROPE_FIRST or ROPE_LAST: the order of ``checkpoint``, if ``relative`` has the rope first.

    Args:
        checkpoint: in question.
        relative: of the same shape and origin, in Hugging Face's order: the published model, or the
            one that was fine-tuned.

    Raises:
        CheckpointError: they share no indexer tensor, or resemble each other in neither order.
    """
    names = [n for n in checkpoint.shapes if n.endswith("indexer.wk.weight")]
    names = [n for n in names if relative.shapes.get(n) == checkpoint.shapes[n]]
    if not names:
        raise CheckpointError(
            f"{checkpoint.directory} and {relative.directory} have no indexer of the same shape"
        )
    kept, moved = 0.0, 0.0
    for name in names:
        ours, theirs = checkpoint.read(name).float(), relative.read(name).float()
        turned = reordered(name, ours, checkpoint.config, ROPE_FIRST)
        kept += _similarity(ours, theirs) / len(names)
        moved += _similarity(turned, theirs) / len(names)
    if max(kept, moved) < _ALIKE or abs(kept - moved) < _BY:
        raise CheckpointError(
            f"{checkpoint.directory} does not resemble {relative.directory}: cosine {kept:.2f} as "
            f"it is, {moved:.2f} with the rotary dimensions moved; give the model that it came from"
        )
    return ROPE_FIRST if kept > moved else ROPE_LAST


def _similarity(a: Tensor, b: Tensor) -> float:
    return torch.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


def reordered(name: str, tensor: Tensor, config: HFConfig, to: str) -> Tensor:
    """A tensor of an indexer with its rotary dimensions moved; others as they are.

    Args:
        name: Hugging Face's name of it.
        tensor: [rows, columns] or [rows]; the rows are dimensions, or heads of them.
        config: which has the widths.
        to: ROPE_FIRST or ROPE_LAST; the tensor is taken to be in the other order.
    """
    if not _ORDERED.search(name):
        return tensor
    rope, width = config.qk_rope_head_dim, config.index_head_dim
    heads = tensor.unflatten(0, (-1, width))
    first = rope if to == ROPE_LAST else width - rope
    return torch.cat([heads[:, first:], heads[:, :first]], dim=1).flatten(0, 1).contiguous()


def convert(source: HFCheckpoint, output: str | Path, to: str) -> int:
    """Write a checkpoint with its indexers in the other order, one file in memory at a time.

    What was written by an interrupted conversion of the same kind is kept and not done again; the
    directory appears under its name when all is there.

    Args:
        source: the checkpoint, MTP layer included.
        output: a directory that does not exist, or is empty.
        to: ROPE_FIRST or ROPE_LAST.

    Returns:
        How many tensors were reordered.

    Raises:
        CheckpointError: ``output`` has files in it, or an interrupted conversion was another one.
    """
    output = free_directory(output)
    partial = output.with_name(f".{output.name}.partial")
    _resume(partial, {"source": str(source.directory.resolve()), "to": to})
    moved = sum(bool(_ORDERED.search(name)) for name in source.shapes)
    files = sorted(source.directory.glob("*.safetensors"))
    with progress("converting", len(files)) as advance:
        for path in files:
            target = partial / path.name
            if not target.exists():
                with safe_open(path, framework="pt") as file:
                    metadata = file.metadata()
                    tensors = {
                        name: reordered(name, file.get_tensor(name), source.config, to)
                        for name in file.keys()
                    }
                unfinished = target.with_suffix(".unfinished")
                save_file(tensors, unfinished, metadata=metadata)
                unfinished.rename(target)
            advance(path.name)
    for path in source.directory.iterdir():
        if path.is_file() and path not in files:
            shutil.copy2(path, partial / path.name)
    (partial / _MANIFEST).unlink()
    partial.rename(output)
    return moved


def _resume(partial: Path, manifest: dict[str, str]) -> None:
    path = partial / _MANIFEST
    if partial.exists() and (not path.exists() or json.loads(path.read_text()) != manifest):
        raise CheckpointError(f"{partial}: left by another conversion; remove it and try again")
    partial.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(manifest))
