"""Every environment variable that glm5-patch reads.

============================ ======================================================
``GLM5_PATCH=0``             arm nothing (also ``false``, ``off``, ``no``)
``GLM5_PATCH_DISABLE=a,b``   leave out the patches with these ids
``GLM5_PATCH_STRICT=1``      raise where a patch fails or an id is unknown, instead of
                             warning and refusing later to build a GLM-5 model
``GLM5_PATCH_LOG=debug``     log what is armed and applied to stderr (any logging level)
============================ ======================================================
"""

from __future__ import annotations

import logging
import os
from typing import NamedTuple

ENABLED = "GLM5_PATCH"
DISABLE = "GLM5_PATCH_DISABLE"
STRICT = "GLM5_PATCH_STRICT"
LOG = "GLM5_PATCH_LOG"

_OFF = frozenset({"0", "false", "off", "no"})

logger = logging.getLogger("glm5_patch")


class Switches(NamedTuple):
    """The environment variables, parsed."""

    enabled: bool
    disabled_ids: frozenset[str]
    strict: bool
    log_level: int | None

    @classmethod
    def read(cls) -> Switches:
        """Raises ValueError for a ``GLM5_PATCH_LOG`` that is no level of ``logging``."""
        level_name = os.environ.get(LOG, "").strip()
        level = None
        if level_name:
            level = logging.getLevelName(level_name.upper())
            if not isinstance(level, int):
                raise ValueError(f"{LOG}={level_name!r} is no logging level; use debug or info")
        disabled = os.environ.get(DISABLE, "").split(",")
        return cls(
            enabled=os.environ.get(ENABLED, "").strip().lower() not in _OFF,
            disabled_ids=frozenset(part.strip() for part in disabled if part.strip()),
            strict=os.environ.get(STRICT, "").strip().lower() not in _OFF | {""},
            log_level=level,
        )

    def apply_log_level(self) -> None:
        """Show this package's log lines without touching the root logger of the host program."""
        if self.log_level is None:
            return
        logger.setLevel(self.log_level)
        if not logger.handlers:
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("%(name)s %(levelname)s: %(message)s"))
            logger.addHandler(handler)
