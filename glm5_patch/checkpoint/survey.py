"""What a checkpoint holds, beside what a model needs."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from ..config.huggingface import HFConfig
from .names import INDEXER, LAYER


class Survey(NamedTuple):
    """The names of a checkpoint's tensors, beside those that a model needs."""

    read: tuple[str, ...]
    """What the model takes."""
    missing: tuple[str, ...]
    expected_absent: tuple[str, ...]
    """Indexer tensors of skip layers, by name: absent as expected."""
    dropped: tuple[str, ...]
    """Indexer tensors of skip layers, as some conversions write them; not read."""
    mtp: tuple[str, ...]
    """Tensors of multi-token-prediction layers that the model is built without; not read."""
    surplus: tuple[str, ...]
    """Tensors of layers that config.json has neither in the decoder nor for MTP."""
    unexpected: tuple[str, ...]

    @classmethod
    def of(cls, names: Iterable[str], hf: HFConfig, expected: Collection[str]) -> Survey:
        """Of the names that a checkpoint has, and those that ``expected_tensors`` gives."""
        names, expected = set(names), set(expected)
        dropped, mtp, surplus, unexpected = [], [], [], []
        layers = hf.num_hidden_layers + hf.num_nextn_predict_layers
        for name in sorted(names - expected):
            layer = LAYER.match(name)
            if layer and int(layer[1]) >= layers:
                surplus.append(name)
            elif layer and int(layer[1]) >= hf.num_hidden_layers:
                mtp.append(name)
            elif INDEXER.match(name):
                dropped.append(name)
            elif name != "lm_head.weight":  # a tied head may be written out
                unexpected.append(name)
        indexer = {INDEXER.sub("", name) for name in expected if INDEXER.match(name)}
        of_skip_layers = [
            f"model.layers.{number - 1}.self_attn.indexer.{name}"
            for number in range(1, hf.num_hidden_layers + 1)
            if not hf.schedule.computes(number)
            for name in sorted(indexer)
        ]
        return cls(
            read=tuple(sorted(names & expected)),
            missing=tuple(sorted(expected - names)),
            expected_absent=tuple(name for name in of_skip_layers if name not in names),
            dropped=tuple(dropped),
            mtp=tuple(mtp),
            surplus=tuple(surplus),
            unexpected=tuple(unexpected),
        )


@dataclass(frozen=True)
class CheckpointReport:
    """What a checkpoint holds, beside what the model needs."""

    tensors: int
    """Tensors that the model takes."""
    computing_layers: int
    skip_layers: int
    """Layers without indexer tensors, as it should be."""
    dropped: tuple[str, ...]
    """Indexer tensors on skip layers, as some conversions write them; not loaded."""
    mtp: tuple[str, ...]
    """Tensors of the multi-token-prediction layers; not loaded."""
    dequantized: int = 0
    """Tensors of float8 that become bf16 when they are loaded."""

    def __str__(self) -> str:
        text = (
            f"{self.tensors} tensors, indexers on {self.computing_layers} computing layers; "
            f"{self.skip_layers} skip layers, no indexer expected"
        )
        if self.dropped:
            text += f"; {len(self.dropped)} indexer tensors on skip layers dropped"
        if self.dequantized:
            text += f"; {self.dequantized} of them are float8 and become bf16"
        if self.mtp:
            text += f"; {len(self.mtp)} tensors of the MTP layer not loaded"
        return text


def missing_hint(name: str, hf: HFConfig) -> str:
    """Why a tensor should be there, if that is not plain."""
    layer = LAYER.match(name)
    if layer and int(layer[1]) >= hf.num_hidden_layers + hf.num_nextn_predict_layers:
        return (
            f": the model has MTP layer {int(layer[1]) - hf.num_hidden_layers + 1}, but "
            f"num_nextn_predict_layers is {hf.num_nextn_predict_layers}; with "
            "mtp_use_repeated_layer=True one layer is applied mtp_num_layers times"
        )
    indexer = INDEXER.match(name)
    if not indexer:
        return ""
    if int(indexer[1]) >= hf.num_hidden_layers:
        return ": the MTP layer computes its own top-k"
    return (
        f": layer {int(indexer[1]) + 1} computes its own top-k by config.json's schedule "
        f"({hf.schedule})"
    )
