"""What the GPU benchmarks keep of a run."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from glm5_patch.env import installed_version


def write(path: Path, **found) -> None:
    """Write JSON, and what it was measured on and with, under a temporary name first."""
    machine = {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(sys.argv),
        "device": torch.cuda.get_device_name(),
        "driver": _driver(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "megatron-core": installed_version("megatron-core") or "from a folder",
    }
    temporary = path.with_name("." + path.name)
    temporary.write_text(json.dumps({**machine, **found}, indent=1) + "\n")
    temporary.replace(path)


def _driver() -> str:
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return answer.split()[0]
