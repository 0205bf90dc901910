"""Kernels of other libraries for single operations, where they are installed and fit.

FlashMLA (https://github.com/deepseek-ai/FlashMLA) computes the forward of sparse attention, cuDNN's
frontend (https://github.com/NVIDIA/cudnn-frontend) the backward and a top-k; the rest stays with
Triton. Nothing of theirs is taken on trust: the first result of each operation is compared with
that of this package's own kernel.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .. import env
from ..env import installed_version
from ..errors import GLM5PatchError

MOST_DIFFERENCE = 5e-3
"""What a few roundings of bf16 come to."""


class Library(NamedTuple):
    """One that can be asked for."""

    name: str
    """In ``GLM5_PATCH_KERNELS``."""
    module: str
    """What is imported of it."""
    distribution: str
    does: str
    """Its operations, in words."""
    adapter: str
    """The module of this package that calls it."""


LIBRARIES = {
    library.name: library
    for library in (
        Library("flash_mla", "flash_mla", "flash_mla", "forward", "sparse_attention.flash_mla"),
        Library(
            "cudnn",
            "cudnn",
            "nvidia-cudnn-frontend",
            "backward and top-k",
            "sparse_attention.cudnn",
        ),
    )
}

CUDNN_MOST_TOPK = 2048

_compared: set[tuple[str, str]] = set()
_refused: dict[str, str] = {}


def why_not(name: str, device: torch.device) -> str | None:
    """Why a library computes nothing on this device; None where it does what it can."""
    asked = env.kernels()
    library = LIBRARIES[name]
    if asked not in ("auto", name):
        return f"{env.KERNELS}={asked}"
    if not _is_installed(library.module):
        return f"{library.distribution} is not installed"
    if device.type != "cuda":
        return f"the tensors are on {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major != 9:
        return f"it was tried on Hopper alone, and this is compute capability {major}.{minor}"
    return _refused.get(name) or _why_not_loaded(name)


@functools.cache
def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@functools.cache
def _why_not_loaded(name: str) -> str | None:
    try:
        adapter_of(name)
    except Exception as error:  # whatever an import of somebody else's may raise
        return f"{LIBRARIES[name].distribution} does not load: {type(error).__name__}: {error}"
    return None


def adapter_of(name: str) -> ModuleType:
    return importlib.import_module(f".{LIBRARIES[name].adapter}", __package__)


def takes(name: str, query: Tensor, latent_dim: int, k: int) -> bool:
    """Whether a library computes its part of attention on such tensors.

    Args:
        name: of the library.
        query: absorbed, [s, b, n, latent + rope].
        latent_dim: how much of a key is its value.
        k: size of the top-k.

    Raises:
        GLM5PatchError: ``GLM5_PATCH_KERNELS`` asks for this library, and it can't.
    """
    reason = why_not(name, query.device)
    if reason is None:
        reason = adapter_of(name).why_not_shape(query, latent_dim, k)
    if reason is not None and env.kernels() == name:
        raise GLM5PatchError(f"{env.KERNELS}={name}: {reason}; unset it, or set it to triton")
    return reason is None


def why_not_latent(query: Tensor, latent_dim: int) -> str | None:
    """Why no library takes such queries; args as of ``takes``."""
    if (latent_dim, query.shape[-1]) != (512, 576):
        return f"a latent of 512 + 64 is taken, not {latent_dim} + {query.shape[-1] - latent_dim}"
    if query.numel() >= 2**31:
        return "the queries are more numbers than 32 bits count"
    return None


def compared(
    name: str,
    operation: str,
    theirs: Callable[[], tuple[Tensor, ...]],
    ours: Callable[[], tuple[Tensor, ...]],
    most: float = MOST_DIFFERENCE,
) -> tuple[Tensor, ...]:
    """What a library computes, the first time only if this package's own kernel agrees.

    Args:
        name: of the library.
        operation: in words.
        theirs, ours: each computes the operation; ``ours`` is called the first time alone.
        most: by how much they may differ, relative, in the Frobenius norm.

    Raises:
        GLM5PatchError: they differ, or the library fails, and ``GLM5_PATCH_KERNELS`` asks for it.

    Warns:
        RuntimeWarning: likewise. The library is not used any more, and this result is ours.
    """
    if (name, operation) in _compared:
        return theirs()
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return ours()  # looking at a result is no part of a graph
    expected, the_operation = ours(), f"the {operation} of {_release(name)}"
    try:
        found = theirs()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # it may not compile here
        _refuse(name, f"{the_operation} failed: {type(error).__name__}: {error}")
        return expected
    differences = [_difference(*pair) for pair in zip(found, expected)]
    wrong = [difference for difference in differences if not difference <= most]  # or not a number
    if not wrong:
        _compared.add((name, operation))
        return found
    if all(tensor.isfinite().all() for tensor in expected):  # else it says nothing
        own = f"glm5-patch's own, where {most:.0e} is allowed"
        _refuse(name, f"{the_operation} is off by {wrong[0]:.1e} from {own}")
    return expected


def _release(name: str) -> str:
    distribution = LIBRARIES[name].distribution
    return f"{distribution} {installed_version(distribution) or '(no version)'}"


def _refuse(name: str, reason: str) -> None:
    if env.kernels() == name:
        raise GLM5PatchError(f"{env.KERNELS}={name}: {reason}; unset it, or set it to triton")
    _refused[name] = reason
    message = f"glm5-patch: {reason}; it is not used in this process"
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def _difference(found: Tensor, expected: Tensor) -> float:
    """Relative, in fp32; 0 of equal tensors, also of zeros."""
    distance = (found.float() - expected.float()).norm()
    return 0.0 if distance == 0 else (distance / expected.float().norm()).item()


def triton_and_libraries(device: torch.device) -> str:
    """What computes sparse attention where Triton does, in words."""
    there = [library for library in LIBRARIES.values() if why_not(library.name, device) is None]
    does = " and ".join(f"{library.does} by {library.name}" for library in there)
    return f"triton, {does}" if does else "triton"
