"""The files of a checkpoint, checked by their headers. Needs no torch and takes seconds."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath

from ..config.hf_fields import shown
from ..config.huggingface import HFConfig
from ..config.json_file import read_json, regular_size, unreadable
from ..errors import CheckpointError
from .headers import Header, Stored, read_header
from .names import expected_tensors
from .quantization import block_size, is_scale, refuse_other_formats, scales_of
from .survey import CheckpointReport, Survey, missing_hint

INDEX = "model.safetensors.index.json"

SINGLE = "model.safetensors"

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf", ".index.json")

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")

_STACKED = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(gate_up_proj|down_proj)$")


class CheckpointFiles:
    """A directory with config.json and safetensors files, checked before anything is built."""

    def __init__(self, directory: str | Path):
        """
        Args:
            directory: or one of its files; or a Hub id such as ``zai-org/GLM-5.2`` or
                ``zai-org/GLM-5.2@REVISION`` that is in huggingface_hub's cache.

        Raises:
            CheckpointError: in one line, for a directory that can't be this model.
        """
        self.directory = _directory(Path(directory))
        self.config = HFConfig.from_directory(self.directory)
        self.block = block_size(self.config.raw, self.directory)
        """Rows and columns of a block of FP8; None of a checkpoint that has none."""
        headers = headers_of(self.directory)
        self.headers = headers
        """Of each file of weights."""
        written = {n: t for header in headers.values() for n, t in header.tensors.items()}
        self.scales = scales_of(written, self.block)
        """Of each float8 matrix, by the matrix's name."""
        self.tensors = _by_expert(
            {name: stored for name, stored in written.items() if not is_scale(name)},
            self.config.n_routed_experts,
        )
        """Every tensor but the scales; stacked experts one by one."""
        self.files = {name: stored.path for name, stored in self.tensors.items()}
        """Tensor -> the file that holds it."""
        self.shapes = {name: stored.shape for name, stored in self.tensors.items()}
        self.config = self.config.agreeing_with(self.shapes, self.directory / "config.json")

    @cached_property
    def report(self) -> CheckpointReport:
        """Compare with what the configuration asks for.

        Raises:
            CheckpointError: a tensor is missing, has another shape, or is unknown.
        """
        return self.report_for(0)

    def report_for(self, mtp_layers: int) -> CheckpointReport:
        """``report``, for a model that is built with MTP layers."""
        expected = expected_tensors(self.config, mtp_layers)
        survey = Survey.of(self.shapes, self.config, expected)
        schedule = self.config.schedule
        if survey.surplus:
            name = survey.surplus[0]
            raise CheckpointError(
                f"{self.directory}: config.json has fewer layers than the file: {name} is in "
                f"{self.files[name].name}, but num_hidden_layers is "
                f"{self.config.num_hidden_layers} and num_nextn_predict_layers "
                f"{self.config.num_nextn_predict_layers}"
            )
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
            dequantized=sum(name in self.scales for name in expected),
        )

    def own_files(self) -> list[Path]:
        """Every file that belongs to the checkpoint: weights, index, config.json, tokenizer, ..."""
        index = self.directory / INDEX
        others = [index] if index.exists() else []
        return [*self.headers, *others, self.directory / "config.json", *self.extra_files()]

    def extra_files(self) -> Iterator[Path]:
        """Everything that is no weight and not config.json: tokenizer, generation config, ..."""
        for path in sorted(self.directory.iterdir()):
            if path.is_file() and path.name != "config.json":
                if not path.name.endswith(_WEIGHT_SUFFIXES):
                    yield path


def _directory(path: Path) -> Path:
    """The directory of a checkpoint, from its path, one of its files or a Hub id."""
    try:
        if path.name in ("config.json", INDEX, SINGLE) and path.is_file():
            path = path.parent
        if _HUB_ID.fullmatch(str(path)) and not os.path.lexists(path):
            path = _cached(str(path))
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such directory")
        os.listdir(path)
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise unreadable(path, error) from None
    return path


def _cached(hub_id: str) -> Path:
    """The snapshot of a Hub id in huggingface_hub's cache. Nothing is downloaded."""
    repository, _, revision = hub_id.partition("@")
    try:
        from huggingface_hub import snapshot_download

        found = snapshot_download(repository, revision=revision or None, local_files_only=True)
    except Exception as error:  # not installed, not there, or no id at all
        option = f" --revision {revision}" if revision else ""
        raise CheckpointError(
            f"{hub_id}: no such directory, and huggingface_hub's cache does not have it "
            f"({type(error).__name__}); run `hf download {repository}{option}`"
        ) from None
    return Path(found)


def headers_of(directory: Path) -> dict[Path, Header]:
    """The header of every file that transformers would read in a directory.

    Raises:
        CheckpointError: which file holds a tensor is not certain, or a file is damaged.
    """
    weight_map = _weight_map(directory)
    files = sorted(set(weight_map.values())) if weight_map else [SINGLE]
    headers: dict[Path, Header] = {}
    places: dict[str, str] = {}
    for file in files:
        headers[directory / file] = header = read_header(directory / file)
        for name in header.tensors:
            if name in places:
                raise CheckpointError(
                    f"{directory}: {name} is in {places[name]} and in {file}; which one counts is "
                    "not certain"
                )
            if weight_map and weight_map.get(name) != file:
                place = weight_map.get(name, "no file")
                raise CheckpointError(
                    f"{directory}: {name} is in {file}, but {INDEX} has it in {place}"
                )
            places[name] = file
    for name, file in weight_map.items():
        if name not in places:
            raise CheckpointError(f"{directory}: {INDEX} has {name} in {file}, which lacks it")
    return headers


def _weight_map(directory: Path) -> dict[str, str]:
    """Tensor -> file, by the index; {} where ``SINGLE`` alone is to be read."""
    index = directory / INDEX
    names = os.listdir(directory)
    if INDEX not in names:
        if SINGLE in names:
            return {}
        weights = sorted(name for name in names if name.endswith(".safetensors"))
        if not weights:
            refuse_other_formats(directory, names)
            raise CheckpointError(f"{directory}: no .safetensors file")
        raise CheckpointError(
            f"{directory}: {weights[0]} is there, but neither {SINGLE} nor {INDEX}, which says "
            "which file holds which tensor; copy the index too"
        )
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index}: not an index of safetensors: weight_map is {shown(weight_map)}"
        )
    for name, file in weight_map.items():
        _check_file_name(index, name, file)
    if SINGLE in names and set(weight_map.values()) != {SINGLE}:
        raise CheckpointError(
            f"{directory}: {SINGLE} and {INDEX}, which names other files, are both there; "
            f"transformers reads {SINGLE} alone. Remove one of them"
        )
    for file in sorted(set(weight_map.values())):
        if not os.path.lexists(directory / file):
            raise CheckpointError(f"{directory / file}: no such file, but {INDEX} names it")
        regular_size(directory / file)
    return weight_map


def _check_file_name(index: Path, name: str, file: object) -> None:
    """Raise CheckpointError for a path that leaves the directory or is no file name."""
    path = PurePosixPath(file) if isinstance(file, str) else None
    if path is None or not file.endswith(".safetensors") or "\0" in file:
        raise CheckpointError(
            f"{index}: {name} is in {shown(file)}, which is no name of a .safetensors file"
        )
    if path.is_absolute() or ".." in path.parts or str(path) != file:
        raise CheckpointError(
            f"{index}: {name} is in {shown(file)}, but a file must lie in the directory"
        )


def _by_expert(tensors: Mapping[str, Stored], experts: int) -> dict[str, Stored]:
    """Experts that transformers 5 stacked, ``gate_up_proj`` [experts, 2 * ffn, hidden] and
    ``down_proj`` [experts, hidden, ffn], under the names that they have one by one."""
    found: dict[str, Stored] = {}
    for name, stored in tensors.items():
        match = _STACKED.match(name)
        if not match or len(stored.shape) != 3 or stored.shape[0] != experts:
            found[name] = stored
            continue
        _, rows, columns = stored.shape
        parts = ("gate_proj", "up_proj") if match[2] == "gate_up_proj" else ("down_proj",)
        if rows % len(parts):
            raise CheckpointError(
                f"{stored.path}: {name} has shape {list(stored.shape)}; gate and up need an even "
                "number of rows"
            )
        shape = (rows // len(parts), columns)
        for expert in range(experts):
            for number, kind in enumerate(parts):
                own = f"{match[1]}.{expert}.{kind}.weight"
                if own in tensors:
                    raise CheckpointError(f"{stored.path}: {own} is there, and in {name} too")
                part = stored._replace(shape=shape)
                begin = stored.begin + (expert * len(parts) + number) * part.nbytes
                found[own] = part._replace(begin=begin)
    return found


def shapes_in(directory: Path, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of a few tensors of a checkpoint, opening only their files; {} if one is not there."""
    try:
        weight_map = _weight_map(directory)
        files = {name: weight_map.get(name, SINGLE) for name in names}
        headers = {file: read_header(directory / file) for file in set(files.values())}
        return {name: headers[file].tensors[name].shape for name, file in files.items()}
    except (OSError, ValueError, KeyError):
        return {}
