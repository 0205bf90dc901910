"""The tests that touch a host, on every release line of it, each in a folder of its own.

    python .ci/hosts.py INTERPRETER=PACKAGE==RELEASE[,PACKAGE==RELEASE...] ...

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

TESTS = {
    "megatron-core": ["tests/patches", "tests/core", "tests/model/test_indexer_loss.py"],
    "transformers": ["tests/patches/test_hf_config.py"],
}
# transformers brings tokenizers of the version it insists on; megatron-core's needs are all there.
PIP_OPTIONS = {"megatron-core": ["--no-deps"], "transformers": []}
ROOT = Path(__file__).resolve().parents[1]


def install(python: str, requirement: str, folder: str) -> None:
    options = PIP_OPTIONS[requirement.partition("==")[0]]
    command = [python, "-m", "pip", "install", "-q", *options, "--target", folder, requirement]
    subprocess.run(command, check=True)


def environment(python: str, folder: str) -> dict[str, str]:
    """megatron-core 0.17 and later compile a C++ extension with ninja while they recompute; a build
    folder of its own keeps a lock that another, killed process left from blocking this one."""
    return {
        **os.environ,
        "PYTHONPATH": folder,
        "PATH": os.pathsep.join((os.path.dirname(os.path.abspath(python)), os.environ["PATH"])),
        "TORCH_EXTENSIONS_DIR": os.path.join(folder, "torch_extensions"),
    }


def run(python: str, requirement: str) -> dict[str, int]:
    """Install one host and run its tests; the counts of pytest's last line."""
    with tempfile.TemporaryDirectory(prefix=f"{requirement}-") as folder:
        try:
            install(python, requirement, folder)
        except subprocess.CalledProcessError:
            return {"failed": 1}
        tests = TESTS[requirement.partition("==")[0]]
        result = subprocess.run(
            [python, "-m", "pytest", "-q", "-n", "auto", "-p", "no:cacheprovider", *tests],
            cwd=ROOT,
            env=environment(python, folder),
            capture_output=True,
            text=True,
        )
    lines = result.stdout.strip().splitlines()
    counts = {
        kind: int(n)
        for n, kind in re.findall(
            r"(\d+) (passed|failed|error|skipped)", lines[-1] if lines else ""
        )
    }
    for line in lines:
        if line.startswith(("FAILED", "ERROR", "SKIPPED")):
            print("   ", line[:200])
    if result.returncode and not counts.get("failed"):
        print(result.stdout[-2000:], result.stderr[-2000:])
        counts["failed"] = counts.get("error", 1)
    return counts


def main(arguments: list[str]) -> int:
    hosts = [
        (python, requirement)
        for python, requirements in (argument.split("=", 1) for argument in arguments)
        for requirement in requirements.split(",")
    ]
    table = {}
    for number, (python, requirement) in enumerate(hosts, 1):
        print(f"[{number}/{len(hosts)}] {requirement}", flush=True)
        start = time.perf_counter()
        counts = run(python, requirement)
        table[requirement] = {**counts, "seconds": round(time.perf_counter() - start)}
        print("   ", table[requirement], flush=True)
    columns = ("passed", "failed", "skipped", "seconds")
    print(f"\n{'host':24}", *(f"{column:>8}" for column in columns))
    for requirement, counts in table.items():
        print(f"{requirement:24}", *(f"{counts.get(column, 0):8}" for column in columns))
    passed, failed = (sum(c.get(k, 0) for c in table.values()) for k in ("passed", "failed"))
    print(f"hosts: {passed} passed, {failed} failed")
    return int(failed > 0 or passed == 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
