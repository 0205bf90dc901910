"""Reading a Hugging Face checkpoint of a GLM-5: checked, then loaded into a Megatron model.

A checkpoint of a model with index sharing has indexer tensors on its computing layers only.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from ..config.json_file import unreadable
from ..config.schedule import IndexSchedule
from ..errors import CheckpointError
from .dequantize import dequantized
from .files import CheckpointFiles
from .headers import Stored
from .names import mtp_layers_of, parts
from .quantization import is_scale
from .survey import CheckpointReport

_THREADS = 8
_BLOCK_BYTES = 16 << 20
"""What a thread reads at once."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": getattr(torch, "float8_e8m0fnu", None),
}
"""By the names that safetensors uses."""


class _Read(NamedTuple):
    """Rows of one tensor of the checkpoint, and where they go."""

    source: str
    slices: tuple[slice, ...]
    target: Tensor


class HFCheckpoint(CheckpointFiles):
    """A checkpoint with readable tensors. Only headers are read before the first tensor."""

    def read(self, name: str, slices: tuple[slice, ...] = ()) -> Tensor:
        """One tensor, or a part of it, on the CPU in the dtype of the file. float8 becomes bf16.

        Args:
            name: Hugging Face's.
            slices: one for each dimension; none for the whole.
        """
        shape = self.shapes[name]
        slices = slices or self._whole(name)
        slices = tuple(slice(*part.indices(size)[:2]) for part, size in zip(slices, shape))
        with _Files() as files:
            return self._read(files, name, slices).contiguous()

    def read_file(self, path: Path) -> dict[str, Tensor]:
        """Every tensor of one of its files, as it is stored; float8 as bf16, without the scales."""
        with _Files() as files:
            return {
                name: self._read(files, name, self._whole(name))
                if name in self.scales
                else files.read(stored)
                for name, stored in self.headers[path].tensors.items()
                if not is_scale(name)
            }

    def load_into(
        self,
        model: torch.nn.Module | Sequence[torch.nn.Module],
        advance: Callable[[str], None] = lambda file: None,
        only: Callable[[str], bool] = lambda parameter: True,
    ) -> CheckpointReport:
        """Load this rank's part of the tensors into every parameter and buffer.

        Each rank reads for itself: its pipeline stage, its experts, its slice of what tensor
        parallelism splits.

        Args:
            model: this rank's, as built or wrapped (``DistributedDataParallel``,
                ``Float16Module``), or the list of its virtual pipeline chunks.
            advance: called for each file when its tensors have been read, with its name and the
                rate so far.
            only: which parameters and buffers, by name; the others stay as they are.

        Raises:
            CheckpointError: a parameter of the model has no tensor, or one of another shape.
        """
        chunks = chunks_of(model)
        report = self.report_for(max(mtp_layers_of(chunk.config) for chunk in chunks))
        with torch.no_grad():
            for chunk in chunks:
                _keep_expert_bias_in_fp32(chunk)
            reads = [read for chunk in chunks for read in self._reads(chunk, only)]
        self._load(reads, advance)
        return report

    def _load(self, reads: list[_Read], advance: Callable[[str], None]) -> None:
        """Read blocks in the order in which they lie in the files, several at a time."""

        def place(read: _Read) -> tuple[Path, int]:
            stored = self.tensors[read.source]
            return stored.path, stored.begin

        with torch.no_grad():
            blocks = [block for read in sorted(reads, key=place) for block in self._blocks(read)]
        start, done = time.perf_counter(), 0
        with _Files() as files, ThreadPoolExecutor(_THREADS) as pool:

            def load(block: _Read) -> int:
                with torch.no_grad():
                    self._load_block(files, block)
                return block.target.numel() * block.target.element_size()

            waiting = [pool.submit(load, block) for block in blocks]
            try:
                for number, (block, future) in enumerate(zip(blocks, waiting), 1):
                    done += future.result()
                    path = self.tensors[block.source].path
                    if number == len(blocks) or path != self.tensors[blocks[number].source].path:
                        rate = done / (time.perf_counter() - start) / 1e9
                        advance(f"{path.name}, {rate:.2f} GB/s")
            finally:
                for future in waiting:
                    future.cancel()

    def _load_block(self, files: _Files, block: _Read) -> None:
        stored, target = self.tensors[block.source], block.target.detach()
        as_stored = target.dtype == DTYPES[stored.dtype] and target.shape[1:] == stored.shape[1:]
        if as_stored and target.is_contiguous() and target.device.type == "cpu":
            files.read(stored, block.slices[0], target)  # without a copy on the way
        else:
            target.copy_(self._read(files, block.source, block.slices))

    def _blocks(self, read: _Read) -> Iterator[_Read]:
        """Parts of at most ``_BLOCK_BYTES``, or one row."""
        stored, (rows, *others) = self.tensors[read.source], read.slices
        step = max(1, _BLOCK_BYTES // max(1, stored.nbytes // max(1, stored.shape[0])))
        for first in range(rows.start, rows.stop, step):
            own = slice(first, min(first + step, rows.stop))
            target = read.target[own.start - rows.start : own.stop - rows.start]
            yield _Read(read.source, (own, *others), target)

    def _reads(self, model: torch.nn.Module, only: Callable[[str], bool]) -> Iterator[_Read]:
        for part in parts(model, self.shapes):
            if not only(part.parameter):
                continue
            present = part.slices[0].stop - part.slices[0].start
            part.tensor[present:] = 0  # a padded vocabulary
            yield _Read(part.source, part.slices, part.tensor[:present])

    def _whole(self, name: str) -> tuple[slice, ...]:
        return tuple(slice(0, size) for size in self.shapes[name])

    def _read(self, files: _Files, name: str, slices: tuple[slice, ...]) -> Tensor:
        rows, *others = slices
        tensor = files.read(self.tensors[name], rows)[(slice(None), *others)]
        scale = self.scales.get(name)
        if scale is None:
            return tensor
        return dequantized(tensor, files.read(scale), self.block, slices)


class _Files:
    """Files that several threads read at any place. They are not mapped: a mapped file that gets
    shorter kills the process, and its pages count as memory of the process."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._closing = ExitStack()
        self._lock = Lock()

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def read(
        self, stored: Stored, rows: slice | None = None, target: Tensor | None = None
    ) -> Tensor:
        """A tensor as it is stored, or some of its rows.

        Args:
            stored: the tensor.
            rows: None for all.
            target: contiguous, on the CPU, of the dtype and shape of what is read; None for a new
                one.

        Raises:
            CheckpointError: the file can't be read, or it is shorter than its header says.
        """
        count, *others = stored.shape
        rows = rows or slice(0, count)
        row_bytes = stored.nbytes // max(1, count)
        shape = (rows.stop - rows.start, *others)
        if target is None:
            target = torch.empty(shape, dtype=DTYPES[stored.dtype])
        content = target.view(-1).view(torch.uint8)
        into, place = memoryview(content.numpy()), stored.begin + rows.start * row_bytes
        try:
            descriptor = self._descriptor(stored.path)
            while into:
                got = os.preadv(descriptor, [into], place)
                if not got:
                    raise CheckpointError(
                        f"{stored.path}: damaged or truncated: it ends in {stored.name}"
                    )
                into, place = into[got:], place + got
        except OSError as error:
            raise unreadable(stored.path, error) from None
        return target

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._open:
                self._open[path] = os.open(path, os.O_RDONLY)
                self._closing.callback(os.close, self._open[path])
            return self._open[path]


def chunks_of(model: torch.nn.Module | Sequence[torch.nn.Module]) -> list[torch.nn.Module]:
    """The models of a rank, without wrappers: one, or its virtual pipeline chunks."""
    several = isinstance(model, (Sequence, torch.nn.ModuleList))
    return [_unwrapped(chunk) for chunk in (model if several else [model])]


def _unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside wrappers such as ``DistributedDataParallel`` and ``Float16Module``; of a
    ``HybridModel`` its parameters by a ``GPTModel``'s names."""
    while not hasattr(model, "decoder") and isinstance(
        getattr(model, "module", None), torch.nn.Module
    ):
        model = model.module
    return _as_gpt(model) if hasattr(model, "hybrid_layer_pattern") else model


def _keep_expert_bias_in_fp32(model: torch.nn.Module) -> None:
    """``Float16Module`` rounds the buffer; megatron-core makes it fp32 again at the next forward,
    which is too late for what is copied into it now."""
    for module in model.modules():
        bias = getattr(module, "expert_bias", None)
        if isinstance(bias, Tensor) and bias.dtype != torch.float32:
            bias.data = bias.data.float()


def _as_gpt(model: torch.nn.Module) -> torch.nn.Module:
    """The parameters of a ``HybridModel`` by a ``GPTModel``'s names and layer numbers. The modules
    are the model's own; what is returned has no forward.

    Args:
        model: this rank's, without wrappers.
    """
    schedule = IndexSchedule.from_megatron(model.config)
    view = torch.nn.Module()
    view.config = copy.copy(model.config)
    view.config.num_layers = schedule.attention_number(schedule.num_layers)
    view.share_embeddings_and_output_weights = model.share_embeddings_and_output_weights
    view.decoder = torch.nn.Module()
    view.decoder.layers = _whole_layers(model.decoder, schedule.attention_number)
    if hasattr(model.decoder, "final_norm"):
        view.decoder.final_layernorm = model.decoder.final_norm
    for name in ("embedding", "output_layer"):
        if hasattr(model, name):
            setattr(view, name, getattr(model, name))
    if hasattr(model, "mtp"):
        view.mtp = torch.nn.Module()
        view.mtp.layers = torch.nn.ModuleList(map(_mtp_layer, model.mtp.layers))
    return view


def _whole_layers(stack, number) -> torch.nn.ModuleList:
    """Attention and MLP of each decoder layer in one module."""
    layers: dict[int, torch.nn.Module] = {}
    for part in stack.layers:
        layer = layers.setdefault(number(part.layer_number), torch.nn.Module())
        layer.layer_number = number(part.layer_number)
        for name, module in part.named_children():
            if any(True for _ in module.parameters()):
                setattr(layer, name, module)
    return torch.nn.ModuleList(layers.values())


def _mtp_layer(depth) -> torch.nn.Module:
    view = torch.nn.Module()
    for name, module in depth.named_children():
        setattr(view, name, module)
    (view.mtp_model_layer,) = _whole_layers(depth.mtp_model_layer, lambda _: 1)
    return view
