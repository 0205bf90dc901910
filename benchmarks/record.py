"""What the GPU benchmarks keep of a run."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import torch

from glm5_patch.env import installed_version


def write(path: Path, **found) -> None:
    """Write JSON, and what it was measured on and with, under a temporary name first."""
    machine = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "megatron-core": installed_version("megatron-core") or "from a folder",
    }
    temporary = path.with_name("." + path.name)
    temporary.write_text(json.dumps({**machine, **found}, indent=1) + "\n")
    temporary.replace(path)
