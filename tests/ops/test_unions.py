"""Unions of neighbouring queries' keys in Triton's interpreter, and gradients on Hopper."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from glm5_patch.ops.needs import Call
from glm5_patch.ops.registry import choose
from glm5_patch.ops.sparse_attention import gluon, reference, triton, triton_kernels, unions
from glm5_patch.ops.sparse_attention.inputs import AbsorbedInputs
from tests.ops import dense
from tests.ops.test_sparse_attention import random_topk
from tests.tiny import relative

SCALE = 0.2


def absorbed_inputs(lengths, b, heads, k, seed, latent=64, rope=16, full=False):
    """The second half of the queries has the keys of the one before, as far as it sees them. Unless
    ``full``, some places name no key."""
    generator = torch.Generator().manual_seed(seed)
    starts, s = dense.starts_of(lengths), sum(lengths)
    topk = random_topk(s, b, k, starts, generator)
    for row in range(s // 2, s):
        if row - starts[row] > k:
            topk[:, row, : k - 1] = topk[:, row - 1, : k - 1]
            topk[:, row, k - 1] = row - starts[row]
    if not full:
        topk[-1, s // 3] = -1
        topk[0, s // 2 + 1, 2:4] = -1
    return AbsorbedInputs(
        torch.randn(s, b, heads, latent + rope, generator=generator),
        torch.randn(s, b, latent + rope, generator=generator),
        topk,
        starts.int(),
        torch.arange(s, dtype=torch.int32),
        latent,
        SCALE,
    )


def united(absorbed, first, size):
    """Key -> which of ``size`` queries from ``first`` on have it, for each sequence; and of how
    many places."""
    s, b = absorbed.query.shape[:2]
    rows = range(first, min(first + size, s))
    k = absorbed.topk_indices.shape[-1]
    spans = [int(absorbed.positions[row] - absorbed.starts[row]) + 1 for row in rows]
    for batch in range(b):
        found = {}
        for number, row in enumerate(rows):
            for local in absorbed.topk_indices[batch, row].tolist():
                if local >= 0:
                    found.setdefault(int(absorbed.starts[row]) + local, set()).add(number)
        yield found, sum(min(span, k) for span in spans)


@pytest.mark.parametrize(
    ("lengths", "b"), [([41], 2), ([1, 19, 0, 23], 1)], ids=["batch-of-two", "thd"]
)
@pytest.mark.parametrize("heads", [8, 16, 32])
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in (1, 2))]
)
@pytest.mark.parametrize("scattered", [False, True])
def test_unions_are_those_of_sets(interpreted, monkeypatch, lengths, b, heads, seed, scattered):
    monkeypatch.setattr(unions, "BLOCK", 16)
    monkeypatch.setattr(unions, "SCRATCH_BYTES", 300)
    absorbed = absorbed_inputs(lengths, b, heads, 9, seed)
    if scattered:  # as on one rank of a context-parallel group
        order = torch.randperm(41, generator=torch.Generator().manual_seed(seed))[:23]
        absorbed = absorbed._replace(
            query=absorbed.query[order],
            topk_indices=absorbed.topk_indices[:, order].contiguous(),
            starts=absorbed.starts[order],
            positions=absorbed.positions[order],
        )
    size = 64 // heads
    counts = torch.full((-(-len(absorbed.query) // size), b), -9, dtype=torch.int32)
    blocks = served = alone = 0
    for first, entries in unions.unions(absorbed, counts):
        blocks += 1
        for group in range(len(entries)):
            expected = united(absorbed, (first + group) * size, size)
            for batch, (keys, places) in enumerate(expected):
                count = counts[first + group, batch].item()
                if len(keys) > unions.SHARE * places:
                    assert count == 0
                    alone += 1
                    continue
                assert count == len(keys)
                served += 1
                found = [(e >> 8, e & 255) for e in entries[group, batch, :count].tolist()]
                assert found == [
                    (key * b + batch, sum(1 << number for number in keys[key]))
                    for key in sorted(keys)
                ]
    assert blocks > 1
    assert served and (alone or heads < 32)


def test_a_program_leaves_what_a_union_serves(interpreted):
    """Every query is computed by one of the two kernels, and only by one."""
    absorbed = absorbed_inputs([7, 10], 1, 8, 5, seed=0)
    out, lse = triton.forward(absorbed)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    rows = d_out, lse, triton.row_terms(out, d_out)
    counts = torch.tensor([[3], [0], [7]], dtype=torch.int32)
    together = counts.repeat_interleave(8, 0)[:17, :, None, None] > 0  # [s, b, 1, 1]

    def gradients(skipped):
        d_query = torch.full_like(absorbed.query, float("nan"))
        d_latent = torch.zeros_like(absorbed.latent)
        kernel = triton_kernels.backward
        triton.query_by_query(
            kernel, absorbed, *rows, d_query, d_latent, None, united=skipped, queries=8
        )
        return d_query, d_latent

    whole, ours, theirs = map(gradients, (None, counts, (counts == 0).int()))
    for d_query, there in ((ours[0], ~together), (theirs[0], together)):
        assert torch.equal(d_query.isnan(), (~there).expand_as(d_query))
        assert torch.equal(d_query.nan_to_num(), whole[0] * there)
    assert relative(ours[1] + theirs[1], whole[1]) < 1e-6
    bounds = [torch.zeros(17, 1, dtype=torch.int64) for _ in range(3)]
    for sums, skipped in zip(bounds, (None, counts, (counts == 0).int())):
        kernel, unit = triton_kernels.bounds, torch.tensor(2.0**30)
        triton.query_by_query(kernel, absorbed, *rows, sums, unit, united=skipped, queries=8)
    assert torch.equal(bounds[0], bounds[1] + bounds[2]) and bounds[1].any() and bounds[2].any()


needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="needs a Hopper GPU",
)


@needs_hopper
@pytest.mark.parametrize("in_step", [False, True], ids=["from the first tile", "in step"])
@pytest.mark.parametrize("share", [0.5, 0.75, 1.0])
@pytest.mark.parametrize("heads", [8, 16, 32, 64, 128])
@pytest.mark.parametrize(("lengths", "b"), [([301], 2), ([1, 150, 0, 150], 1)])
def test_gradients_on_hopper(monkeypatch, lengths, b, heads, share, in_step):
    """Where every group of queries, some or hardly any are computed together, or, from 64 heads on,
    each alone; and where programs begin with a tile in the middle."""
    from glm5_patch.ops.sparse_attention.gluon_kernels.backward import SWEEP

    monkeypatch.setattr(unions, "SHARE", share)
    at_once = 7
    progress = torch.full((1,), at_once * SWEEP * 3 // 5, device="cuda")
    begun = lambda latent: (progress, at_once) if in_step else (None, at_once)
    monkeypatch.setattr(gluon, "progress_for", begun)
    alone = heads >= 64
    absorbed = absorbed_inputs(lengths, b, heads, 200, heads, latent=512, rope=64, full=alone)
    tensors = [t.cuda() if isinstance(t, torch.Tensor) else t for t in absorbed]
    exact = AbsorbedInputs(*(t.bfloat16() for t in tensors[:2]), *tensors[2:])
    own = gluon.backward if alone else unions.backward
    assert choose("sparse_attention.backward", exact.call, own=True).compute is own
    out, lse = triton.forward(exact)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    truth = exact._replace(query=exact.query.float(), latent=exact.latent.float())
    expected = reference.backward(truth, *reference.forward(truth), d_out.float())
    before = progress.item()
    for ours, theirs in zip(own(exact, out, lse, d_out), expected):
        assert relative(ours.float(), theirs) < 5e-3
    if alone and in_step:
        tiles = ((exact.positions - exact.starts + 1).clamp(max=200) + 63) // 64
        done = (tiles * (SWEEP // tiles)).sum().item() * b * heads // 64
        assert progress.item() == before + done
    in_step = False
    torch.use_deterministic_algorithms(True)
    try:
        first, again = (own(exact, out, lse, d_out) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for ours, theirs, same in zip(first, expected, again):
        assert relative(ours.float(), theirs) < 5e-3
        assert torch.equal(ours, same)


@needs_hopper
def test_programs_begin_in_step_where_gradients_leave_l2(monkeypatch):
    latent = torch.zeros(8, 1, 576, device="cuda")
    assert gluon.progress_for(latent)[0] is None
    monkeypatch.setattr(gluon, "L2_SHARE", 0)
    progress, at_once = gluon.progress_for(latent)
    assert progress.tolist() == [0] and at_once > 1
    torch.use_deterministic_algorithms(True)
    try:
        assert gluon.progress_for(latent)[0] is None
    finally:
        torch.use_deterministic_algorithms(False)


@needs_hopper
@pytest.mark.parametrize("heads", [64, 128, 40, 4])
def test_other_heads_are_not_united(heads):
    call = Call.of(torch.zeros(1, dtype=torch.bfloat16, device="cuda"), heads=heads)
    assert choose("sparse_attention.backward", call, own=True).compute is not unions.backward
