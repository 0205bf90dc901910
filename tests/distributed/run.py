"""Every case in worlds of real processes on this machine.

    python -m tests.distributed.run

Prints one JSON object: case -> the worst that any rank found.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.distributed.cases import CHECKPOINT, Case, worlds_of

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 900


def world(
    size: int, folder: Path, worker: str = "tests.distributed.worker", **env: str
) -> list[dict]:
    """What each rank of one world found: it runs ``worker`` with its rank, the size and the folder,
    and writes ``SIZE-RANK.json``.

    Raises:
        RuntimeError: a rank died or took too long; its output is in the message.
    """
    command = [sys.executable, "-W", "ignore", "-m", worker]
    (folder / f"store-{size}").unlink(missing_ok=True)
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        ranks = [
            subprocess.Popen(
                [*command, str(rank), str(size), str(folder)],
                cwd=ROOT,
                env={**_environment(folder), **env},
                stdout=output,
                stderr=output,
            )
            for rank in range(size)
        ]
        try:
            deadline = time.monotonic() + TIMEOUT_S
            codes = [rank.wait(max(1, deadline - time.monotonic())) for rank in ranks]
        except subprocess.TimeoutExpired:
            codes = ["timeout"]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        output.seek(0)
        if any(codes):
            raise RuntimeError(f"world of {size}, exit codes {codes}:\n{output.read()[-6000:]}")
    print(f"world of {size}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return [json.loads((folder / f"{size}-{rank}.json").read_text()) for rank in range(size)]


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


def everything(folder: Path, cases: list[Case]) -> dict[str, dict]:
    """Case -> the worst that any rank found."""
    write_cases(folder, cases)
    found = {}
    for size in sorted({1, CHECKPOINT.world} | {case.world for case in cases}):
        ranks = world(size, folder)
        if size > 1:
            found.update({name: _worst([rank[name] for rank in ranks]) for name in ranks[0]})
    # Alone once more: to load what the others saved.
    write_cases(folder, [])
    shutil.rmtree(folder / "checkpoint-1")
    (alone,) = world(1, folder)
    found[f"load {CHECKPOINT.world}"] = alone[f"load {CHECKPOINT.world}"]
    return found


def _worst(ranks: list) -> dict:
    """One result for all ranks: the largest error, and whether all agree on the rest."""
    if not isinstance(ranks[0], dict):
        return {"same": len(set(map(str, ranks))) == 1, "says": ranks[0]}
    for rank in ranks:
        if "error" in rank:
            return rank
    worst = dict(ranks[0])
    for key in ("loss", "gradients", "logged"):
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
    from tests.distributed.cases import CASES

    with tempfile.TemporaryDirectory() as directory:
        print(json.dumps(everything(Path(directory), list(CASES))))
