"""The figures of docs/hosts.md, measured again on the core at hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")


def measured(*options):
    command = [sys.executable, "-W", "ignore", "-m", "tests.hosts.figures", "--seeds", "1"]
    done = subprocess.run(
        [*command, *options], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])["figures"]


def test_this_core_is_right_when_patched():
    for row in measured().values():
        assert row["same_input"] == row["end_to_end"] == 1
        assert row["logits"] <= 2e-5
        assert row["gradients"] <= 6e-6
        assert row["recompute"] == 0


def test_this_core_is_wrong_as_released():
    """So the figures can fail, and a release that is right one day is noticed."""
    found = measured("--released")
    if found["5.2"] is None:
        assert found["5.1"]["same_input"] < 0.65
    else:
        assert found["5.2"]["recompute"] > 0.5
