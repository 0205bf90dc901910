"""Faults that the tests must catch, put one by one into a copy of the tree.

    python -m tests.mutation [-k WORDS] [-j JOBS]

By hand after a change of tests or of what they test, and nightly: about 15 s for each fault. Prints
a line for each, and exits with 1 if one survives its test, or can't be put in any more because its
text is gone: then the fault moves with the code. A new kind of fault that a reviewer finds gets a
line in ``faults``, after the test that catches it. The tree itself is never changed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from tests.mutation.faults import FAULTS, Fault

ROOT = Path(__file__).parents[2]


def copy_of_the_tree(folder: Path) -> Path:
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def pytest_in(tree: Path, tests: list[str]) -> tuple[int, str]:
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n0"]
    path = os.pathsep.join([str(tree), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([*command, *tests], cwd=tree, env=env, capture_output=True, text=True)
    return done.returncode, (done.stdout + done.stderr)[-3000:]


def why_it_does_not_apply(fault: Fault) -> str | None:
    path = ROOT / "glm5_patch" / fault.file
    if not path.is_file():
        return f"no file glm5_patch/{fault.file}"
    count = path.read_text().count(fault.old)
    return None if count == 1 else f"{count} times in glm5_patch/{fault.file}: {fault.old!r}"


def outcome(fault: Fault, tree: Path) -> tuple[str, str]:
    """("caught" or what went wrong, pytest's last lines)."""
    path = tree / "glm5_patch" / fault.file
    right = path.read_text()
    path.write_text(right.replace(fault.old, fault.new))
    try:
        code, text = pytest_in(tree, [fault.test])
    finally:
        path.write_text(right)
    return {0: "SURVIVED", 1: "caught"}.get(code, f"NOT RUN, pytest's exit code {code}"), text


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("-k", default="", help="only faults with these words in their name or file")
    parser.add_argument("-j", type=int, default=1, help="how many at once")
    options = parser.parse_args()
    faults = [f for f in FAULTS if options.k in f"{f.name} {f.file}"]
    missing = {fault.name: why for fault in faults if (why := why_it_does_not_apply(fault))}
    for name, why in missing.items():
        print(f"GONE      {name}: {why}", flush=True)
    faults = [fault for fault in faults if fault.name not in missing]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.j) as pool:
        trees: SimpleQueue[Path] = SimpleQueue()
        for number in range(options.j):
            trees.put(copy_of_the_tree(Path(folder, str(number))))
        tree = trees.get()
        print("without a fault ...", flush=True)
        code, text = pytest_in(tree, sorted({fault.test for fault in faults}))
        trees.put(tree)
        if code:
            print(f"{text}\nthe tests fail without a fault, exit code {code}")
            return 1

        def timed(fault: Fault) -> tuple[str, str]:
            tree, start = trees.get(), time.perf_counter()
            found, text = outcome(fault, tree)
            trees.put(tree)
            print(f"{found:9} {fault.name} ({time.perf_counter() - start:.0f} s)", flush=True)
            return found, text

        results = list(pool.map(timed, faults))
    wrong = [(f, r) for f, r in zip(faults, results) if r[0] != "caught"]
    for fault, (found, text) in wrong:
        if found != "SURVIVED":
            print(f"\n{fault.name}:\n{text}")
    print(f"\n{len(results) - len(wrong)} caught, {len(wrong)} not, {len(missing)} gone")
    return 1 if wrong or missing else 0


if __name__ == "__main__":
    sys.exit(main())
