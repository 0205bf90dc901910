"""docs/performance.md says what the benchmarks measured."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_table_is_that_of_the_record():
    pytest.importorskip("triton", reason="benchmarks/kernels.py imports the kernels")
    records = "docs/kernels.json", "docs/kernels-tilelang.json"
    command = [sys.executable, "benchmarks/kernels.py", "--table", *records]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed.strip().startswith("| |")
    assert printed.strip() in (ROOT / "docs" / "performance.md").read_text()
