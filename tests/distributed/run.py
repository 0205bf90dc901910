"""Every case in worlds of real processes on this machine.

    python -m tests.distributed.run

Prints one JSON object: case -> the worst that any rank found.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from tests.distributed.cases import Case, worlds_of

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 900


class Worlds:
    """Worlds one after the other in one folder; each rank writes ``SIZE-RANK.json`` there.

    Args:
        folder: what the worker reads and writes.
        worker: the module whose ``main(rank, size, folder)`` each rank runs.
        env: variables of all ranks.
    """

    def __init__(self, folder: Path, worker: str = "tests.distributed.worker", **env: str):
        self.folder, self.worker, self.env = folder, worker, env

    def __enter__(self) -> Worlds:
        self._output = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.distributed.forks"]
            + [self.worker, str(self.folder)],
            cwd=ROOT,
            env={**_environment(self.folder), **self.env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._output,
            text=True,
            start_new_session=True,  # so that all ranks can be killed
        )
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()
        self._output.close()

    def run(self, size: int) -> list[dict]:
        """What each rank of one world found.

        Raises:
            RuntimeError: a rank died or took too long; its output is in the message.
        """
        (self.folder / f"store-{size}").unlink(missing_ok=True)
        start = time.perf_counter()
        codes = self._exit_codes(size)
        if codes != [0] * size:
            self._output.seek(0)
            says = self._output.read()[-6000:]
            raise RuntimeError(f"world of {size}, exit codes {codes}:\n{says}")
        print(f"world of {size}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        return [
            json.loads((self.folder / f"{size}-{rank}.json").read_text()) for rank in range(size)
        ]

    def _exit_codes(self, size: int) -> list[int] | str:
        with contextlib.suppress(BrokenPipeError):  # it could not import the worker
            self._process.stdin.write(f"{size}\n")
            self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], TIMEOUT_S)[0]:
            return "timeout"
        answer = self._process.stdout.readline()
        return json.loads(answer) if answer else "none"


def world(size: int, folder: Path, worker: str = "tests.distributed.worker", **env: str):
    """One world alone; see ``Worlds.run``."""
    with Worlds(folder, worker, **env) as worlds:
        return worlds.run(size)


def _environment(folder: Path) -> dict[str, str]:
    """megatron-core 0.17 on compiles a C++ extension for selective recompute; in the usual folder
    a lock that a killed process left behind would block all ranks."""
    return {
        "TORCH_EXTENSIONS_DIR": str(folder / "torch_extensions"),
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }


def write_cases(folder: Path, cases: list[Case]) -> None:
    (folder / "cases.json").write_text(json.dumps(worlds_of(cases)))


def write_files(folder: Path, files: dict[str, tuple[Case, ...]]) -> None:
    """``tests.distributed.files.Files``, by its fields."""
    written = {kind: [asdict(case) for case in some] for kind, some in files.items()}
    (folder / "files.json").write_text(json.dumps(written))


def everything(folder: Path, cases: list[Case], files: dict[str, tuple[Case, ...]]) -> dict:
    """What is done -> the worst that any rank found.

    Args:
        folder: for what the worlds write.
        cases: the steps.
        files: as of ``write_files``.
    """
    checkpoints = files["checkpoints"]
    sizes = {case.world for case in (*cases, *itertools.chain(*files.values()))}
    found = {}
    with Worlds(folder) as worlds:
        write_cases(folder, cases)
        write_files(folder, files)
        for size in sorted({1} | sizes):
            ranks = worlds.run(size)
            if size > 1:
                found.update({name: _worst([rank[name] for rank in ranks]) for name in ranks[0]})
        # All but the one that came last once more: to load what later ones saved.
        write_cases(folder, [])
        write_files(folder, {"checkpoints": checkpoints})
        for size in sorted(set(sorted(case.world for case in checkpoints)[:-1])):
            ranks = worlds.run(size)
            found.update({name: _worst([rank[name] for rank in ranks]) for name in ranks[0]})
    return found


def _worst(ranks: list) -> dict:
    """One result for all ranks: the largest error, and whether all agree on the rest."""
    if not isinstance(ranks[0], dict):
        return {"same": len(set(map(str, ranks))) == 1, "says": ranks[0]}
    for rank in ranks:
        if "error" in rank:
            return rank
    worst = dict(ranks[0])
    for key in ("loss", "gradients", "logged", "figures"):
        if key in worst:
            worst[key] = max(rank[key] for rank in ranks)
    if "worst" in worst:
        worst["worst"] = max((rank["worst"] for rank in ranks), key=lambda pair: pair[1])
    if "topk_equal" in worst:
        worst["topk_equal"] = all(rank["topk_equal"] for rank in ranks)
    for key in ("computing", "differ"):
        if key in worst:
            worst[key] = sorted({item for rank in ranks for item in rank[key]})
    return worst


if __name__ == "__main__":
    from tests.distributed.cases import CASES, FILES

    with tempfile.TemporaryDirectory() as directory:
        print(json.dumps(everything(Path(directory), list(CASES), FILES)))
