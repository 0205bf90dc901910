"""Splits of the model over real processes: the same loss, gradients and top-k as one process."""

import dataclasses
import itertools
import json

import pytest
import torch

import glm5_patch
from glm5_patch.checkpoint.reader import HFCheckpoint
from tests.distributed import run
from tests.distributed.cases import CASES, FILES, RECOMPUTE, SOME, SOME_FILES, SP, Case, source_of

SPREAD, MOST = 1.5, 2e-5
"""Processors round differently. So a bound is SPREAD times the distance of one process from itself
with every matrix product summed in two halves; at most MOST, and never below the bounds here."""
LOSS = 5e-7
# Relative, over all parameters of a rank and of the worst one. Tensor parallelism sums the partial
# products of a matrix in another order, too.
GRADIENTS, WORST = 1e-6, 2e-6
GRADIENTS_TP, WORST_TP = 3e-6, 4e-6
WORST_ADAPTER_TP = 5e-6  # its gradient goes through one product more
NAMES = {case.name: case for case in CASES}
FULL_RECOMPUTE = NAMES["PP 2, recompute full"]
CARRIERS = "checkpoint_recompute,index_share_carrier,topk_carrier"
ALL_OF_THEM = f"{CARRIERS},gate,pipeline_split_check,dsa_spec"  # the last three would refuse it


def repeats_every_operation(case):
    """Whether stages alone are split: then each does what one process does, in its order."""
    adds_up_anew = case.settings.items() >= RECOMPUTE["layernorm"].items()
    # A recompute runs the later layers first, so that they add to an indexer's loss first.
    adds_up_anew |= "dsa_indexer_loss_layers" in case.loss
    return case.world == case.pp > 1 and not adds_up_anew and "mtp_num_layers" not in case.settings


def shortcomings(case, found):
    """What is wrong with one result, as text; nothing if it is right."""
    if "error" in found:
        return found["error"]
    tp = case.settings.items() >= SP.items()
    gradients, worst = (GRADIENTS_TP, WORST_TP) if tp else (GRADIENTS, WORST)
    worst = WORST_ADAPTER_TP if tp and case.adapters else worst
    problems = []

    def most(what, bound):
        return max(bound, min(SPREAD * found["rounding"].get(what, 0.0), MOST))

    if repeats_every_operation(case):
        if found["loss"] or found.get("gradients"):
            problems.append(f"not bit for bit: {found}")
    if not found["loss"] <= most("loss", LOSS):
        problems.append(f"loss off by {found['loss']}")
    if not found.get("logged", 0.0) <= most("logged", LOSS):
        problems.append(f"the logged loss of an indexer is off by {found['logged']}")
    if not found.get("figures", 0.0) <= most("figures", LOSS):
        problems.append(f"the figure of an indexer's loss is off by {found['figures']}")
    if not found["topk_equal"]:
        problems.append("ranks of a tensor-parallel group select other keys")
    if not case.forward_only:
        gradients, worst = most("gradients", gradients), most("worst", worst)
        if not (found["gradients"] <= gradients and found["worst"][1] <= worst):
            problems.append(f"gradients off by {found['gradients']}, most in {found['worst']}")
        if case.indexer_loss and found["computing"] != [1, 2, 3, 7]:
            problems.append(f"indexers of layers {found['computing']} have gradients")
    return "; ".join(problems)


@pytest.mark.parametrize(
    ("cases", "files"),
    [
        pytest.param(SOME, SOME_FILES, id="some"),
        pytest.param(CASES, FILES, id="all", marks=pytest.mark.nightly),
    ],
)
def test_splits_equal_one_process(cases, files, tmp_path):
    found = run.everything(tmp_path, list(cases), files)
    wrong = {case.name: shortcomings(case, found[case.name]) for case in cases}
    assert {name: text for name, text in wrong.items() if text} == {}
    assert found["refused"]["same"]
    assert "holds layer 5, a skip layer whose source, layer 3," in found["refused"]["says"]
    check_files(files, found, tmp_path)
    assert found["save, refused"]["same"]
    assert "exists and is not an empty directory" in found["save, refused"]["says"]


def check_files(files, found, folder):
    """What arrived is what was saved, bit for bit; what every split wrote is what one process
    wrote, and each rank wrote its part of it."""
    for saved, loaded in itertools.permutations(files["checkpoints"], 2):
        name = f"load, {saved.name}, {loaded.name}"
        assert found[name].get("differ") == [], found[name]
        assert loaded.world > 1 or found[name]["computing"] == ["0", "1", "2", "6"]
    for case in files["readers"]:
        assert found[f"read, {case.name}"].get("differ") == [], found[f"read, {case.name}"]
    for case in files["savers"]:
        written = found[f"save again, {case.name}"]
        assert "error" not in written, written
        alone, split = (HFCheckpoint(folder / n) for n in (source_of(case), f"saved, {case.name}"))
        assert split.shapes == alone.shapes and split.report.tensors
        assert all(torch.equal(split.read(n), alone.read(n)) for n in alone.shapes), case.name
        assert len(split.headers) == case.world  # each is small enough for one file
        sizes = [path.stat().st_size for path in split.headers]
        assert max(sizes) < 0.75 * sum(sizes), sizes
    assert not list(folder.glob(".*partial*"))


@pytest.mark.nightly  # tests/patches/test_recompute.py has it in one process
def test_without_the_checkpoint_patch_recompute_is_refused(tmp_path):
    """So the cases with recompute can fail."""
    alone = Case("alone", settings=RECOMPUTE["full"])
    (tmp_path / "cases.json").write_text(json.dumps({1: [dataclasses.asdict(alone)]}))
    (found,) = run.world(1, tmp_path, GLM5_PATCH_DISABLE="checkpoint_recompute")
    assert "'checkpoint_recompute' is disabled" in found["alone"]["error"]


def test_with_the_hosts_own_carrier_gradients_are_wrong(tmp_path):
    """What this package is for: megatron-core 0.19 as released, under the same comparison."""
    if glm5_patch.require()["index_share_carrier"].state != "applied":
        pytest.skip("this host shares no top-k of its own")
    by_freq = dict(dsa_indexer_types=None, dsa_indexer_topk_freq=4, dsa_indexer_skip_topk_offset=3)
    case = dataclasses.replace(FULL_RECOMPUTE, settings={**FULL_RECOMPUTE.settings, **by_freq})
    run.write_cases(tmp_path, [case])
    run.world(1, tmp_path)
    ranks = run.world(2, tmp_path, GLM5_PATCH_DISABLE=ALL_OF_THEM, GLM5_PATCH_ATTENTION="host")
    assert max(rank[case.name]["gradients"] for rank in ranks) > 0.1
