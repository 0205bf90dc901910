"""The entry point that torch calls at the end of ``import torch``.

An exception here would make ``import torch`` fail for everybody, so this is a leaf: standard
library only at module level, every failure turned into one line on stderr.
"""

import os
import sys


def activate() -> None:
    """Arm the patches. Safe to call twice: a second call finds everything armed."""
    # Read here and not only in env.py: a process that switched the plugin off pays for no import.
    if os.environ.get("GLM5_PATCH", "").strip().lower() in ("0", "false", "off", "no"):
        return
    try:
        from .patches import MACHINE

        MACHINE.enable()
    except Exception as error:
        print(
            f"glm5-patch: problem in activation: {type(error).__name__}: {error}",
            file=sys.stderr,
        )
