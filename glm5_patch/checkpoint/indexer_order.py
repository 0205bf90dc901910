"""The order of an indexer's dimensions in a checkpoint, and converting one order into the other.

Hugging Face stores the rotary dimensions of ``wq_b``, ``wk`` and ``k_norm`` first. Trainers on
megatron-core 0.16 to 0.18, which rotates the last dimensions, may have moved them to the end when
they converted a checkpoint. Such a checkpoint selects wrong keys on every host that follows Hugging
Face. The tensors of one checkpoint do not show their order. A related checkpoint in Hugging Face's
order shows it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..errors import CheckpointError
from .files import CheckpointFiles
from .staging import Staging, fingerprint

if TYPE_CHECKING:  # a recorded order is found without torch
    from torch import Tensor

    from .reader import HFCheckpoint

ROPE_FIRST, ROPE_LAST = "rope-first", "rope-last"
"""Hugging Face's order, and the order of megatron-core 0.16 to 0.18."""

_INDEXER = re.compile(r"model\.layers\.(\d+)\.self_attn\.indexer\.(.+)$")
_MATRICES = ("wq_b.weight", "wk.weight")
_NORMS = ("k_norm.weight", "k_norm.bias")
_RECORD = "glm5_patch_indexer_order"
"""Key in the metadata of each file that a conversion wrote."""
_ALIKE, _BY = 0.5, 0.1
"""The least cosine of related tensors, and the least distance from that of the other order."""


class Found(NamedTuple):
    """The order of every indexer of a checkpoint."""

    orders: dict[int, str]
    """Layer number -> ROPE_FIRST or ROPE_LAST; the MTP layer follows the last decoder layer."""
    how: str
    """The source: "measured beside DIRECTORY", "given", "recorded by a conversion"."""

    @property
    def order(self) -> str:
        """ROPE_FIRST, ROPE_LAST or "mixed"."""
        orders = set(self.orders.values())
        return orders.pop() if len(orders) == 1 else "mixed"

    def __str__(self) -> str:
        if self.order != "mixed":
            return f"{self.order} on {len(self.orders)} layers ({self.how})"
        parts = (
            f"{order} on layers {', '.join(str(n) for n, o in self.orders.items() if o == order)}"
            for order in (ROPE_FIRST, ROPE_LAST)
        )
        return f"{'; '.join(parts)} ({self.how})"


class Conversion(NamedTuple):
    """What ``convert`` did."""

    layers: tuple[int, ...]
    """Numbers of the layers whose indexers were moved; empty if nothing was written."""
    tensors: int
    """How many tensors were reordered."""


def find_orders(
    checkpoint: CheckpointFiles, relative: HFCheckpoint | None = None, given: str | None = None
) -> Found | None:
    """The order of every indexer of a checkpoint; None if it is unknown.

    Args:
        checkpoint: the checkpoint in question; an ``HFCheckpoint`` if there is a relative.
        relative: a checkpoint of the same origin in Hugging Face's order, such as the published
            model that this one was fine-tuned from. Each layer is compared with it.
        given: the order that the user states.

    Raises:
        CheckpointError: two sources contradict each other, or the relative does not show the order.
    """
    recorded = _recorded(checkpoint)
    if relative is not None:
        found = Found(_orders_beside(checkpoint, relative), f"measured beside {relative.directory}")
    elif given is not None:
        found = Found(dict.fromkeys(_layers(checkpoint), given), "given")
    elif recorded is not None:
        found = Found(dict.fromkeys(_layers(checkpoint), recorded), "recorded by a conversion")
    else:
        return None
    if not found.orders:
        raise CheckpointError(f"{checkpoint.directory}: it has no indexer")
    for other, source in ((given, "given"), (recorded, "recorded in its files by a conversion")):
        if other is not None and found.order != other:
            raise CheckpointError(
                f"{checkpoint.directory}: the indexers are {found}, but {other} is {source}"
            )
    return found


def _layers(checkpoint: CheckpointFiles) -> list[int]:
    """Numbers of the layers that have an indexer."""
    matches = (_INDEXER.match(name) for name in checkpoint.shapes)
    return sorted({int(match[1]) + 1 for match in matches if match})


def _recorded(checkpoint: CheckpointFiles) -> str | None:
    """The order that a conversion wrote into every file that has an indexer's tensors."""
    files = {path for name, path in checkpoint.files.items() if _is_ordered(name)}
    records = {checkpoint.headers[path].metadata.get(_RECORD) for path in files}
    return records.pop() if len(records) == 1 else None


def _orders_beside(checkpoint: HFCheckpoint, relative: HFCheckpoint) -> dict[int, str]:
    where = f"{checkpoint.directory} beside {relative.directory}"
    if checkpoint.directory.resolve() == relative.directory.resolve():
        raise CheckpointError(f"{where}: they are one directory; give another checkpoint")
    if _recorded(relative) == ROPE_LAST:
        raise CheckpointError(f"{where}: a conversion made {relative.directory} {ROPE_LAST}")
    widths = [(c.config.qk_rope_head_dim, c.config.index_head_dim) for c in (checkpoint, relative)]
    if widths[0] != widths[1]:
        raise CheckpointError(
            f"{where}: qk_rope_head_dim and index_head_dim are {widths[0]} and {widths[1]}"
        )
    layers = _layers(checkpoint)
    orders = {}
    for number in layers:
        wk = f"model.layers.{number - 1}.self_attn.indexer.wk.weight"
        if wk in checkpoint.shapes and relative.shapes.get(wk) == checkpoint.shapes[wk]:
            orders[number] = _order_of_layer(number, checkpoint, relative)
    if not orders:
        raise CheckpointError(f"{where}: no layer has an indexer of the same shape in both")
    unknown = [number for number in layers if number not in orders]
    if unknown and len(set(orders.values())) > 1:
        raise CheckpointError(
            f"{where}: the layers have different orders, and {relative.directory} has no indexer "
            f"on layer {unknown[0]} to compare with"
        )
    return {number: orders.get(number) or next(iter(orders.values())) for number in layers}


def _order_of_layer(number: int, checkpoint: HFCheckpoint, relative: HFCheckpoint) -> str:
    """Raises CheckpointError if the tensors of the layer do not agree on one order."""
    votes = {}
    for kind in (*_MATRICES, *_NORMS):
        name = f"model.layers.{number - 1}.self_attn.indexer.{kind}"
        if name not in checkpoint.shapes or relative.shapes.get(name) != checkpoint.shapes[name]:
            continue
        ours, theirs = checkpoint.read(name).float(), relative.read(name).float()
        if kind in _NORMS:  # they are near 1 or 0 everywhere: only the deviations tell
            ours, theirs = ours - ours.mean(), theirs - theirs.mean()
        rope, width = checkpoint.config.qk_rope_head_dim, checkpoint.config.index_head_dim
        likeness = {
            order: _likeness(ours, theirs, order, rope, width) for order in (ROPE_FIRST, ROPE_LAST)
        }
        best = max(likeness, key=likeness.__getitem__)
        other = min(likeness, key=likeness.__getitem__)
        if likeness[best] >= _ALIKE and likeness[best] - likeness[other] >= _BY:
            votes[kind] = best
        elif kind in _MATRICES:
            raise CheckpointError(
                f"{checkpoint.directory} does not resemble {relative.directory}: the cosine of "
                f"{name} is {likeness[ROPE_FIRST]:.2f} if it is {ROPE_FIRST} and "
                f"{likeness[ROPE_LAST]:.2f} if it is {ROPE_LAST}, and one of them must be "
                f"{_ALIKE} or more; give the model that the checkpoint was made from"
            )
    if len(set(votes.values())) > 1:
        listed = ", ".join(f"{kind} is {order}" for kind, order in votes.items())
        raise CheckpointError(
            f"{checkpoint.directory}: the indexer of layer {number} is half converted: {listed}"
        )
    return next(iter(votes.values()))


def _likeness(ours: Tensor, theirs: Tensor, order: str, rope: int, width: int) -> float:
    """The lower of two cosines, that of the rotary dimensions and that of the others.

    Args:
        ours: [heads * width, ...], compared as if it were in ``order``.
        theirs: of the same shape, with the rotary dimensions first.
    """
    import torch

    ours, theirs = (t.unflatten(0, (-1, width)) for t in (ours, theirs))
    parts = [slice(rope), slice(rope, None)]
    own = parts if order == ROPE_FIRST else [slice(width - rope, None), slice(width - rope)]
    cosines = [
        torch.cosine_similarity(ours[:, a].flatten(), theirs[:, b].flatten(), dim=0).item()
        for a, b in zip(own, parts)
    ]
    return min(-1.0 if math.isnan(cosine) else cosine for cosine in cosines)


def _is_ordered(name: str) -> bool:
    match = _INDEXER.match(name)
    return bool(match) and match[2] in (*_MATRICES, *_NORMS)


def reordered(tensor: Tensor, rope: int, width: int, to: str) -> Tensor:
    """Move the rotary dimensions of an indexer's tensor to the other end.

    Args:
        tensor: [heads * width, columns] or [heads * width], in the order that ``to`` is not.
        rope: how many dimensions of a head are rotary.
        width: dimensions of a head.
        to: ROPE_FIRST or ROPE_LAST.
    """
    import torch

    heads = tensor.unflatten(0, (-1, width))
    first = rope if to == ROPE_LAST else width - rope
    return torch.cat([heads[:, first:], heads[:, :first]], dim=1).flatten(0, 1).contiguous()


def convert(
    source: HFCheckpoint,
    output: str | Path,
    to: str,
    found: Found,
    advance: Callable[[str], None] = lambda file: None,
) -> Conversion:
    """Write a checkpoint with all indexers in one order. One file at a time is in memory.

    Nothing is written if they have it already. The output appears under its name when it is
    complete. An interrupted conversion is continued by the same call.

    Args:
        source: the checkpoint; the indexers of MTP layers and of skip layers are converted too.
        output: a directory that does not exist, or is empty.
        to: ROPE_FIRST or ROPE_LAST.
        found: the present order, by ``find_orders``. Only layers in the other order are changed.
        advance: called with the name of each finished file.

    Raises:
        CheckpointError: ``output`` has files in it, an interrupted conversion was a different one,
            or a file can't be written.
    """
    layers = tuple(number for number, order in found.orders.items() if order != to)
    if not layers:
        return Conversion((), 0)
    if source.scales:
        raise CheckpointError(
            f"{source.directory}: float8; run `glm5-patch checkpoint dequantize` on it first"
        )
    names = {
        name
        for name in source.shapes
        if _is_ordered(name) and int(_INDEXER.match(name)[1]) + 1 in layers
    }
    own = source.own_files()
    manifest = {
        "convert": str(source.directory.resolve()),
        "to": to,
        "layers": list(layers),
        "files": fingerprint(own),
    }
    needed = sum(path.stat().st_size for path in own)
    staging = Staging(output, manifest, needed, source.directory)
    if staging.complete:
        return Conversion(layers, len(names))
    for path in own:
        name = str(path.relative_to(source.directory))
        if not staging.has(name):
            _write(source, path, staging, name, names, to)
        if path in source.headers:
            advance(path.name)
    staging.publish({str(path.relative_to(source.directory)) for path in own})
    return Conversion(layers, len(names))


def _write(
    source: HFCheckpoint, path: Path, staging: Staging, name: str, names: set[str], to: str
) -> None:
    from .writer import write_tensors

    config = source.config
    if not any(source.files[tensor] == path for tensor in source.files if _is_ordered(tensor)):
        staging.copy(path, name)
        return
    metadata = {**source.headers[path].metadata, _RECORD: to}
    tensors = source.read_file(path)
    for tensor in names.intersection(tensors):
        tensors[tensor] = reordered(
            tensors[tensor], config.qk_rope_head_dim, config.index_head_dim, to
        )
    with staging.file(name) as target:
        write_tensors(tensors, target, metadata)
