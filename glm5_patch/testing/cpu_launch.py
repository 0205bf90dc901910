"""``python -m glm5_patch.testing.cpu_launch pretrain_gpt.py ARGUMENTS``: Megatron-LM without a GPU.

It runs a script of Megatron-LM as it is, on one rank of gloo, with the calls of CUDA that
``megatron.training`` makes answered for the CPU. It is for a toy model: to try a command line, and
for tests. It refuses to run where a CUDA device is available.
"""

from __future__ import annotations

import contextlib
import functools
import os
import runpy
import sys
from pathlib import Path
from unittest import mock

import torch

from . import cpu_host

ONE_RANK = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
}


def launch(script: str | Path, arguments: list[str]) -> None:
    """Run a script of Megatron-LM in this process, which must be a fresh one.

    Args:
        script: such as ``pretrain_gpt.py``. Its folder is searched after all others, so that an
            installed megatron-core comes before the one beside the script.
        arguments: of the command line. ``--distributed-backend gloo`` is added.

    Raises:
        GLM5PatchError: a CUDA device is available.
    """
    for name, value in ONE_RANK.items():
        os.environ.setdefault(name, value)
    sys.path.append(str(Path(script).resolve().parent))
    cpu_host.enable()
    with contextlib.ExitStack() as stack:
        stack.callback(cpu_host.disable)
        for owner, name, value in _answers():
            stack.enter_context(mock.patch.object(owner, name, value))
        command = [str(script), *arguments, "--distributed-backend", "gloo"]
        stack.enter_context(mock.patch.object(sys, "argv", command))
        stack.enter_context(cpu_host.CudaLiterals())
        runpy.run_path(str(script), run_name="__main__")


def _answers():
    """What ``megatron.training`` asks of CUDA and of a compiler, and the CPU's answers."""
    import megatron.core.datasets.utils as datasets
    import megatron.training.training as training

    initialize = functools.partial(training.initialize_megatron, allow_no_cuda=True)
    return [
        (training, "initialize_megatron", initialize),
        (datasets, "compile_helpers", lambda: None),  # a wheel of megatron-core has them
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "set_device", lambda device: None),
        (torch.cuda, "Stream", cpu_host.Stream),
        (torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
        (torch.cuda, "memory_stats", lambda device=None: {}),
    ]


if __name__ == "__main__":
    launch(sys.argv[1], sys.argv[2:])
