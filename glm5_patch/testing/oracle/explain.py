"""Find the known faults under which the reference gives the same logits as an implementation.

The first ``index_topk`` tokens of a sequence attend to everything before them, so faults of the
selection leave them alone. They are explained first, by the other faults; then the rest, by those
of the selection. That keeps the search small: it covers every pair, and some larger sets.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from types import SimpleNamespace

import torch
from torch import Tensor

from .checkpoint import computing_layers
from .faults import FAULTS, Fault
from .reference import Conventions, Forward, Reference

BOUND = 2e-5
"""The largest difference of two equal logits, relative to the largest logit."""
ENOUGH = 0.4
"""The share of tokens that must be free of near ties for a comparison to say something."""
MOST_DENSE = 2
"""Faults outside of the selection that are tried together."""
MOST_SELECTING = 3
"""Faults of the selection that are tried together."""
COMMON = "latent_norm_eps"
"""What all trainers do and Hugging Face does not; it is tried beside the others."""
MOST = 1 + MOST_DENSE + MOST_SELECTING
FITTED = {
    "rope_theta": (1e2, 1e10),
    "softmax_scale": (1e-3, 1e1),
    "routed_scaling_factor": (1e-2, 1e2),
    "rms_norm_eps": (1e-9, 1e-1),
    "kv_latent_norm_eps": (1e-9, 1e-1),
    "q_latent_norm_eps": (1e-9, 1e-1),
}
"""Settings that may have any value, and where it is searched."""
EPSILONS = (0.0, *(10.0**-n for n in range(12, 1, -1)))

Faults = tuple[Fault, ...]


@dataclass(frozen=True)
class Fit:
    """A setting that has another value than in any known fault."""

    setting: str
    value: float | tuple[int, ...]
    right: float | tuple[int, ...]

    def __str__(self) -> str:
        value, right = (
            ", ".join(map(str, one)) if isinstance(one, tuple) else f"{one:.6g}"
            for one in (self.value, self.right)
        )
        return f"{self.setting} = {value} and not {right}"


class Explainer:
    """The reference on some tokens, under known faults.

    Args:
        reference: with weights that have an indexer in every layer.
        ids: int64 [b, s], with s above ``index_topk``.
    """

    def __init__(self, reference: Reference, ids: Tensor):
        self.reference, self.ids = reference, ids
        self.config: SimpleNamespace = reference.config
        self.right = Conventions.of(self.config)
        self._forwards: dict[tuple[Conventions, int], Forward] = {}
        within = torch.arange(ids.shape[1]) < self.config.index_topk
        self.within = within.expand(ids.shape)
        """bool [b, s]: the tokens that attend to everything before them."""
        self.all_tokens = torch.ones_like(self.within)

    def forward(self, conventions: Conventions, sequences: int | None = None) -> Forward:
        """Of all sequences, or of the first ones. The outputs of layers are left out."""
        key = conventions, sequences or len(self.ids)
        if key not in self._forwards:
            forward = self.reference(self.ids[: key[1]], conventions)
            self._forwards[key] = replace(forward, hidden=[])  # hundreds are kept
        return self._forwards[key]

    def gives(self, conventions: Conventions, logits: Tensor, where: Tensor) -> bool:
        """Whether the tokens of ``where``, bool [b, s], have these logits. Those that a near tie
        has touched are left out."""
        one = self.forward(conventions, 1)
        if not _agrees(one, logits[:1], where[:1]):
            return False  # the first sequence alone is much faster
        whole = self.forward(conventions)
        enough = (whole.intact & where).sum() >= ENOUGH * where.sum()
        return bool(enough) and _agrees(whole, logits, where)

    def changed(self, faults: Faults, base: Conventions | None = None) -> Conventions:
        conventions = base or self.right
        for fault in faults:
            conventions = fault.applied(conventions, self.config)
        return conventions

    @cached_property
    def _faults(self) -> Faults:
        """Those that show on this model."""
        right = self.forward(self.right).logits
        return tuple(
            f for f in FAULTS if not self.gives(self.changed((f,)), right, self.all_tokens)
        )

    def explain(
        self,
        logits: Tensor,
        leaks: bool,
        most: int = MOST,
        all_indexers: bool = False,
        base: Conventions | None = None,
    ) -> list[Faults]:
        """The smallest sets of known faults that give these logits.

        Args:
            logits: [b, s, vocab].
            leaks: whether the logits of a token depend on later tokens.
            most: faults of a set.
            all_indexers: whether the implementation was given an indexer in every layer.
            base: what is changed; GLM-5's conventions if left out.

        Returns:
            Sets of one size; ``[()]`` if the logits are right, and ``[]`` if nothing gives them.
        """
        able = [fault for fault in self._faults if all_indexers or not fault.all_indexers]
        if leaks:
            return self._smallest(_leaking(able, most), logits, self.all_tokens, base)
        able = [fault for fault in able if not fault.leaks]
        dense = [fault for fault in able if not fault.selects]
        selecting = [fault for fault in able if fault.selects]
        starts = self._smallest(_dense(dense, most), logits, self.within, base)
        found = []
        for start in starts:
            rest = subsets(selecting, min(most - len(start), MOST_SELECTING))
            sets = (start + chosen for chosen in rest)
            found += self._smallest(sets, logits, self.all_tokens, base)
        if not found and most > 1:
            # A rope that only the indexer has shows in later tokens alone.
            sets = (start + (other,) for start in starts for other in dense)
            sets = (faults for faults in sets if _apart(faults))
            found = self._smallest(sets, logits, self.all_tokens, base)
        fewest = min(map(len, found), default=0)
        return [faults for faults in found if len(faults) == fewest]

    def _smallest(
        self, sets: Iterable[Faults], logits: Tensor, where: Tensor, base: Conventions | None
    ) -> list[Faults]:
        """Of sets in the order of their sizes: those of the first size that explain ``where``."""
        found: list[Faults] = []
        for faults in sets:
            if found and len(faults) > len(found[0]):
                break
            if self.gives(self.changed(faults, base), logits, where):
                found.append(faults)
        return found

    @property
    def _bases(self) -> tuple[Conventions, Conventions]:
        """What a value is looked for beside."""
        common = tuple(fault for fault in FAULTS if fault.id == COMMON)
        return self.right, self.changed(common)

    def fit_schedule(self, logits: Tensor) -> Fit | None:
        """The computing layers of another frequency and offset.

        Args:
            logits: of an implementation that was given an indexer in every layer.
        """
        layers = range(1, self.config.num_hidden_layers + 1)
        schedules = {
            computing_layers(len(layers), freq, offset): None
            for freq in layers
            for offset in layers
        }
        for base in self._bases:
            for computing in schedules:
                conventions = replace(base, index_computing_layers=computing)
                if self.gives(conventions, logits, self.all_tokens):
                    return Fit(
                        "index_computing_layers", computing, self.right.index_computing_layers
                    )
        return None

    def fit_listed(self, logits: Tensor) -> Fit | None:
        """The value of a setting with few values that gives these logits."""
        listed = {"index_topk": range(1, self.ids.shape[1]), "index_k_norm_eps": EPSILONS}
        for base in self._bases:
            for setting, values in listed.items():
                for value in values:
                    if self.gives(replace(base, **{setting: value}), logits, self.all_tokens):
                        return Fit(setting, value, getattr(self.right, setting))
        return None

    def fit(self, logits: Tensor) -> Fit | None:
        """The value of a setting with any value that gives the logits of the first tokens."""
        coarse = [
            (self._distance(base, setting, 10**exponent, logits), base, setting, exponent)
            for base in self._bases
            for setting in FITTED
            for exponent in _exponents(setting)
        ]
        _, base, setting, exponent = min(coarse, key=lambda one: one[0])
        right = getattr(self.right, setting)
        distance = lambda value: self._distance(base, setting, value, logits)
        if distance(right) <= BOUND:
            return None
        low, high, *_ = _exponents(setting)
        step = high - low
        for _ in range(16):
            step /= 2
            near = exponent - step, exponent, exponent + step
            exponent = min(near, key=lambda exponent: distance(10**exponent))
        rounded = (float(f"{10**exponent:.{digits}e}") for digits in range(5))
        value = next((value for value in rounded if distance(value) <= BOUND), 10**exponent)
        return Fit(setting, value, right) if distance(value) <= 50 * BOUND else None

    def _distance(self, base: Conventions, setting: str, value: float, logits: Tensor) -> float:
        """Of most of the first tokens: the experts of some may change with any value."""
        forward = self.forward(replace(base, **{setting: value}), 1)
        errors = token_errors(forward.logits, logits[:1])
        return errors[self.within[:1]].quantile(0.75).item()

    def nearest(self, logits: Tensor) -> tuple[Fault, float] | None:
        """The one fault under which most tokens agree, and their share; None if none helps."""

        def share(faults: Faults) -> float:
            errors = token_errors(self.forward(self.changed(faults)).logits, logits)
            return (errors <= BOUND).float().mean().item()

        best = max(self._faults, key=lambda fault: share((fault,)))
        found = share((best,))
        return (best, found) if found > share(()) else None


def _exponents(setting: str) -> list[float]:
    low, high = map(math.log10, FITTED[setting])
    return [low + (high - low) / 20 * step for step in range(21)]


def _dense(faults: list[Fault], most: int) -> Iterator[Faults]:
    """Sets of few, and larger ones with what is common."""
    for chosen in subsets(faults, min(most, MOST_DENSE + 1)):
        if len(chosen) <= MOST_DENSE or any(fault.id == COMMON for fault in chosen):
            yield chosen


def _leaking(faults: list[Fault], most: int) -> Iterator[Faults]:
    """Sets of a fault that leaks, and of one of the selection and one other beside it."""
    for chosen in subsets(faults, min(most, 3)):
        if any(f.leaks for f in chosen) and (
            len(chosen) < 3 or sum(f.selects for f in chosen) == 1
        ):
            yield chosen


def subsets(faults: Iterable[Fault], most: int) -> Iterator[Faults]:
    """Sets of at most so many faults, smaller ones first, no two of one setting."""
    faults = tuple(faults)
    for size in range(most + 1):
        yield from filter(_apart, combinations(faults, size))


def _apart(faults: Faults) -> bool:
    """Whether no two of them change one setting."""
    settings = [name for fault in faults for name in fault.changes]
    return len(set(settings)) == len(settings)


def token_errors(ours: Tensor, theirs: Tensor) -> Tensor:
    """[b, s]: the largest difference of a token's logits, relative to the largest of all."""
    errors = (ours - theirs).abs().amax(-1) / ours.abs().max()
    return errors.nan_to_num(float("inf"), posinf=float("inf"))


def _agrees(forward: Forward, logits: Tensor, where: Tensor) -> bool:
    """Whether all tokens of ``where`` that no near tie has touched have these logits."""
    errors = token_errors(forward.logits, logits)[forward.intact & where]
    return bool((errors <= BOUND).all())
