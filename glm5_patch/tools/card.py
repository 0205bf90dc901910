"""``--card``: what a command found, and where, as a file."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path

import glm5_patch

from ..env import installed_version
from .report import Result
from .status import environment

_OF_SOURCE_TREES = {"megatron-core": "megatron.core", "megatron-bridge": "megatron.bridge"}
"""Distributions that may be on the path without being installed -> their modules."""
VERDICTS = {0: "passed", 1: "failed", 2: "unusable"}
"""By the exit code of the command."""


def write_card(path: Path, arguments: Sequence[str], result: Result) -> None:
    """Keep what a command found, and where, in a YAML file that appears whole or not at all.

    Args:
        path: of the file; its directory exists.
        arguments: of the command.
        result: what it found.
    """
    import torch

    devices = range(torch.cuda.device_count())
    found = environment().data
    versions_of = dict(found["versions"])
    for name, module in _OF_SOURCE_TREES.items():
        imported = sys.modules.get(module)
        if imported is not None and installed_version(name) is None:
            versions_of[name] = f"{imported.__version__}, a source tree"
    card = {
        "command": shlex.join(["glm5-patch", *arguments]),
        "date": date.today().isoformat(),
        "verdict": VERDICTS[result.code],
        "machine": {
            "platform": versions_of.pop("platform"),
            "processors": os.cpu_count(),
            "devices": [torch.cuda.get_device_name(number) for number in devices],
        },
        "versions": versions_of,
        "switches": found["environment"],
        "patches": {row.id: row.state.value for row in glm5_patch.status()},
        "figures": result.data,
    }
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("\n".join(_yaml(card)) + "\n")
    partial.replace(path)


def _yaml(value, indent: str = "") -> Iterator[str]:
    """Lines of block YAML. A scalar, or an empty collection, is written as in JSON."""
    items = value.items() if isinstance(value, dict) else [(None, item) for item in value]
    for key, item in items:
        start = f"{indent}-" if key is None else f"{indent}{json.dumps(key)}:"
        if item and isinstance(item, (dict, list)):
            yield start
            yield from _yaml(item, f"{indent}  ")
        else:
            # To many readers 1e-06 is a string and 1.0e-06 a number.
            scalar = json.dumps(item)
            if isinstance(item, float) and "." not in scalar:
                scalar = scalar.replace("e", ".0e")
            yield f"{start} {scalar}"
