"""Faults that the tests must catch, put one by one into a copy of the tree.

    python -m tests.mutation [-k WORDS] [-j JOBS]

By hand after a change of tests or of what they test, and nightly: about 15 s for each fault. Prints
a line for each, and exits with 1 if one survives its test, or can't be put in any more because its
text is gone: then the fault moves with the code. A new kind of fault that a reviewer finds gets a
line here, after the test that catches it. The tree itself is never changed.
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
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).parents[1]
PARITY = "tests/patches/test_parity.py::test_topk_logits_and_gradients_equal_hugging_face"
FIRST_PARITY = f"{PARITY}[0-5.2]"
INDEXER = "tests/attention/test_indexer.py"
RECOMPUTE = "tests/patches/test_recompute.py"
SPLITS = "tests/distributed/test_parallel.py"
BACKENDS = "tests/ops/test_registry.py::test_a_backend_computes_what_the_reference_does"
MTP = "tests/checkpoint/test_checkpoint.py::test_an_mtp_layer_is_loaded_under_its_published_names"


@dataclass(frozen=True)
class Fault:
    """``old`` must occur exactly once in ``glm5_patch/file``."""

    name: str
    file: str
    old: str
    new: str
    test: str
    """What pytest is given; it passes without the fault and fails with it."""


FAULTS = (
    Fault(
        "k_norm has the epsilon of the other norms",
        "attention/indexer.py",
        "eps=config.dsa_indexer_k_norm_epsilon,",
        "eps=config.layernorm_epsilon,",
        FIRST_PARITY,
    ),
    Fault(
        "the rotary dimensions of the indexer come last",
        "attention/indexer.py",
        "rope, nope = tensor.split([rope_dim, self.index_head_dim - rope_dim], dim=-1)",
        "nope, rope = tensor.split([self.index_head_dim - rope_dim, rope_dim], dim=-1)",
        FIRST_PARITY,
    ),
    Fault(
        "the weights of the indexer are scaled by its width and not by its heads",
        "attention/indexer.py",
        "weights = weights * self.index_n_heads**-0.5",
        "weights = weights * self.index_head_dim**-0.5",
        f"{INDEXER}::test_the_logged_loss_and_its_gradients_are_those_of_the_definition",
    ),
    Fault(
        "no relu on the index scores",
        "ops/index_topk/reference.py",
        "per_head.mul_(scale).relu_()",
        "per_head.mul_(scale)",
        FIRST_PARITY,
    ),
    Fault(
        "empty places of a top-k name the first key",
        "ops/index_topk/reference.py",
        'local.masked_fill(values == float("-inf"), -1).int()',
        'local.masked_fill(values == float("-inf"), 0).int()',
        "tests/patches/test_parity.py::test_short_rows_select_exactly_what_they_see",
    ),
    Fault(
        "equal scores always fall to the first keys",
        "ops/index_topk/reference.py",
        "if torch.are_deterministic_algorithms_enabled():",
        "if True:",
        f"{INDEXER}::test_equal_scores_fall_as_in_hugging_face",
    ),
    Fault(
        "nobody selects where one key too many is visible",
        "ops/query_positions.py",
        "return self.most_keys <= index_topk",
        "return self.most_keys <= index_topk + 1",
        f"{INDEXER}::test_with_one_key_more_than_the_top_k_one_is_left_out",
    ),
    Fault(
        "documents of a pack see each other",
        "ops/query_positions.py",
        "return (keys <= places) & (keys >= queries.starts[block, None])",
        "return (keys <= places)",
        f"{RECOMPUTE}::test_a_pack_equals_its_documents_one_by_one",
    ),
    Fault(
        "the attention kernel sees its first tile of keys alone",
        "ops/sparse_attention/triton_kernels.py",
        "out_1 = tl.zeros([HEADS, HALF], tl.float32)\n    for first in tl.range(0, count, KEYS,",
        "out_1 = tl.zeros([HEADS, HALF], tl.float32)\n    for first in tl.range(0, KEYS, KEYS,",
        BACKENDS,
    ),
    Fault(
        "the loss kernel normalises over its first tile of keys alone",
        "ops/index_loss/triton_kernels.py",
        "total = tl.zeros([HEADS], tl.float32)\n    for first in range(0, count, KEYS):",
        "total = tl.zeros([HEADS], tl.float32)\n    for first in range(0, KEYS, KEYS):",
        BACKENDS,
    ),
    Fault(
        "the logged loss is another than the one that trains",
        "attention/attention.py",
        "loss=loss, layer_number",
        "loss=loss * 2, layer_number",
        f"{INDEXER}::test_the_logged_loss_and_its_gradients_are_those_of_the_definition",
    ),
    Fault(
        "the indexer's loss is a sum over the batch",
        "ops/index_loss/operation.py",
        "coefficient / (s * b)",
        "coefficient / s",
        f"{INDEXER}::test_the_logged_loss_and_its_gradients_are_those_of_the_definition",
    ),
    Fault(
        "the scale of the routed experts is left at a default",
        "config/huggingface.py",
        '"moe_router_topk_scaling_factor": self.routed_scaling_factor,',
        '"moe_router_topk_scaling_factor": 2.5,',
        FIRST_PARITY,
    ),
    Fault(
        "the epsilon of the norms is left at a default",
        "config/huggingface.py",
        '"layernorm_epsilon": self.rms_norm_eps,',
        '"layernorm_epsilon": 1e-5,',
        FIRST_PARITY,
    ),
    Fault(
        "shared experts count once",
        "config/huggingface.py",
        "* self.n_shared_experts,",
        "* 1,",
        FIRST_PARITY,
    ),
    Fault(
        "the offset of the schedule counts from zero",
        "config/schedule.py",
        "max(n - offset, 0) % freq == 0",
        "max(n - 1 - offset, 0) % freq == 0",
        "tests/config/test_schedule.py",
    ),
    Fault(
        "a convention of GLM-5's by another default",
        "config/fields.py",
        '"dsa_indexer_rope_interleaved": True,',
        '"dsa_indexer_rope_interleaved": False,',
        "tests/patches/test_config_fields.py",
    ),
    Fault(
        "a stage may start on a skip layer",
        "config/pipeline_split.py",
        "if source in chunk:",
        "if True:",
        "tests/config/test_pipeline_split.py",
    ),
    Fault(
        "the plan's last stage has the first one's layers",
        "tools/plan.py",
        '"--decoder-last-pipeline-num-layers": sizes[-1],',
        '"--decoder-last-pipeline-num-layers": sizes[0],',
        "tests/patches/test_plans.py::test_plans_are_ranked_and_two_numbers_are_offered_too",
    ),
    Fault(
        "the plan forgets the output layer",
        "tools/plan.py",
        "after=costs.output + ",
        "after=0.0 + ",
        "tests/config/test_costs.py",
    ),
    Fault(
        "the plan counts all experts as active",
        "config/costs.py",
        "experts = hf.num_experts_per_tok + hf.n_shared_experts",
        "experts = hf.n_routed_experts + hf.n_shared_experts",
        "tests/config/test_costs.py",
    ),
    Fault(
        "a computing layer scores every key twice",
        "config/costs.py",
        "+ index_width * visible",
        "+ index_width * seq_length",
        "tests/config/test_costs.py",
    ),
    Fault(
        "enorm and hnorm of MTP are exchanged",
        "checkpoint/names.py",
        '"enorm.weight": ("enorm.weight",),\n    "hnorm.weight": ("hnorm.weight",),',
        '"enorm.weight": ("hnorm.weight",),\n    "hnorm.weight": ("enorm.weight",),',
        MTP,
    ),
    Fault(
        "a half-written file of a conversion counts as done",
        "checkpoint/staging.py",
        'unfinished = self.partial / ".unfinished"',
        "unfinished = self.partial / name",
        "tests/checkpoint/test_indexer_order.py",
    ),
    Fault(
        "a recompute takes the top-k of whichever forward ran last",
        "topk/carrier.py",
        "with open_carrier(carrier):\n                return function",
        "with open_carrier(_current.get() or carrier):\n                return function",
        "tests/topk/test_carrier.py",
    ),
    Fault(
        "a top-k is freed although a recompute reads it again",
        "topk/carrier.py",
        "slot.recomputed |= self._in_checkpoint",
        "pass",
        "tests/topk/test_carrier.py",
    ),
    Fault(
        "a recompute selects its top-k again",
        "topk/source.py",
        "None if carrier is None else carrier.published(self.layer_number)",
        "None",
        "tests/topk/test_source.py",
    ),
    Fault(
        "a layer of multi-token prediction publishes its top-k",
        "topk/source.py",
        "None if self.is_mtp else current_carrier()",
        "current_carrier()",
        "tests/topk/test_source.py",
    ),
    Fault(
        "a selection is made where every key fits",
        "topk/source.py",
        "topk_indices is None and not every_key_fits",
        "topk_indices is None",
        "tests/topk/test_source.py",
    ),
    Fault(
        "a patch that fails leaves the host half changed",
        "patching/machine.py",
        "seams.undo()\n            if not isinstance",
        "pass\n            if not isinstance",
        "tests/patches/test_failing_apply.py",
    ),
    Fault(
        "the indexer loss of every microbatch counts whole",
        "patches/megatron_core/running/indexer_loss_scale.py",
        "scale = scale / num_microbatches",
        "scale = scale / 1",
        "tests/patches/test_indexer_loss_scale.py",
    ),
    Fault(
        "context parallelism cuts its chunks elsewhere",
        "topk/tokens.py",
        "for number in (rank, 2 * size - 1 - rank):",
        "for number in (rank, size + rank):",
        "tests/topk/test_tokens.py",
    ),
    Fault(
        "a phase that freezes the indexers trains them",
        "training/phases.py",
        'trains &= not (of_indexer and phase == "frozen_indexer")',
        "trains &= True",
        "tests/training/test_phases.py",
    ),
    Fault(
        "the pytest plugin leaves patches on that it has switched on",
        "testing/pytest_plugin.py",
        "        if not was_on:\n            glm5_patch.disable()",
        "        pass",
        "tests/testing/test_pytest_plugin.py::test_each_test_has_the_patches_that_it_asks_for",
    ),
    Fault(
        "indexers average no gradients over the ranks of tensor parallelism",
        "attention/indexer.py",
        "parameter.average_gradients_across_tp_domain = True",
        "parameter.average_gradients_across_tp_domain = False",
        SPLITS,
    ),
    Fault(
        "the target of the loss is that of this rank's heads",
        "ops/index_loss/reference.py",
        "torch.distributed.all_reduce(target, group=tp_group)",
        "pass",
        SPLITS,
    ),
)


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
