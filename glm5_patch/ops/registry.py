"""Which backend computes an operation, and on what.

An operation is a function with one signature. Its backend ``torch`` is the reference: it takes
every tensor and states the shapes; every other backend computes the same and is tested against it.
A backend registers itself, in its file of the operation's folder::

    @backend("sparse_attention.forward", name="flash_mla", rank=2, needs=Needs(...))
    def forward(absorbed): ...

Its file imports what is heavy inside the function, so that the record is there on every machine.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .. import env
from ..errors import GLM5PatchError
from .needs import Call, Needs, Verdict

OWN_KERNELS = "triton"
"""What computes the operations that a backend asked for by name lacks."""


@dataclass(frozen=True, eq=False)
class Backend:
    """What computes one operation."""

    operation: str
    name: str
    """In ``GLM5_PATCH_KERNELS``."""
    compute: Callable
    needs: Needs = Needs()
    """What it takes, as data."""
    rank: int = 0
    """The highest that can compute is chosen."""
    load: Callable[[], object] | None = None
    """Imports what it needs; called only where everything else fits."""
    most_difference: float | None = None
    """Of a library: by how much its results may differ from this package's own, relative, in the
    Frobenius norm. None: it is this package's own, and not compared."""
    difference: Callable[..., float] | None = None
    """Of a library: measures that instead, from its result, this package's own, and the arguments
    of the operation."""
    deterministic: bool = True
    """Whether it may run under ``torch.use_deterministic_algorithms``."""
    optional: bool = False
    """Whether another backend may compute what this one does not take even where
    ``GLM5_PATCH_KERNELS`` asks for this one."""
    asked_as: tuple[str, ...] = field(default=())
    """Further names in ``GLM5_PATCH_KERNELS`` that ask for it."""

    def check(self, call: Call) -> Verdict:
        """Whether it can compute such a call here, whatever ``GLM5_PATCH_KERNELS`` asks for."""
        interpreted = os.environ.get("TRITON_INTERPRET") == "1" and env.kernels() == self.name
        verdict = self.needs.check(call, interpreted)
        if verdict.ok and self.name in _refused:
            verdict = Verdict(False, _refused[self.name])
        if verdict.ok and not self.deterministic and torch.are_deterministic_algorithms_enabled():
            verdict = Verdict(False, "it is not deterministic")
        return _loads(self) if verdict.ok and self.load is not None else verdict

    def answers_to(self, name: str) -> bool:
        """Whether this name in ``GLM5_PATCH_KERNELS`` asks for it."""
        return name == self.name or name in self.asked_as


_backends: list[Backend] = []
_refused: dict[str, str] = {}
"""Libraries that failed or were wrong in this process, by name, and why."""


def backend(operation: str, *, name: str, **record) -> Callable[[Callable], Callable]:
    """Register the decorated function; see ``Backend`` for the record."""

    def register(compute: Callable) -> Callable:
        _backends.append(Backend(operation, name, compute, **record))
        return compute

    return register


@functools.cache
def _import_backends() -> None:
    for folder in pkgutil.iter_modules([os.path.dirname(__file__)]):
        if folder.ispkg:
            package = importlib.import_module(f".{folder.name}", __package__)
            for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
                if not module.name.endswith("_kernels"):
                    importlib.import_module(module.name)


@functools.cache
def backends(operation: str | None = None) -> tuple[Backend, ...]:
    """All backends, or those of one operation: the preferred ones first."""
    _import_backends()
    found = (one for one in _backends if operation in (None, one.operation))
    return tuple(sorted(found, key=lambda one: (one.operation, -one.rank)))


@functools.cache
def names() -> tuple[str, ...]:
    """What ``GLM5_PATCH_KERNELS`` can ask for, as ``env`` lists it."""
    return "auto", *sorted({one.name for one in backends()})


def choose(operation: str, call: Call, *, own: bool = False) -> Backend:
    """The backend that computes an operation.

    Args:
        operation: its name.
        call: what it computes on.
        own: leave libraries out.

    Raises:
        GLM5PatchError: ``GLM5_PATCH_KERNELS`` asks for a backend that can't.
    """
    candidates = _candidates(operation, "auto" if own else env.kernels())
    if own:
        candidates = [one for one in candidates if one.most_difference is None]
    for candidate in candidates:
        if candidate.check(call).ok:
            return candidate
    last = candidates[-1]
    instead = "torch" if last.most_difference is None else OWN_KERNELS
    reasons = [one.check(call).reason for one in candidates if one.name == last.name]
    raise GLM5PatchError(
        f"{env.KERNELS}={env.kernels()}: {' or '.join(dict.fromkeys(reasons))}; unset it, or set "
        f"it to {instead}"
    )


def _candidates(operation: str, name: str) -> list[Backend]:
    """Those that may compute where ``GLM5_PATCH_KERNELS=name``, the preferred first."""
    usable = list(backends(operation))
    if torch.are_deterministic_algorithms_enabled():
        usable = [one for one in usable if one.deterministic]
    if name == "auto":
        return usable
    candidates: list[Backend] = []
    for group in (name, OWN_KERNELS, "torch"):
        found = [one for one in usable if one.answers_to(group) and one not in candidates]
        candidates += found
        if any(not one.optional for one in found):
            break
    return candidates


def why_not(one: Backend, call: Call) -> str | None:
    """Why a backend never computes such a call here; None where it can."""
    fits_mode = one.deterministic or not torch.are_deterministic_algorithms_enabled()
    if fits_mode and one not in _candidates(one.operation, env.kernels()):
        return f"{env.KERNELS}={env.kernels()}"
    verdict = one.check(call)
    return None if verdict.ok else verdict.reason


def refuse(one: Backend, reason: str) -> None:
    """Use no backend of this name any more.

    Raises:
        GLM5PatchError: ``GLM5_PATCH_KERNELS`` asks for it.
    """
    if env.kernels() == one.name:
        raise GLM5PatchError(
            f"{env.KERNELS}={one.name}: {reason}; unset it, or set it to {OWN_KERNELS}"
        )
    _refused[one.name] = reason


@functools.cache
def _loads(one: Backend) -> Verdict:
    try:
        one.load()
    except Exception as error:  # whatever an import of somebody else's may raise
        what = one.needs.distribution or one.name
        return Verdict(False, f"{what} does not load: {type(error).__name__}: {error}")
    return Verdict(True)


class Row(NamedTuple):
    """One line of the table of backends."""

    operation: str
    backend: str
    takes: str
    here: str
    """"yes", or why not."""


def table(device: torch.device, dtype: torch.dtype) -> list[Row]:
    """All backends, and whether they can compute on such tensors."""
    call = Call(device, dtype)
    return [
        Row(one.operation, one.name, str(one.needs), why_not(one, call) or "yes")
        for one in backends()
    ]


def computed_by(device: torch.device, dtype: torch.dtype) -> str:
    """What computes sparse attention on such tensors, in words."""
    reason = why_torch(device, dtype)
    return triton_and_libraries(device, dtype) if reason is None else f"torch ({reason})"


def why_torch(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why torch computes sparse attention on such tensors; None where kernels do."""
    (own,) = (one for one in backends("sparse_attention") if one.name == OWN_KERNELS)
    return why_not(own, Call(device, dtype))


def triton_and_libraries(device: torch.device, dtype: torch.dtype) -> str:
    """What computes sparse attention where Triton does, in words."""
    there: dict[str, list[str]] = {}
    call = Call(device, dtype)
    for one in libraries():
        if why_not(one, call) is None and choose(one.operation, call) is one:
            there.setdefault(one.name, []).append(one.operation)
    does = [f"{' and '.join(operations)} by {name}" for name, operations in there.items()]
    return ", ".join([OWN_KERNELS, *does])


def libraries() -> Iterable[Backend]:
    """The backends that are not this package's own."""
    return (one for one in backends() if one.most_difference is not None)
