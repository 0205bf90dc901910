"""Reading a Hugging Face checkpoint of a GLM-5: checked, then loaded into a Megatron model.

A checkpoint of a model with index sharing has indexer tensors on its computing layers only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from .dequantize import dequantized
from .files import CheckpointFiles
from .headers import Stored
from .names import mtp_layers_of, parts
from .quantization import is_scale
from .survey import CheckpointReport

_THREADS = 4
_MAPPED_BYTES = 128 << 20
"""Bytes after which a file is reopened: its mapped pages count as memory of the process."""


class _Read(NamedTuple):
    """One part of one tensor of the checkpoint, and where it goes."""

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
        with self.open(self.tensors[name].path) as file:
            return self._read(file, name, slices).clone()

    def read_file(self, path: Path) -> dict[str, Tensor]:
        """Every tensor of one of its files, as it is stored; float8 as bf16, without the scales."""
        with self.open(path) as file:
            return {
                name: self._read(file, name, self._whole(name))
                if name in self.scales
                else file.get_tensor(name)
                for name in self.headers[path].tensors
                if not is_scale(name)
            }

    def load_into(
        self,
        model: torch.nn.Module | Sequence[torch.nn.Module],
        advance: Callable[[str], None] = lambda file: None,
    ) -> CheckpointReport:
        """Load this rank's part of the tensors into every parameter and buffer.

        Each rank reads for itself: its pipeline stage, its experts, its slice of what tensor
        parallelism splits.

        Args:
            model: this rank's, as built or wrapped (``DistributedDataParallel``,
                ``Float16Module``), or the list of its virtual pipeline chunks.
            advance: called with the name of each file when its tensors have been read.

        Raises:
            CheckpointError: a parameter of the model has no tensor, or one of another shape.
        """
        chunks = chunks_of(model)
        report = self.report_for(max(mtp_layers_of(chunk.config) for chunk in chunks))
        by_file: dict[Path, list[_Read]] = {}
        with torch.no_grad():
            for chunk in chunks:
                _keep_expert_bias_in_fp32(chunk)
                for read in self._reads(chunk):
                    by_file.setdefault(self.tensors[read.source].path, []).append(read)
        with ThreadPoolExecutor(_THREADS) as pool:
            for path in pool.map(self._load_file, *zip(*sorted(by_file.items()))):
                advance(path.name)
        return report

    @staticmethod
    def open(path: Path):
        """One of its files; raises CheckpointError if it is damaged."""
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: damaged or truncated: {error}") from None

    def _reads(self, model: torch.nn.Module) -> Iterator[_Read]:
        for part in parts(model, self.shapes):
            present = part.slices[0].stop - part.slices[0].start
            part.tensor[present:] = 0  # a padded vocabulary
            yield _Read(part.source, part.slices, part.tensor[:present])

    def _load_file(self, path: Path, reads: list[_Read]) -> Path:
        """Read the parts in the order in which they lie in the file."""
        reads = sorted(reads, key=lambda read: _place(self.tensors[read.source]))
        with torch.no_grad():
            while reads:
                mapped = 0
                with self.open(path) as file:
                    while reads and mapped < _MAPPED_BYTES:
                        source, slices, target = reads.pop(0)
                        target.copy_(self._read(file, source, slices))
                        mapped += target.numel() * target.element_size()
        return path

    def _whole(self, name: str) -> tuple[slice, ...]:
        return tuple(slice(0, size) for size in self.shapes[name])

    def _read(self, file, name: str, slices: tuple[slice, ...]) -> Tensor:
        stored = self.tensors[name]
        try:
            if not slices:
                return file.get_tensor(stored.name)
            if stored.expert is None:
                tensor = file.get_slice(stored.name)[slices]
            else:
                rows, first = slices[0], stored.first_row
                expert = slice(stored.expert, stored.expert + 1)
                own = (expert, slice(first + rows.start, first + rows.stop), *slices[1:])
                tensor = file.get_slice(stored.name)[own][0]
        except SafetensorError as error:
            raise CheckpointError(f"{stored.path}: damaged or truncated: {error}") from None
        scale = self.scales.get(name)
        if scale is None:
            return tensor
        with self.open(scale.path) as scales:
            return dequantized(tensor, scales.get_tensor(scale.name), self.block, slices)


def chunks_of(model: torch.nn.Module | Sequence[torch.nn.Module]) -> list[torch.nn.Module]:
    """The models of a rank, without wrappers: one, or its virtual pipeline chunks."""
    several = isinstance(model, (Sequence, torch.nn.ModuleList))
    return [_unwrapped(chunk) for chunk in (model if several else [model])]


def _unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The GPTModel inside wrappers such as ``DistributedDataParallel`` and ``Float16Module``."""
    while not hasattr(model, "decoder") and isinstance(
        getattr(model, "module", None), torch.nn.Module
    ):
        model = model.module
    return model


def _place(stored: Stored) -> tuple[int, int, int]:
    return stored.begin, stored.expert or 0, stored.first_row


def _keep_expert_bias_in_fp32(model: torch.nn.Module) -> None:
    """``Float16Module`` rounds the buffer; megatron-core makes it fp32 again at the next forward,
    which is too late for what is copied into it now."""
    for module in model.modules():
        bias = getattr(module, "expert_bias", None)
        if isinstance(bias, Tensor) and bias.dtype != torch.float32:
            bias.data = bias.data.float()
