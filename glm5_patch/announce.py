"""One line, when the first GLM-5 of a process is built: what it was built with."""

from __future__ import annotations

import importlib.metadata
import logging
import sys
from typing import Any

from . import __version__
from .env import logger

_announced = False


def announce(config: Any) -> None:
    """Say it once, on rank 0 alone: logged at INFO where that is listened to, else on stderr.

    Args:
        config: the ``TransformerConfig`` of a model that passed the gate.
    """
    global _announced
    if _announced or _rank() != 0:
        return
    _announced = True
    line = describe(config)
    if logger.isEnabledFor(logging.INFO) and logger.hasHandlers():
        logger.info(line)
    else:
        print(line, file=sys.stderr)


def describe(config: Any) -> str:
    """Versions, patches, index schedule and kernels of a model."""
    import torch

    from .core.ledger import LEDGER, State
    from .model.kernels import computed_by
    from .model.schedule import IndexSchedule

    states = [entry.state for entry in LEDGER]
    if LEDGER["dsa_spec"].state is State.APPLIED:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        attention = computed_by(device, config.params_dtype)
    else:
        attention = "megatron-core's own"
    return (
        f"glm5-patch {__version__}: a GLM-5 on megatron-core {_core()}; "
        f"{states.count(State.APPLIED)} patches applied, "
        f"{states.count(State.NOT_NEEDED)} not needed; {IndexSchedule.from_megatron(config)}; "
        f"sparse attention by {attention}"
    )


def _core() -> str:
    try:
        return importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        return "from a folder on the path"


def _rank() -> int:
    import torch

    distributed = torch.distributed
    initialized = distributed.is_available() and distributed.is_initialized()
    return distributed.get_rank() if initialized else 0
