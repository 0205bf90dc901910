"""docs/performance.md says what the benchmarks measured."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_table_is_that_of_the_record():
    pytest.importorskip("triton", reason="benchmarks/kernels.py imports the kernels")
    from benchmarks import kernels

    found = json.loads((ROOT / "docs" / "kernels.json").read_text())
    assert kernels.table(found) in (ROOT / "docs" / "performance.md").read_text()
