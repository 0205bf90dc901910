"""docs/performance.md says what the benchmarks measured."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]


def test_the_table_is_that_of_the_record():
    pytest.importorskip("triton", reason="benchmarks/kernels.py imports the kernels")
    records = [f"docs/kernels{run}.json" for run in ("", "-libraries", "-tilelang")]
    command = [sys.executable, "benchmarks/kernels.py", "--table", *records]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed.strip().startswith("| |")
    assert printed.strip() in (ROOT / "docs" / "performance.md").read_text()


@pytest.mark.nightly
def test_the_longest_step_runs_and_its_core_is_right():
    pytest.importorskip("triton", reason="benchmarks/long.py runs the kernels")
    given = "--device cpu --length 21 --layers 4 --steps 1 --offload".split()
    command = [sys.executable, "benchmarks/long.py", *given]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    summary, *errors = ran.stdout.splitlines()
    assert summary.startswith("21 tokens, 4 dense layers (FFFS), full recompute: loss ")
    assert len(errors) == 10 and all(float(line.split()[-1]) < 1e-5 for line in errors)


def test_what_a_long_step_keeps_elsewhere_changes_no_gradient(world, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    long = importlib.import_module("long")
    found = []
    for spared in (False, True):
        options = SimpleNamespace(device="cpu", layers=7, offload=spared)
        torch.manual_seed(0)
        model = long.build(long.config_of(options), options, torch.float32)
        loss = long.step(model, 40, options)["loss"]
        found.append((loss, {name: p.grad for name, p in model.named_parameters()}))
    (loss, plain), (same_loss, spared) = found
    assert loss == same_loss
    for name, gradient in plain.items():
        same = spared[name] is gradient is None or torch.equal(spared[name], gradient)
        assert same, name


@pytest.mark.nightly
def test_nothing_as_wide_as_the_latent_is_alive_for_all_tokens():
    command = [sys.executable, "benchmarks/alive.py", *"--layers 1 --length 200000".split()]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "[200000, 24576]" in printed  # the MLP's own
    assert "64, 576]" not in printed and "64, 512]" not in printed
