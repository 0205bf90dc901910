"""Computing an operation, with the fallback for a library that is wrong or fails.

What a library (cuDNN, FlashMLA, DeepGEMM) computes is compared with this package's own result the
first time that a shape class is met. A library that differs or fails is not used any more.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ..env import installed_version
from .needs import Call
from .registry import Backend, choose, refuse

BF16_DIFFERENCE = 5e-3
"""What a few roundings of bf16 come to."""

_compared: set[tuple] = set()
"""Operation, backend and shape class of what agreed."""


def compute(operation: str, call: Call, *args: Any) -> Any:
    """Compute an operation by the backend that is chosen for the call.

    Args:
        operation: its name.
        call: what it computes on.
        args: of the operation.

    Raises:
        GLM5PatchError: ``GLM5_PATCH_KERNELS`` asks for a backend that can't compute it, fails, or
            differs from this package's own.

    Warns:
        RuntimeWarning: a library fails or differs. The result is this package's own.
    """
    chosen = choose(operation, call)
    if chosen.most_difference is None or (*_key(chosen), call.shape_class) in _compared:
        return chosen.compute(*args)
    return _compare(chosen, choose(operation, call, own=True), call, args)


def _key(one: Backend) -> tuple[str, str]:
    return one.operation, one.name


def _compare(library: Backend, own: Backend, call: Call, args: tuple) -> Any:
    expected = own.compute(*args)
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return expected  # looking at a result is no part of a graph
    what = f"{library.operation} by {_release(library)}"
    try:
        found = library.compute(*args)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # it may not compile here
        _refuse(library, f"{what} failed: {type(error).__name__}: {error}")
        return expected
    if library.difference is not None:
        differences = [library.difference(found, expected, *args)]
    else:
        differences = [_difference(*pair) for pair in zip(_tensors(found), _tensors(expected))]
    most = library.most_difference
    wrong = [difference for difference in differences if not difference <= most]  # or not a number
    if not wrong:
        _compared.add((*_key(library), call.shape_class))
        return found
    if all(tensor.isfinite().all() for tensor in _tensors(expected)):  # else it says nothing
        own_result = f"glm5-patch's own, where {most:.0e} is allowed"
        _refuse(library, f"{what} is off by {wrong[0]:.1e} from {own_result}")
    return expected


def _tensors(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


def _release(library: Backend) -> str:
    distribution = library.needs.distribution
    return f"{distribution} {installed_version(distribution) or '(no version)'}"


def _refuse(library: Backend, reason: str) -> None:
    refuse(library, reason)
    message = f"glm5-patch: {reason}; it is not used in this process"
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def _difference(found: Tensor, expected: Tensor) -> float:
    """Relative, in fp32; 0 of equal tensors, also of zeros."""
    distance = (found.float() - expected.float()).norm()
    return 0.0 if distance == 0 else (distance / expected.float().norm()).item()
