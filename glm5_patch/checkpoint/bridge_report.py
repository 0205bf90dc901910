"""What a conversion by Megatron-Bridge takes from a checkpoint of a GLM-5, and what it writes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..config.huggingface import HFConfig
from ..errors import CheckpointError
from .dequantize import dequantized
from .names import expected_tensors, mtp_layers_of
from .quantization import SCALE, block_size, blocks_of, is_scale
from .survey import Survey, missing_hint


def report(bridge: Any, model: Any) -> Survey:
    """Compare the tensors of an ``AutoBridge``'s checkpoint with those that a model needs.

    Args:
        bridge: an ``AutoBridge`` of a Hugging Face directory.
        model: the Megatron model, or a list of its chunks; whole or split.

    Raises:
        CheckpointError: the ``AutoBridge`` was made of a configuration, without tensors.
    """
    if not _has_tensors(bridge.hf_pretrained):
        raise CheckpointError("this AutoBridge was made of a configuration: it has no tensors")
    return _survey(bridge.hf_pretrained, model)


def _survey(hf_pretrained: Any, model: Any) -> Survey:
    # The scales of float8 are no tensors of the model: ``dequantizing`` reads them.
    names = [name for name in hf_pretrained.state.source.get_all_keys() if not is_scale(name)]
    return Survey.of(names, _config(hf_pretrained), _expected(hf_pretrained, model))


def check_before_loading(hf_pretrained: Any, model: Any) -> Survey | None:
    """As ``report``; None of a configuration without tensors.

    Raises:
        CheckpointError: it is quantised otherwise than in block FP8; or a tensor is missing, and
            Bridge would leave what it makes as it was drawn.

    Warns:
        RuntimeWarning: a tensor does not belong to this model.
    """
    if not _has_tensors(hf_pretrained):
        return None
    where = hf_pretrained.model_name_or_path
    block_size(_config(hf_pretrained).raw, Path(where))
    survey = _survey(hf_pretrained, model)
    if survey.missing:
        name = survey.missing[0]
        more = f" (and {len(survey.missing) - 1} more)" if len(survey.missing) > 1 else ""
        hint = missing_hint(name, _config(hf_pretrained))
        raise CheckpointError(f"{where}: {name} is missing{more}{hint}")
    if survey.unexpected:
        message = (
            f"glm5-patch: {where}: {survey.unexpected[0]} is no tensor of this model, and is not "
            f"read (of {len(survey.unexpected)} such)"
        )
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return survey


@contextmanager
def dequantizing(hf_pretrained: Any) -> Iterator[set[str]]:
    """While this is open, Bridge reads block FP8 as bf16; it would take float8 without its scales.

    Yields:
        the names of the tensors that were float8, as they are read.

    Raises:
        CheckpointError: where a tensor is read that is quantised otherwise, or lacks its scale.
    """
    found: set[str] = set()
    if not _has_tensors(hf_pretrained):
        yield found
        return
    source, where = hf_pretrained.state.source, hf_pretrained.model_name_or_path
    block = block_size(_config(hf_pretrained).raw, Path(where))
    load = source.load_tensors

    def load_tensors(names):
        tensors = load(names)
        for name, tensor in tensors.items():
            if is_scale(name):
                continue
            if tensor.dtype == torch.float8_e4m3fn:
                if block is None:
                    raise CheckpointError(
                        f"{where}: {name} is float8, but config.json has no quantization_config"
                    )
                if name + SCALE not in source.get_all_keys():
                    raise CheckpointError(f"{where}: {name} is float8, but has no {name + SCALE}")
                scales = load([name + SCALE])[name + SCALE]
                blocks = blocks_of(tensor.shape, block)
                if tensor.dim() != 2 or tuple(scales.shape) != blocks:
                    raise CheckpointError(
                        f"{where}: {name + SCALE} is {list(scales.shape)}, but {name} "
                        f"{list(tensor.shape)} needs {list(blocks)}"
                    )
                whole = tuple(slice(0, size) for size in tensor.shape)
                tensors[name] = dequantized(tensor, scales, block, whole)
                found.add(name)
            elif not tensor.is_floating_point() or tensor.element_size() == 1:
                raise CheckpointError(
                    f"{where}: {name} is {tensor.dtype}: packed or quantised weights can't be read"
                )
        return tensors

    source.load_tensors = load_tensors
    try:
        yield found
    finally:
        del source.load_tensors


def refuse_saving_beside_float8(hf_pretrained: Any) -> None:
    """Raise CheckpointError if what is saved would get the config.json of a quantised model."""
    names = hf_pretrained.state.source.get_all_keys()
    if any(map(is_scale, names)):
        where = hf_pretrained.model_name_or_path
        raise CheckpointError(
            f"{where}: float8; Bridge saves bf16 beside its config.json, which says fp8. Run "
            f"`glm5-patch checkpoint dequantize {where} OUT`, and make the AutoBridge of OUT"
        )


def describe_loading(survey: Survey, float8: int = 0) -> str:
    parts = [
        f"{len(survey.read)} tensors read",
        f"{len(survey.expected_absent)} indexer tensors of skip layers absent as expected",
    ]
    if float8:
        parts.append(f"{float8} of them float8, which became bf16")
    if survey.dropped:
        parts.append(f"{len(survey.dropped)} indexer tensors of skip layers not read")
    if survey.mtp:
        parts.append(f"{len(survey.mtp)} of the MTP layer, which this model does not have")
    if survey.unexpected:
        parts.append(f"{len(survey.unexpected)} unexpected")
    return "; ".join(parts)


def checked(
    tensors: Iterable[Any],
    hf_pretrained: Any,
    model: Any,
    done: Callable[[str], None] = lambda text: None,
) -> Iterator[Any]:
    """Yield named tensors, and check at the end that every tensor of the model was among them.

    Args:
        tensors: tuples that start with a Hugging Face name.
        hf_pretrained: the ``AutoBridge``'s checkpoint or configuration.
        model: the Megatron model, or a list of its chunks.
        done: called at the end with a description of what was written.

    Raises:
        CheckpointError: a tensor that the model must have was not among them.
    """
    written = set()
    for tensor in tensors:
        written.add(tensor[0].replace(".base_layer.", "."))
        yield tensor
    missing = sorted(_expected(hf_pretrained, model) - written)
    if missing:
        raise CheckpointError(
            f"Bridge converted {len(written)} tensors, and not {missing[0]} "
            f"(of {len(missing)} such): what was written is no whole model"
        )
    done(describe_writing(written, hf_pretrained))


def describe_writing(written: set[str], hf_pretrained: Any) -> str:
    text = f"{len(written)} tensors written"
    if _has_tensors(hf_pretrained):
        left = set(hf_pretrained.state.source.get_all_keys()) - written
        if left:
            text += f"; {len(left)} of {hf_pretrained.model_name_or_path} not: {min(left)}, ..."
    return text


def _has_tensors(hf_pretrained: Any) -> bool:
    return hasattr(getattr(hf_pretrained, "state", None), "source")


def _config(hf_pretrained: Any) -> HFConfig:
    return HFConfig(getattr(hf_pretrained, "config", hf_pretrained).to_dict())


def _expected(hf_pretrained: Any, model: Any) -> set[str]:
    first = model[0] if isinstance(model, list) else model
    return set(expected_tensors(_config(hf_pretrained), mtp_layers_of(first.config)))
