"""Random sequences of what a process may do to the machine, each in fresh processes.

After each step every place of every toy host is wrapped once or not at all, as the last switch
says, and the status agrees. Switched off, every attribute of a real host is the identical original.
"""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.activation.fresh import environment

STEPS = ("enable", "disable", "import", "reload", "anew", "switch", "ask", "threads")
RUN = [sys.executable, "-W", "ignore", "-m", "tests.activation.sequence"]
ROOT = Path(__file__).parents[2]


def run(*arguments):
    result = subprocess.run(
        [*RUN, *map(str, arguments)],
        cwd=ROOT,
        env=environment(TORCH_DEVICE_BACKEND_AUTOLOAD="0"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("seed", range(12))
def test_toy_hosts(tmp_path, seed):
    steps = random.Random(seed).choices(STEPS, k=40)
    run("toys", tmp_path, seed, *steps)


@pytest.mark.nightly  # the orders of imports are tested on real hosts
def test_real_hosts():
    """Without reloads and imports anew, which megatron-core itself does not survive."""
    steps = [
        step for step in random.Random(0).choices(STEPS, k=40) if step not in ("reload", "anew")
    ]
    run("real", "-", 0, *steps)
