"""The layers that run their indexer, and the layer whose top-k each other layer reuses."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..errors import ScheduleError

FULL, SHARED, NO_ATTENTION = KINDS = ("full", "shared", "none")
"""A computing layer, a skip layer, and a layer of a HybridModel that is no attention."""

_LETTERS = {"F": FULL, "S": SHARED, "N": NO_ATTENTION}


def _kinds(types: str | Sequence[str]) -> Iterator[str]:
    for entry in [types] if isinstance(types, str) else types:
        for word in entry.replace(",", " ").split() if isinstance(entry, str) else [entry]:
            if isinstance(word, str) and word.isupper():
                yield from (_LETTERS.get(letter, letter) for letter in word)
            else:
                yield word


HF_DEFAULT_OFFSET = 2
"""``index_skip_topk_offset`` where a config.json has none (``GlmMoeDsaConfig``, 5.11 on)."""

MEGATRON_DEFAULT_OFFSET = 0
"""``dsa_indexer_skip_topk_offset`` where a Megatron config sets none (megatron-core 0.19)."""


@dataclass(frozen=True)
class IndexSchedule:
    """One entry a layer: ``"full"`` (a computing layer) or ``"shared"`` (a skip layer).

    Layers are numbered from 1, as ``layer_number`` in Megatron. IndexCache (arXiv 2603.12201)
    describes the scheme; Hugging Face calls the field ``indexer_types``.

    megatron-core's ``HybridModel`` numbers across kinds: attention and MLP are layers of their own.
    There the layers without attention are ``"none"``.
    """

    types: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.types:
            raise ScheduleError("indexer_types is empty; give one entry for each layer")
        for number, kind in enumerate(self.types, 1):
            if kind not in KINDS:
                raise ScheduleError(
                    f"indexer_types has {kind!r} for layer {number}; use 'full' or 'shared', "
                    "or a string of F and S"
                )
        first = next((n for n, kind in enumerate(self.types, 1) if kind != NO_ATTENTION), 1)
        if self.types[first - 1] != FULL:
            raise ScheduleError(
                f"indexer_types makes layer {first} a skip layer, but no layer before it computes "
                f"a top-k; the first entry must be 'full'"
            )

    @classmethod
    def from_types(
        cls, types: str | Sequence[str], num_layers: int, field: str = "indexer_types"
    ) -> IndexSchedule:
        """From ``"full"`` or ``"shared"`` for each layer.

        Args:
            types: a list; or a string of F and S; or a list of such strings, which is what a
                command line makes of one; or words in one string.
            num_layers: how many there must be.
            field: what the user calls them.
        """
        kinds = tuple(_kinds(types))
        if len(kinds) != num_layers:
            raise ScheduleError(
                f"{field} has {len(kinds)} entries for num_layers={num_layers}; give one for "
                "each layer"
            )
        return cls(kinds)

    @classmethod
    def from_freq(cls, num_layers: int, freq: int, offset: int) -> IndexSchedule:
        """Layer n computes when ``max(n - max(offset, 1), 0) % freq == 0``."""
        if freq < 1:
            raise ScheduleError(f"topk_freq={freq} must be at least 1 (1: every layer computes)")
        if offset < 0:
            raise ScheduleError(f"skip_topk_offset={offset} must not be negative")
        offset = max(offset, 1)
        return cls(
            tuple(
                FULL if max(n - offset, 0) % freq == 0 else SHARED for n in range(1, num_layers + 1)
            )
        )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> IndexSchedule:
        """From the fields of a ``glm_moe_dsa`` config.json, with Hugging Face's precedence.

        ``indexer_types`` beats ``index_topk_pattern`` beats ``index_topk_freq`` with
        ``index_skip_topk_offset``, whose default is 2 there.
        """
        num_layers = config["num_hidden_layers"]
        for field in ("indexer_types", "index_topk_pattern"):
            if config.get(field) is not None:
                found = cls.from_types(config[field], num_layers, field)
                if NO_ATTENTION in found.types:
                    raise ScheduleError(f"{field} has {NO_ATTENTION!r}; use 'full' or 'shared'")
                return found
        freq, offset = config.get("index_topk_freq") or 1, config.get("index_skip_topk_offset")
        if offset is not None:
            return cls.from_freq(num_layers, freq, offset)
        schedule = cls.from_freq(num_layers, freq, HF_DEFAULT_OFFSET)
        if schedule != cls.from_freq(num_layers, freq, MEGATRON_DEFAULT_OFFSET):
            warnings.warn(
                f"index_topk_freq={freq} without index_skip_topk_offset: Hugging Face's default of "
                f"{HF_DEFAULT_OFFSET} is taken; the same numbers in a Megatron configuration mean "
                f"other layers (its default is {MEGATRON_DEFAULT_OFFSET}). Set the offset.",
                stacklevel=2,
            )
        return schedule

    @classmethod
    def from_megatron(cls, config: Any) -> IndexSchedule:
        """From a ``TransformerConfig``: ``dsa_indexer_types`` beats freq and offset, whose
        default is 0 there."""
        types = getattr(config, "dsa_indexer_types", None)
        if types is not None:
            return cls.from_types(types, config.num_layers, "dsa_indexer_types")
        freq = getattr(config, "dsa_indexer_topk_freq", None)
        offset = getattr(config, "dsa_indexer_skip_topk_offset", None)
        return cls.from_freq(
            config.num_layers,
            1 if freq is None else freq,
            MEGATRON_DEFAULT_OFFSET if offset is None else offset,
        )

    @property
    def freq_and_offset(self) -> tuple[int, int] | None:
        """The smallest ``from_freq`` numbers that mean this schedule, or None if none do."""
        if NO_ATTENTION in self.types:
            return None
        if not self.shares:
            return 1, MEGATRON_DEFAULT_OFFSET
        offset = self.types.index(SHARED)
        after = (n for n in self.computing_layers if n > offset)
        freq = next(after, self.num_layers + 1) - offset
        found = IndexSchedule.from_freq(self.num_layers, freq, offset)
        return (freq, offset) if found == self else None

    @property
    def num_layers(self) -> int:
        return len(self.types)

    @property
    def letters(self) -> str:
        """A string of F and S, of a schedule without layers that have no attention."""
        return "".join("F" if kind == FULL else "S" for kind in self.types)

    @property
    def of_attention(self) -> IndexSchedule:
        """The schedule of the layers with attention alone, numbered as in a GPTModel."""
        return IndexSchedule(tuple(kind for kind in self.types if kind != NO_ATTENTION))

    @property
    def shares(self) -> bool:
        """Whether any layer reuses another's top-k."""
        return SHARED in self.types

    @cached_property
    def computing_layers(self) -> tuple[int, ...]:
        """The layer numbers that run their indexer, ascending."""
        return tuple(n for n, kind in enumerate(self.types, 1) if kind == FULL)

    def computes(self, layer_number: int) -> bool:
        """Whether the layer runs its own indexer."""
        return self.types[self._index(layer_number)] == FULL

    def has_attention(self, layer_number: int) -> bool:
        """Whether the layer is an attention, as every layer of a GPTModel is."""
        return self.types[self._index(layer_number)] != NO_ATTENTION

    def source(self, layer_number: int) -> int:
        """The layer whose top-k this one uses: itself, or the last computing layer before it."""
        index = self._index(layer_number)
        while self.types[index] != FULL:
            index -= 1
        return index + 1

    def source_of_rest(self, layer_number: int) -> int | None:
        """The layer before this one whose top-k this one or a later one uses; None if the next
        attention computes its own, or there is none."""
        for kind in self.types[self._index(layer_number) :]:
            if kind != NO_ATTENTION:
                return None if kind == FULL else self.source(layer_number)
        return None

    def attention_number(self, layer_number: int) -> int:
        """How many of the layers up to this one have attention: the number of its decoder layer in
        a ``GPTModel``."""
        index = self._index(layer_number)
        return sum(kind != NO_ATTENTION for kind in self.types[: index + 1])

    def consumers(self, layer_number: int) -> tuple[int, ...]:
        """The skip layers that reuse this computing layer's top-k."""
        end = self._index(layer_number) + 1
        while end < self.num_layers and self.types[end] != FULL:
            end += 1
        if not self.computes(layer_number):
            return ()
        after = range(layer_number + 1, end + 1)
        return tuple(n for n in after if self.types[n - 1] == SHARED)

    def __str__(self) -> str:
        layers = self.attention_number(self.num_layers)
        return f"{len(self.computing_layers)} of {layers} layers compute their top-k"

    def _index(self, layer_number: int) -> int:
        if not 1 <= layer_number <= self.num_layers:
            raise ScheduleError(
                f"layer {layer_number} is outside the schedule of {self.num_layers} layers"
            )
        return layer_number - 1
