"""Quantised checkpoints: which can be read, and what to use instead of the others.

Block FP8 is read: a float8_e4m3 matrix ``X.weight`` with ``X.weight_scale_inv``, which has one
factor for each block of ``weight_block_size``. zai-org releases GLM-5 so.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config.hf_fields import shown
from ..errors import CheckpointError
from .headers import Stored

SCALE = "_scale_inv"
"""What the name of a scale ends in, after that of its matrix."""

FP8 = "F8_E4M3"

SETTINGS = ("quantization_config", "compression_config")
"""Fields of config.json that describe a quantisation."""

_FLOATS = ("BF16", "F32", "F16", "F64")
_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")

_INSTEAD = "use the bf16 release of the model, or zai-org's FP8 release"

_METHODS = {
    "compressed-tensors": "compressed-tensors (AWQ, INT4, INT8 by llm-compressor)",
    "awq": "AWQ",
    "gptq": "GPTQ",
    "modelopt": "NVIDIA ModelOpt (NVFP4 or FP8)",
    "bitsandbytes": "bitsandbytes",
    "gguf": "GGUF",
    "mxfp4": "MXFP4",
}


def block_size(raw: Mapping[str, Any], directory: Path) -> tuple[int, int] | None:
    """Rows and columns of a block of FP8, by config.json; None of a checkpoint without.

    Raises:
        CheckpointError: another quantisation; it is named, with what to use instead.
    """
    config = directory / "config.json"
    for name in SETTINGS:
        settings = raw.get(name)
        if settings is not None:
            break
    else:
        if (directory / "hf_quant_config.json").exists():
            raise _refused(directory / "hf_quant_config.json", "modelopt")
        return None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{config}: {name} is {shown(settings)}, but must be an object")
    method = settings.get("quant_method")
    if method is None and ("load_in_4bit" in settings or "load_in_8bit" in settings):
        method = "bitsandbytes"
    if method != "fp8":
        raise _refused(config, method)
    if settings.get("fmt", "e4m3") != "e4m3":
        raise CheckpointError(
            f"{config}: {name}.fmt is {shown(settings['fmt'])}, but must be 'e4m3'; {_INSTEAD}"
        )
    if settings.get("activation_scheme", "dynamic") != "dynamic":
        raise CheckpointError(
            f"{config}: {name}.activation_scheme is {shown(settings['activation_scheme'])}, but "
            f"must be 'dynamic'; {_INSTEAD}"
        )
    block = settings.get("weight_block_size", [128, 128])
    sizes = block if isinstance(block, list) and len(block) == 2 else [None]
    if not all(type(size) is int and 0 < size <= 1 << 16 for size in sizes):
        raise CheckpointError(
            f"{config}: {name}.weight_block_size is {shown(block)}, but must be two sizes of a "
            f"block, such as [128, 128]; {_INSTEAD}"
        )
    return sizes[0], sizes[1]


def _refused(path: Path, method: object) -> CheckpointError:
    known = _METHODS.get(method, shown(method)) if isinstance(method, str) else shown(method)
    return CheckpointError(
        f"{path}: quantised by {known}, which is not supported; of quantised ones only block "
        f"FP8 (quant_method 'fp8') is read; {_INSTEAD}"
    )


def is_scale(name: str) -> bool:
    return name.endswith(SCALE)


def blocks_of(shape: Sequence[int], block: tuple[int, int]) -> tuple[int, ...]:
    """How many blocks cover a matrix; the last of each dimension may be smaller."""
    return tuple(-(-size // unit) for size, unit in zip(shape, block))


def refuse_other_formats(directory: Path, names: Collection[str]) -> None:
    """Raise CheckpointError if a directory without safetensors has its weights in another format.

    Args:
        directory: of the checkpoint.
        names: of the files in it.
    """
    for suffix, kind in ((".gguf", "GGUF"), (".bin", "PyTorch pickle"), (".pt", "PyTorch pickle")):
        found = sorted(name for name in names if name.endswith(suffix))
        if found:
            instead = "convert them to safetensors" if kind != "GGUF" else _INSTEAD
            raise CheckpointError(
                f"{directory}: no .safetensors file, and {found[0]} is a {kind} file, which is not "
                f"supported; {instead}"
            )


def scales_of(tensors: Mapping[str, Stored], block: tuple[int, int] | None) -> dict[str, Stored]:
    """The scale of each float8 matrix of a checkpoint, by the matrix's name.

    Raises:
        CheckpointError: a tensor is of no floating-point dtype; a float8 matrix has no scale of its
            shape; a scale has no matrix.
    """
    scales = {}
    for name, stored in tensors.items():
        if is_scale(name):
            matrix = tensors.get(name.removesuffix(SCALE))
            if matrix is None or matrix.dtype != FP8:
                kind = "absent" if matrix is None else f"{matrix.dtype}, not float8"
                raise CheckpointError(
                    f"{stored.path}: {name} is a scale, but {name.removesuffix(SCALE)} is {kind}"
                )
        elif stored.dtype == FP8:
            scales[name] = _scale_of(name, stored, tensors, block)
        elif stored.dtype not in _FLOATS:
            raise CheckpointError(
                f"{stored.path}: {name} is of dtype {stored.dtype}, which is not one of "
                f"{', '.join(_FLOATS)}: packed or quantised weights; {_INSTEAD}"
            )
    return scales


def _scale_of(
    name: str, matrix: Stored, tensors: Mapping[str, Stored], block: tuple[int, int] | None
) -> Stored:
    scale = tensors.get(name + SCALE)
    if scale is None:
        raise CheckpointError(
            f"{matrix.path}: {name} is float8, but {name + SCALE}, its scale, is not there"
        )
    if block is None:
        raise CheckpointError(
            f"{matrix.path}: {name} is float8, but config.json has no quantization_config; put "
            '{"quant_method": "fp8", "weight_block_size": [128, 128]} there if it is block FP8'
        )
    blocks = blocks_of(matrix.shape, block)
    if len(matrix.shape) != 2 or scale.shape != blocks or scale.dtype not in _SCALE_DTYPES:
        raise CheckpointError(
            f"{scale.path}: {scale.name} is {scale.dtype} {list(scale.shape)}, but blocks of "
            f"{block[0]} x {block[1]} of {name} {list(matrix.shape)} need a float {list(blocks)}"
        )
    return scale
