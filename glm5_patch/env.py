"""Every environment variable that glm5-patch reads.

============================= =====================================================
``GLM5_PATCH=0``              arm nothing (also ``false``, ``off``, ``no``)
``GLM5_PATCH_DISABLE=a,b``    leave out the patches with these ids
``GLM5_PATCH_STRICT=1``       raise where a patch fails or a switch is wrong, instead of
                              warning and refusing later to build a GLM-5 model
``GLM5_PATCH_LOG=debug``      log what is armed and applied to stderr (any logging level)
``GLM5_PATCH_ATTENTION=host`` select the attention modules of a GLM-5: ``plugin``, ``host``, or
                              ``auto`` (the plugin's; the host's if ``dsa_kernel_backend`` asks
                              for its kernels)
``GLM5_PATCH_KERNELS=torch``  select the backend of sparse attention: ``auto``, ``triton``,
                              ``gluon``, ``cudnn``, ``flash_mla``, ``deep_gemm``,
                              ``torch``
``GLM5_PATCH_TP=heads``       select what the ranks of tensor parallelism share out: ``tokens``,
                              ``heads``, or ``auto`` (tokens under sequence parallelism)
============================= =====================================================

A wrong value has no effect, and ``problems`` names it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable
from typing import NamedTuple

from .errors import GLM5PatchError

ENABLED = "GLM5_PATCH"
DISABLE = "GLM5_PATCH_DISABLE"
STRICT = "GLM5_PATCH_STRICT"
LOG = "GLM5_PATCH_LOG"
KERNELS = "GLM5_PATCH_KERNELS"
ATTENTION = "GLM5_PATCH_ATTENTION"
TENSOR_PARALLEL = "GLM5_PATCH_TP"

_KERNELS = ("auto", "triton", "gluon", "cudnn", "flash_mla", "deep_gemm", "torch")
_ATTENTION = ("auto", "plugin", "host")
_TENSOR_PARALLEL = ("auto", "tokens", "heads")
_ON = ("1", "true", "on", "yes")
_OFF = ("0", "false", "off", "no")
_LEVELS = ("debug", "info", "warning", "error", "critical")
_CHOICES = {
    ENABLED: _ON + _OFF,
    STRICT: _ON + _OFF,
    LOG: _LEVELS,
    KERNELS: _KERNELS,
    ATTENTION: _ATTENTION,
    TENSOR_PARALLEL: _TENSOR_PARALLEL,
}
_NAMES = (*_CHOICES, DISABLE)

logger = logging.getLogger("glm5_patch")


class Switches(NamedTuple):
    """The environment variables, parsed."""

    enabled: bool
    disabled_ids: frozenset[str]
    strict: bool
    log_level: str

    @classmethod
    def read(cls) -> Switches:
        return cls(
            enabled=_value(ENABLED) not in _OFF,
            disabled_ids=frozenset(part.lower() for part in _disabled_ids()),
            strict=_value(STRICT) in _ON,
            log_level=_value(LOG),
        )

    def apply_log_level(self) -> None:
        """Show this package's log lines without touching the root logger of the host program."""
        if self.log_level not in _LEVELS:
            return
        logger.setLevel(self.log_level.upper())
        if not logger.handlers:
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("%(name)s %(levelname)s: %(message)s"))
            logger.addHandler(handler)


def problems(patch_ids: Collection[str] | None = None) -> list[str]:
    """What is wrong with this package's environment variables: one sentence each, which repeats
    what was typed and says what is meant, as far as that can be guessed.

    Args:
        patch_ids: the ids that there are; without them ``GLM5_PATCH_DISABLE`` is not looked at.
    """
    found = []
    for name in sorted(os.environ):
        if name.upper().replace("_", "").startswith("GLM5PATCH") and name not in _NAMES:
            found.append(
                f"{name} is not a variable of glm5-patch{_guess(name.upper(), _NAMES)}; "
                f"it has no effect. There are {', '.join(_NAMES)}"
            )
    for name, choices in _CHOICES.items():
        if _value(name) and _value(name) not in choices:
            found.append(
                f"{name}={os.environ[name]!r} must be one of {', '.join(choices)}"
                f"{_guess(_value(name), choices)}; it has no effect"
            )
    for typed in _disabled_ids() if patch_ids is not None else ():
        if typed.lower() not in patch_ids:
            found.append(
                f"{DISABLE} names {typed!r}, which is not a patch"
                f"{_guess(typed.lower(), patch_ids)}; there are {', '.join(sorted(patch_ids))}"
            )
    return found


def kernels() -> str:
    """What ``GLM5_PATCH_KERNELS`` asks for.

    Raises:
        GLM5PatchError: a value that it does not have.
    """
    return _asked(KERNELS)


def attention() -> str:
    """What ``GLM5_PATCH_ATTENTION`` asks for.

    Raises:
        GLM5PatchError: a value that it does not have.
    """
    return _asked(ATTENTION)


def tensor_parallel() -> str:
    """What ``GLM5_PATCH_TP`` asks for.

    Raises:
        GLM5PatchError: a value that it does not have.
    """
    return _asked(TENSOR_PARALLEL)


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution; None where there is none, or a folder alone."""
    import importlib.metadata  # here: `import torch` need not pay for it

    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _asked(name: str) -> str:
    asked, choices = _value(name) or "auto", _CHOICES[name]
    if asked not in choices:
        raise GLM5PatchError(
            f"{name}={os.environ[name]!r} must be one of {', '.join(choices)}"
            f"{_guess(asked, choices)}"
        )
    return asked


def _value(name: str) -> str:
    return os.environ.get(name, "").strip().lower()


def _disabled_ids() -> list[str]:
    return os.environ.get(DISABLE, "").replace(",", " ").split()


def _guess(typed: str, known: Iterable[str]) -> str:
    import difflib  # here: only a wrong switch pays for it

    close = difflib.get_close_matches(typed, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
