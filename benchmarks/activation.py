"""What the plugin costs a Python process: start-up without torch, and ``import torch``.

    python benchmarks/activation.py [--runs 15]

Each figure is the median of fresh processes; on and off alternate, so drift hits both.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

CASES = {"python -c pass": "pass", "import torch": "import torch"}
BOUND_MS = 10


def milliseconds(code: str, switch: str) -> float:
    environment = {**os.environ, "GLM5_PATCH": switch}
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    return (time.perf_counter() - start) * 1e3


def inside_ms() -> float:
    """The entry point alone, timed in the process that has just imported torch."""
    code = (
        "import os, time; os.environ['GLM5_PATCH'] = '0'; import torch; "
        "os.environ['GLM5_PATCH'] = '1'; from glm5_patch._autoload import activate; "
        "start = time.perf_counter(); activate(); print((time.perf_counter() - start) * 1e3)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    return float(result.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    for name, code in CASES.items():
        times: dict[str, list[float]] = {"0": [], "1": []}
        for _ in range(runs):
            for switch, found in times.items():
                found.append(milliseconds(code, switch))
        off, on = (statistics.median(times[s]) for s in ("0", "1"))
        print(f"{name:16} off {off:7.1f} ms, on {on:7.1f} ms, difference {on - off:+.1f} ms")
    cost = statistics.median(inside_ms() for _ in range(runs))
    print(f"{'entry point':16} {cost:.1f} ms of import torch (bound {BOUND_MS} ms)")
    return int(cost > BOUND_MS)


if __name__ == "__main__":
    sys.exit(main())
