"""Writing a Megatron model, whole or split between ranks, as a Hugging Face directory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config.huggingface import HFConfig
from ..errors import CheckpointError
from .files import INDEX, SINGLE
from .names import MTP_COPIES, Part, expected_tensors, mtp_layers_of, parts, split_group
from .quantization import SETTINGS
from .reader import DTYPES, HFCheckpoint, chunks_of
from .staging import Ranks, StagedFiles, Staging

MAX_SHARD_BYTES = 5 << 30

_NOT_SAVED = ("torch_dtype", *SETTINGS)
"""Fields of the source's config.json that do not hold for the output."""

_WRITTEN = {DTYPES[name]: name for name in ("F64", "F32", "F16", "BF16")}


class Entry(NamedTuple):
    """A tensor that is to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def save(
    model: torch.nn.Module | Sequence[torch.nn.Module],
    config: HFConfig,
    output: str | Path,
    source: HFCheckpoint | None = None,
) -> None:
    """Write a model as a Hugging Face directory, from any split.

    With torch.distributed every rank of the world makes this call. Each rank writes files of its
    own and has one whole tensor at a time in memory: what tensor parallelism splits is gathered
    tensor by tensor. The output gets its name when every rank has finished. A save that fails
    leaves nothing. One that is killed leaves a hidden directory, which the next save to the same
    place removes.

    Args:
        model: this rank's, as built or wrapped, or the list of its virtual pipeline chunks.
        config: written as config.json, with the dtype of the weights.
        output: a directory that does not exist, or is empty; on a file system that all ranks share.
        source: the checkpoint that the model came from; its other files, and the MTP tensors that
            the model does not hold, are carried over. Copies of the embedding and of the head in
            an MTP layer are the model's.

    Raises:
        CheckpointError: on every rank: ``output`` has files in it or can't be written, or no rank
            holds a tensor of the model.
    """
    ranks = Ranks()
    origin = source and source.directory
    held = ranks.together(lambda: _held(model, config, source))
    offers = ranks.shared(lambda: {n: _Offer.of(p, ranks.rank) for n, p in held.items()})
    plan = ranks.together(lambda: _Plan(offers, model, config, source))
    manifest = {"save": str(Path(output).absolute())}
    staging = ranks.first(lambda: Staging(output, manifest, plan.nbytes, origin, anew=True))
    try:
        staged = staging or StagedFiles(output)
        ranks.together(lambda: _check_shared(staged))
        ranks.together(lambda: _write_own(plan, held, source, staged, ranks.rank))
        ranks.first(lambda: _finish(plan, config, source, staging))
    except BaseException:
        if staging is not None:
            staging.discard()
        raise


class _Offer(NamedTuple):
    """What a rank has of a tensor."""

    dtype: torch.dtype
    holders: tuple[int, ...]
    """The ranks that share it out, this one among them; this one alone if it has the whole."""

    @classmethod
    def of(cls, part: Part, rank: int) -> _Offer:
        group = split_group(part.parameter)
        whole = part.tensor.shape[1:] == part.whole[1:] and part.tensor.shape[0] >= part.whole[0]
        holders = (rank,) if whole else tuple(torch.distributed.get_process_group_ranks(group))
        return cls(part.tensor.dtype, holders)


class _Task(NamedTuple):
    """One tensor: which ranks have it, and which of them writes it."""

    entry: Entry
    holders: tuple[int, ...]
    """() of a tensor that the writer reads from the source."""
    writer: int


class _Plan:
    """Who writes what. Every rank makes the same plan."""

    def __init__(
        self,
        offers: Sequence[Mapping[str, _Offer]],
        model: Any,
        config: HFConfig,
        source: HFCheckpoint | None,
    ):
        expected = _expected(model, config)
        names = dict(expected)
        names.update({name: source.shapes[name] for name in _carried(source)})
        candidates: dict[str, list[_Offer]] = {}
        for offer in offers:
            for name, one in offer.items():
                candidates.setdefault(name, []).append(one)
        absent = [name for name in expected if name not in candidates]
        if absent:
            more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
            raise CheckpointError(
                f"no rank holds {absent[0]}{more}; every rank of the world must save, with all "
                "chunks of its model"
            )
        entries = []
        for name, shape in names.items():
            dtype = candidates[name][0].dtype if name in candidates else _stored(source, name)
            entries.append(Entry(name, dtype, shape))
        entries.sort(key=_width)
        loads = [0] * len(offers)
        self.tasks: list[_Task] = []
        for entry in entries:
            groups = sorted({one.holders for one in candidates.get(entry.name, ())})
            able = {rank for group in groups for rank in group} or range(len(loads))
            writer = min(able, key=lambda rank: (loads[rank], rank))
            loads[writer] += entry.nbytes
            holders = next((group for group in groups if writer in group), ())
            self.tasks.append(_Task(entry, holders, writer))
        self.nbytes = sum(loads)
        self.files = shards(
            [[t.entry for t in self.tasks if t.writer == rank] for rank in range(len(loads))]
        )
        """Of each rank: the names of its files, and what is in them."""


def _expected(model: Any, config: HFConfig) -> dict[str, tuple[int, ...]]:
    return expected_tensors(config, mtp_layers_of(chunks_of(model)[0].config))


def _carried(source: HFCheckpoint | None) -> tuple[str, ...]:
    """The tensors of the source's MTP layers."""
    return source.report.mtp if source is not None else ()


def _stored(source: HFCheckpoint, name: str) -> torch.dtype:
    if name in source.scales:
        return torch.bfloat16
    return DTYPES[source.tensors[name].dtype]


def _held(model: Any, config: HFConfig, source: HFCheckpoint | None) -> dict[str, Part]:
    """What this rank has of each tensor, by Hugging Face's name.

    What repeats the embedding or the head in an MTP layer of the source is the model's own, or
    training would leave it behind.
    """
    expected = _expected(model, config)
    held = {p.source: p for chunk in chunks_of(model) for p in parts(chunk, expected)}
    for name in _carried(source):
        for suffix, original in MTP_COPIES.items():
            original = original if original in expected else "model.embed_tokens.weight"
            if name.endswith(suffix) and original in held:
                held[name] = held[original]
    return held


def _check_shared(staged: StagedFiles) -> None:
    if not staged.partial.is_dir():
        raise CheckpointError(
            f"{staged.partial}: rank 0 made it, and it is not there; the output must be on a file "
            "system that all ranks share"
        )


def _write_own(
    plan: _Plan,
    held: Mapping[str, Part],
    source: HFCheckpoint | None,
    staged: StagedFiles,
    rank: int,
) -> None:
    tensors = _collected(plan, held, source, rank)
    try:
        write_shards(plan.files[rank], tensors, staged)
    except Exception:
        for _ in tensors:  # the others wait for what this rank has
            pass
        raise


@torch.no_grad()
def _collected(
    plan: _Plan, held: Mapping[str, Part], source: HFCheckpoint | None, rank: int
) -> Iterator[Tensor]:
    """The tensors that this rank writes, whole, in the order of the plan."""
    failed: CheckpointError | None = None
    for entry, holders, writer in plan.tasks:
        if len(holders) > 1 and rank in holders:
            tensor = _gathered(entry, held[entry.name], holders, writer, rank)
        if rank != writer or failed:
            continue
        if not holders:
            try:
                tensor = source.read(entry.name)
            except CheckpointError as error:
                failed = error
                continue
        elif len(holders) == 1:
            tensor = held[entry.name].tensor.detach()[: entry.shape[0]]
        yield tensor
    if failed:
        raise failed


def _gathered(
    entry: Entry, part: Part, holders: tuple[int, ...], writer: int, rank: int
) -> Tensor | None:
    """The whole of a tensor that tensor parallelism splits, on the rank that writes it."""
    own = part.tensor.detach().contiguous()
    everyone = [torch.empty_like(own) for _ in holders] if rank == writer else None
    torch.distributed.gather(own, everyone, dst=writer, group=split_group(part.parameter))
    if everyone is None:
        return None
    split = next((d for d, size in enumerate(entry.shape) if own.shape[d] != size), 0)
    return torch.cat(everyone, split)[: entry.shape[0]]  # a padded vocabulary is cut


def _finish(plan: _Plan, config: HFConfig, source: HFCheckpoint | None, staging: Staging) -> None:
    """Write what the ranks do not, and give the output its name."""
    extra = list(source.extra_files()) if source is not None else []
    for path in extra:
        staging.copy(path, path.name)
    dtype = next(task.entry.dtype for task in plan.tasks if task.entry.name == "model.norm.weight")
    raw = {key: value for key, value in config.raw.items() if key not in _NOT_SAVED}
    raw["dtype"] = str(dtype).removeprefix("torch.")
    with staging.file("config.json") as target:
        target.write_text(json.dumps(raw, indent=2) + "\n")
    weights = write_index({f: e for own in plan.files for f, e in own.items()}, staging)
    staging.publish({"config.json", *weights, *(path.name for path in extra)})


def shards(entries: Sequence[Sequence[Entry]]) -> list[dict[str, list[Entry]]]:
    """Cut what each rank writes into files of at most ``MAX_SHARD_BYTES``.

    Args:
        entries: of each rank, in the order in which they are written.

    Returns:
        Of each rank: file names, numbered over all ranks, and their tensors.
    """
    cut: list[list[list[Entry]]] = []
    for own in entries:
        files: list[list[Entry]] = []
        size = 0
        for entry in own:
            if not files or size + entry.nbytes > MAX_SHARD_BYTES:
                files.append([])
                size = 0
            files[-1].append(entry)
            size += entry.nbytes
        cut.append(files)
    total = sum(map(len, cut))
    names = iter(
        [SINGLE]
        if total == 1
        else [f"model-{n:05d}-of-{total:05d}.safetensors" for n in range(1, total + 1)]
    )
    return [{next(names): entries for entries in files} for files in cut]


def write_shards(
    files: Mapping[str, Sequence[Entry]], tensors: Iterator[Tensor], staged: StagedFiles
) -> None:
    """Write files of weights, one tensor after the other.

    Args:
        files: as ``shards`` gives them.
        tensors: on any device, in the order of the entries; taken to the last one.
        staged: where.
    """
    for file, entries in files.items():
        with staged.file(file) as target:
            _write_file(target, entries, tensors, {"format": "pt"})
    for tensor in tensors:
        raise AssertionError(f"{tuple(tensor.shape)} is in no file")


def _write_file(
    path: Path,
    entries: Iterable[Entry],
    tensors: Iterator[Tensor],
    metadata: Mapping[str, str],
) -> None:
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.nbytes
        header[entry.name] = {
            "dtype": _WRITTEN[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            tensor = next(tensors).detach().cpu().contiguous()
            if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
                raise CheckpointError(
                    f"{entry.name} is {tensor.dtype} {list(tensor.shape)} on one rank and "
                    f"{entry.dtype} {list(entry.shape)} by the others"
                )
            file.write(memoryview(tensor.flatten().view(torch.uint8).numpy()))


def write_index(files: Mapping[str, Sequence[Entry]], staging: StagedFiles) -> list[str]:
    """Write the index of several files; the names of all, the index's among them."""
    if list(files) == [SINGLE]:
        return [SINGLE]
    weight_map = {entry.name: file for file, entries in files.items() for entry in entries}
    total = sum(entry.nbytes for entries in files.values() for entry in entries)
    write_weight_map(weight_map, total, staging)
    return [*files, INDEX]


def write_weight_map(weight_map: dict[str, str], total_size: int, staging: StagedFiles) -> None:
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    with staging.file(INDEX) as target:
        target.write_text(json.dumps(index, indent=2) + "\n")


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write one safetensors file. The same tensors give the same bytes, which safetensors' own
    writer does not promise: it writes metadata in any order."""
    entries = [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    entries.sort(key=_width)
    _write_file(path, entries, (tensors[entry.name] for entry in entries), metadata)


def _width(entry: Entry) -> int:
    """The widest first: then each tensor of a file is aligned, as safetensors wants it."""
    return -entry.dtype.itemsize
