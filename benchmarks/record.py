"""What the GPU benchmarks keep of a run."""

from __future__ import annotations

import datetime
import json
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from glm5_patch.env import installed_version


def machine() -> dict[str, str]:
    """What this process measures on and with, and how it was called; of absolute paths the last
    part, for the record is published."""
    on_gpu = torch.cuda.is_available()
    words = (Path(word).name if Path(word).is_absolute() else word for word in sys.argv)
    return {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(words),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        **({"driver": _driver()} if on_gpu else {}),
        "torch": torch.__version__,
        "triton": installed_version("triton") or "none",
        "megatron-core": installed_version("megatron-core") or "from a folder",
    }


def write(path: Path, **found) -> None:
    """Write JSON, and ``machine``, under a temporary name first."""
    temporary = path.with_name("." + path.name)
    temporary.write_text(json.dumps({**machine(), **found}, indent=1) + "\n")
    temporary.replace(path)


def _driver() -> str:
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return answer.split()[0]
