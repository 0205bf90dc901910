"""Worlds of real processes, forked from this one once it has imported what each rank runs. Where
there is CUDA, which no fork can use, each rank imports it again.

    python -m tests.distributed.forks WORKER FOLDER

Each line of stdin is the size of a world, whose ranks each run ``WORKER.main(rank, size, FOLDER)``.
The answer is a line on stdout, the exit codes of the ranks. What they print goes to stderr.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import traceback
from pathlib import Path

import torch


def forked(function, *args) -> int:
    """The id of a child that runs a function and exits with 0, or with 1 if it raises."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        function(*args)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def started(*command: str) -> int:
    """The id of a process of its own."""
    return os.posix_spawn(sys.executable, [sys.executable, "-W", "ignore", *command], os.environ)


def main(worker: str, folder: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module = importlib.import_module(worker)
    gc.freeze()  # each rank collects after each case: not what has been imported
    for line in sys.stdin:
        size = int(line)
        if torch.cuda.is_available():
            command = "-m", "tests.distributed.forks", worker, folder
            ranks = [started(*command, str(rank), str(size)) for rank in range(size)]
        else:
            ranks = [forked(module.main, rank, size, Path(folder)) for rank in range(size)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
        print(json.dumps(codes), file=answers, flush=True)


if __name__ == "__main__":
    worker, folder, *rank_and_size = sys.argv[1:]
    if rank_and_size:
        importlib.import_module(worker).main(*map(int, rank_and_size), Path(folder))
    else:
        main(worker, folder)
