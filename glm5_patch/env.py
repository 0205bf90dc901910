"""Every environment variable that glm5-patch reads.

============================ ======================================================
``GLM5_PATCH=0``             arm nothing (also ``false``, ``off``, ``no``)
``GLM5_PATCH_DISABLE=a,b``   leave out the patches with these ids
``GLM5_PATCH_STRICT=1``      raise where a patch fails or an id is unknown, instead of
                             warning and refusing later to build a GLM-5 model
``GLM5_PATCH_LOG=debug``     log what is armed and applied to stderr (any logging level)
``GLM5_PATCH_KERNELS=torch`` what computes sparse attention: ``auto``, ``triton``, ``cudnn``,
                             ``flash_mla``, ``torch``
============================ ======================================================
"""

from __future__ import annotations

import logging
import os
import warnings
from typing import NamedTuple

from .errors import GLM5PatchError

ENABLED = "GLM5_PATCH"
DISABLE = "GLM5_PATCH_DISABLE"
STRICT = "GLM5_PATCH_STRICT"
LOG = "GLM5_PATCH_LOG"
KERNELS = "GLM5_PATCH_KERNELS"

_KERNELS = ("auto", "triton", "cudnn", "flash_mla", "torch")
_OFF = frozenset({"0", "false", "off", "no"})

logger = logging.getLogger("glm5_patch")


class Switches(NamedTuple):
    """The environment variables, parsed."""

    enabled: bool
    disabled_ids: frozenset[str]
    strict: bool
    log_level: str

    @classmethod
    def read(cls) -> Switches:
        disabled = os.environ.get(DISABLE, "").split(",")
        return cls(
            enabled=os.environ.get(ENABLED, "").strip().lower() not in _OFF,
            disabled_ids=frozenset(part.strip() for part in disabled if part.strip()),
            strict=os.environ.get(STRICT, "").strip().lower() not in _OFF | {""},
            log_level=os.environ.get(LOG, "").strip(),
        )

    def apply_log_level(self) -> None:
        """Show this package's log lines without touching the root logger of the host program."""
        if not self.log_level:
            return
        level = logging.getLevelName(self.log_level.upper())
        if not isinstance(level, int):
            warnings.warn(
                f"glm5-patch: {LOG}={self.log_level!r} is no logging level; use debug or info",
                RuntimeWarning,
                stacklevel=3,
            )
            return
        logger.setLevel(level)
        if not logger.handlers:
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("%(name)s %(levelname)s: %(message)s"))
            logger.addHandler(handler)


def kernels() -> str:
    """What ``GLM5_PATCH_KERNELS`` asks for.

    Raises:
        GLM5PatchError: for no kernels that there are.
    """
    asked = os.environ.get(KERNELS, "").strip().lower() or "auto"
    if asked not in _KERNELS:
        raise GLM5PatchError(f"{KERNELS}={asked} is none of {', '.join(_KERNELS)}")
    return asked


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution; None where there is none, or a folder alone."""
    import importlib.metadata  # here: `import torch` need not pay for it

    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
