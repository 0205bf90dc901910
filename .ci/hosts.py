"""The tests that touch a host, on every megatron-core release line, each in a folder of its own.

    python .ci/hosts.py INTERPRETER=RELEASE[,RELEASE...] ...

INTERPRETER is the python of an environment that has torch and the test dependencies. A release that
can't be installed counts as a failure. Prints a line for each host and a table at the end.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = ["tests/patches", "tests/core", "tests/model/test_indexer_loss.py"]
ROOT = Path(__file__).resolve().parents[1]


def install(python: str, release: str, folder: Path) -> None:
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder),
         f"megatron-core=={release}"],
        check=True,
    )


def run(python: str, release: str) -> dict[str, int]:
    with tempfile.TemporaryDirectory(prefix=f"mcore-{release}-") as folder:
        try:
            install(python, release, Path(folder))
        except subprocess.CalledProcessError:
            return {"failed": 1}
        result = subprocess.run(
            [python, "-m", "pytest", "-q", "-n", "auto", "-p", "no:cacheprovider", *TESTS],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": folder},
            capture_output=True,
            text=True,
        )
    lines = result.stdout.strip().splitlines()
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|error|skipped)",
                                                     lines[-1] if lines else "")}
    for line in lines:
        if line.startswith(("FAILED", "ERROR", "SKIPPED")):
            print("   ", line[:200])
    if result.returncode and not counts.get("failed"):
        print(result.stdout[-2000:], result.stderr[-2000:])
        counts["failed"] = counts.get("error", 1)
    return counts


def main(arguments: list[str]) -> int:
    hosts = [
        (python, release)
        for python, releases in (argument.split("=", 1) for argument in arguments)
        for release in releases.split(",")
    ]
    table = {}
    for number, (python, release) in enumerate(hosts, 1):
        print(f"[{number}/{len(hosts)}] megatron-core {release}", flush=True)
        start = time.perf_counter()
        table[release] = {**run(python, release), "seconds": round(time.perf_counter() - start)}
        print("   ", table[release], flush=True)
    columns = ("passed", "failed", "skipped", "seconds")
    print(f"\n{'megatron-core':24}", *(f"{column:>8}" for column in columns))
    for release, counts in table.items():
        print(f"{release:24}", *(f"{counts.get(column, 0):8}" for column in columns))
    passed, failed = (sum(c.get(k, 0) for c in table.values()) for k in ("passed", "failed"))
    print(f"hosts: {passed} passed, {failed} failed")
    return int(failed > 0 or passed == 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
