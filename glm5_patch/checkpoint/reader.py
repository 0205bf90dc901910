"""Reading Hugging Face checkpoints of GLM-5: checked, then loaded into a Megatron model.

A checkpoint of a model with index sharing has indexer tensors on its computing layers only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config.huggingface import HFConfig
from ..errors import CheckpointError
from .names import expected_tensors, own_part, pieces
from .survey import CheckpointReport, Survey, missing_hint

INDEX = "model.safetensors.index.json"

SINGLE = "model.safetensors"

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".index.json")


class HFCheckpoint:
    """A directory with config.json and safetensors files, checked before anything is built.

    Only headers are read until ``read`` is called.
    """

    def __init__(self, directory: str | Path):
        """Raises CheckpointError, in one line, for a directory that can't be this model."""
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise CheckpointError(f"{self.directory}: no such directory")
        self.config = HFConfig.from_directory(self.directory)
        self.files: dict[str, Path] = {}
        """Tensor -> the file that holds it."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in self._weight_files():
            with self.open(path) as file:
                for name in file.keys():
                    self.files[name] = path
                    self.shapes[name] = tuple(file.get_slice(name).get_shape())
        self.config = self.config.agreeing_with(self.shapes, self.directory / "config.json")

    @cached_property
    def report(self) -> CheckpointReport:
        """Compare with what the configuration asks for.

        Raises:
            CheckpointError: a tensor is missing, has another shape, or is unknown.
        """
        return self._report(0)

    def _report(self, mtp_layers: int) -> CheckpointReport:
        expected = expected_tensors(self.config, mtp_layers)
        survey = Survey.of(self.shapes, self.config, expected)
        schedule = self.config.schedule
        for name, shape in expected.items():
            if name not in self.shapes:
                hint = missing_hint(name, self.config)
                raise CheckpointError(f"{self.directory}: {name} is missing{hint}")
            if self.shapes[name] != shape:
                raise CheckpointError(
                    f"{self.files[name]}: {name} has shape {list(self.shapes[name])}, "
                    f"config.json makes it {list(shape)}"
                )
        for name in survey.unexpected:
            raise CheckpointError(f"{self.files[name]}: {name} is no tensor of this model")
        computing = len(schedule.computing_layers)
        return CheckpointReport(
            tensors=len(expected),
            computing_layers=computing,
            skip_layers=schedule.num_layers - computing,
            dropped=survey.dropped,
            mtp=survey.mtp,
        )

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in the dtype of the file."""
        with self.open(self.files[name]) as file:
            return file.get_tensor(name)

    def load_into(self, model: torch.nn.Module) -> CheckpointReport:
        """Copy into every parameter and buffer of this rank its part of the tensors.

        Each rank reads for itself: its pipeline stage, its experts, its slice of what tensor
        parallelism splits.

        Raises:
            CheckpointError: a parameter of the model has no tensor, or none of its shape.
        """
        report = self._report(model.config.mtp_num_layers or 0)
        with torch.no_grad():
            for name, target, sources in pieces(model):
                absent = [source for source in sources if source not in self.shapes]
                if absent:
                    raise CheckpointError(f"{self.directory}: {name} needs {absent[0]}")
                target.copy_(own_part(name, [self.read(source) for source in sources], target))
        return report

    def extra_files(self) -> Iterator[Path]:
        """Everything that is no weight and not config.json: tokenizer, generation config, ..."""
        for path in sorted(self.directory.iterdir()):
            if path.is_file() and path.name != "config.json":
                if not path.name.endswith(_WEIGHT_SUFFIXES):
                    yield path

    def _weight_files(self) -> list[Path]:
        index = self.directory / INDEX
        if index.exists():
            try:
                weight_map = json.loads(index.read_text())["weight_map"]
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{index}: not an index of safetensors: {error!r}") from None
            files = sorted({self.directory / name for name in weight_map.values()})
        else:
            files = sorted(self.directory.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{self.directory}: no .safetensors file")
        for path in files:
            if not path.exists():
                raise CheckpointError(f"{path}: no such file, but {index.name} names it")
        return files

    @staticmethod
    def open(path: Path):
        """One of its files; raises CheckpointError if it is damaged."""
        try:
            return safe_open(path, framework="pt")
        except SafetensorError as error:
            raise CheckpointError(f"{path}: damaged or truncated: {error}") from None


def shapes_in(directory: Path, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of a few tensors of a checkpoint, opening only their files; {} if one is not there."""
    try:
        index = directory / INDEX
        weight_map = json.loads(index.read_text())["weight_map"] if index.exists() else {}
        shapes = {}
        for name in names:
            with safe_open(directory / weight_map.get(name, SINGLE), framework="pt") as file:
                shapes[name] = tuple(file.get_slice(name).get_shape())
        return shapes
    except (OSError, ValueError, LookupError, TypeError, SafetensorError):
        return {}
