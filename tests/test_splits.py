"""What benchmarks/multi_gpu.py is made of, without a GPU."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from splits import phases  # noqa: E402
from splits.phases import Event  # noqa: E402

MS = 10**6


def kernel(name, start, end, stream=7):
    return Event(name, start * MS, end * MS, True, stream)


def call(name, start):
    return Event(name, start * MS, start * MS + 1, False)


@pytest.mark.parametrize(
    ("spans", "others", "left"),
    [
        ([], [], 0),
        ([(0, 10)], [], 10),
        ([(0, 10), (5, 12), (12, 13), (20, 21)], [], 14),
        ([(0, 10)], [(0, 10)], 0),
        ([(0, 10), (20, 30)], [(5, 25)], 10),
        ([(5, 6)], [(0, 10), (2, 3)], 0),
        ([(0, 10), (0, 10)], [(3, 4), (3, 5), (9, 40)], 7),
    ],
)
def test_what_intervals_cover_without_others(spans, others, left):
    assert phases.without(spans, others) == left


def test_a_step_is_broken_down():
    mark, nccl = "at::cuda::spin_kernel(long)", "ncclDevKernel_AllGather_RING_LL"
    events = [
        kernel("forward", 0, 4),
        kernel("nvjet_tst_128x64", 4, 6),
        kernel("scores", 6, 7),
        kernel(mark, 8, 8),
        kernel("nvjet_tst_128x64", 8, 11),
        kernel(nccl, 9, 14, stream=20),
        kernel(mark, 11, 11),
        kernel("Memcpy DtoD", 13, 16),
        kernel(nccl, 20, 22, stream=20),
        *(call("cudaLaunchKernel", start) for start in (0, 1, 2, 3)),
        call("cuLaunchKernelEx", 12),
        call("cudaStreamSynchronize", 5),
        call("cudaEventQuery", 6),
        call("cudaDeviceSynchronize", 22),  # the profiler's own, at the end
    ]
    assert phases.breakdown(events[::-1], wall=25.0) == {
        "communication ms": 7.0,
        "attention ms": 4.0,
        "selection ms": 1.0,
        "experts ms": 3.0,
        "products ms": 2.0,
        "rest ms": 3.0,
        "exposed communication ms": 4.0,
        "idle ms": 8.0,
        "launches": 3,
        "host waits": 1,
    }


def launched(folder):
    """Names of the kernels of an operation: functions for a GPU that no other one calls."""
    functions, called = set(), set()
    for path in (BENCHMARKS.parent / "glm5_patch" / "ops" / folder).rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and is_for_a_gpu(function):
                functions.add(function.name)
                calls = (node.func for node in ast.walk(function) if isinstance(node, ast.Call))
                called.update(name.id for name in calls if isinstance(name, ast.Name))
    return {name for name in functions - called if not name.startswith("_")}


def is_for_a_gpu(function):
    names = (node.func if isinstance(node, ast.Call) else node for node in function.decorator_list)
    return any(isinstance(name, ast.Attribute) and name.attr == "jit" for name in names)


def test_products_of_experts_may_run_in_several_streams():
    mark = "at::cuda::spin_kernel(long)"
    events = [
        kernel(mark, 0, 0),
        kernel("nvjet_tst_128x64", 0, 3, stream=21),
        kernel("Memcpy DtoH", 1, 2, stream=22),
        kernel(mark, 4, 4),
        kernel("nvjet_tst_128x64", 5, 6, stream=21),
    ]
    found = phases.breakdown(events, wall=6.0)
    assert (found["experts ms"], found["products ms"], found["rest ms"]) == (3.0, 1.0, 1.0)


def test_ranks_are_averaged_and_the_busiest_is_named():
    first = {"communication ms": 9.0, "attention ms": 4.0, "rest ms": 1.0, "launches": 10}
    second = {"communication ms": 1.0, "attention ms": 6.0, "experts ms": 3.0, "rest ms": 2.0}
    second["launches"] = 11
    for ranks in ([first, second], [second, first]):
        assert phases.of_ranks(ranks) == {
            "communication ms": 5.0,
            "attention ms": 5.0,
            "experts ms": 1.5,
            "rest ms": 1.5,
            "launches": 10.5,
            "most work of a rank ms": 11.0,
        }


@pytest.mark.parametrize(
    ("folder", "phase", "some"),
    [
        ("sparse_attention", "attention", {"forward", "backward", "union_backward"}),
        ("rotation", "attention", {"rotate"}),
        ("index_topk", "selection", {"scores", "candidates"}),
        ("quantization", "selection", {"quantize"}),
        ("index_loss", "selection", {"loss"}),
    ],
)
def test_every_kernel_of_attention_and_selection_has_a_phase(folder, phase, some):
    names = launched(folder)
    assert some <= names
    for name in names:
        assert phases.breakdown([kernel(name, 0, 1)], wall=1.0)[f"{phase} ms"] == 1.0, name


def test_without_marks_no_kernel_is_the_experts():
    found = phases.breakdown([kernel("nvjet_tst_128x64", 0, 3)], wall=3.0)
    assert found["products ms"] == 3.0 and "experts ms" not in found


def test_experts_are_marked_in_pairs_in_recomputes_too():
    linear = torch.nn.Linear(2, 2)
    order = []
    x = torch.ones(1, 2, requires_grad=True)
    with phases.marked([linear], lambda: order.append(len(order))):
        y = torch.utils.checkpoint.checkpoint(linear, x, use_reentrant=True)
        assert len(order) == 2
        y.register_hook(lambda grad: order.append("between"))
        y.sum().backward()
    assert order == [0, 1, "between", 3, 4, 5, 6]
    linear(x).sum().backward()
    assert len(order) == 7


FAILING = """
import json
from pathlib import Path

import torch
from splits.ranks import Ranks

ranks = Ranks(on_gpu=False)

def run(fails):
    for step in range(3):
        if step == 1 and ranks.rank == fails:
            raise torch.OutOfMemoryError("no memory")
        torch.distributed.all_reduce(torch.ones(4))

found = [ranks.attempt(lambda: run(fails)) for fails in (1, None, 0)]
Path(__file__).with_name(f"{ranks.rank}.json").write_text(json.dumps(found))
"""


@pytest.mark.nightly
def test_a_rank_that_fails_ends_the_attempt_for_all_and_no_other(tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, str(tmp_path / "failing.py")],
        env={**os.environ, "PYTHONPATH": str(BENCHMARKS), "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    said = "OutOfMemoryError: no memory"
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == [f"rank 1: {said}", None, f"rank 0: {said}"]
