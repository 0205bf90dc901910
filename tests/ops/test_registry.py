"""Every backend against the reference of its operation, on every machine where it can run."""

import sys

import pytest
import torch

from glm5_patch import env
from glm5_patch.ops import registry
from glm5_patch.ops.index_loss.reference import LossSettings, SelectedKeys
from glm5_patch.ops.index_topk.reference import IndexerInputs
from glm5_patch.ops.needs import Call
from glm5_patch.ops.query_positions import QueryPositions
from glm5_patch.ops.recorded_keys.frame import Frame
from glm5_patch.ops.registry import Backend, backends, choose, names, table, why_not
from glm5_patch.ops.rotation.reference import Rotation
from glm5_patch.ops.sparse_attention.absorption import absorbed_inputs
from glm5_patch.ops.sparse_attention.gluon import compiles
from glm5_patch.ops.sparse_attention.inputs import AttentionInputs, MLADims
from tests.ops.test_sparse_attention import random_topk
from tests.tiny import relative

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
DIMS = MLADims(512, 192, 64, 256) if DEVICE == "cuda" else MLADims(64, 24, 16, 20)
HEADS = 64 if DEVICE == "cuda" else 3
INDEX_HEADS, INDEX_DIM = (32, 128) if DEVICE == "cuda" else (16, 32)
S, K = 150, 128
"""Keys of several tiles: a kernel that stops after its first is told."""
KINDS = [one for one in backends() if one.name != "torch"]
MOST = 2e-2 if DEVICE == "cuda" else 1e-5


def drawn(generator, *shape, scale=1.0):
    return torch.randn(shape, generator=generator).mul_(scale).to(DEVICE, DTYPE)


def queries_at_the_end():
    """The last queries of one sequence, which see most keys."""
    places = torch.arange(S - 6, S, device=DEVICE)
    return QueryPositions(torch.zeros_like(places), places, S, S)


def attention(generator):
    topk = random_topk(S, 1, K, torch.zeros(S, dtype=torch.int64), generator)[:, -6:].to(DEVICE)
    topk = topk.contiguous()
    width = HEADS * (DIMS.nope + DIMS.value)
    return AttentionInputs(
        drawn(generator, 6, 1, HEADS, DIMS.nope + DIMS.rope),
        drawn(generator, S, 1, 1, DIMS.latent + DIMS.rope),
        drawn(generator, DIMS.latent, width, scale=DIMS.latent**-0.5),
        topk,
        queries_at_the_end(),
        DIMS,
        0.1,
    )


def indexer(generator):
    return IndexerInputs(
        drawn(generator, 6, 1, INDEX_HEADS, INDEX_DIM),
        drawn(generator, S, 1, INDEX_DIM),
        drawn(generator, 6, 1, INDEX_HEADS).float(),
    )


def differentiated(compute, leaves, *rest):
    """What it computes of the first arguments' fields, and their gradients."""
    leaves = [type(leaf)(*(_leaf(field) for field in leaf)) for leaf in leaves]
    result = compute(*leaves, *rest)
    wanted = [field for field in leaves[0] if isinstance(field, torch.Tensor) and field.is_leaf]
    wanted = [field for field in wanted if field.requires_grad]
    upstream = torch.linspace(0.5, 1.5, result.numel(), device=DEVICE).view_as(result)
    return result, *torch.autograd.grad(result, wanted, upstream.to(result.dtype))


def _leaf(field):
    floats = isinstance(field, torch.Tensor) and field.is_floating_point()
    return field.detach().requires_grad_() if floats else field


def attended(absorbed):
    """Output and log-sum-exp of the reference."""
    every = backends("sparse_attention.forward")
    return next(one for one in every if one.name == "torch").compute(absorbed)


def run(operation, compute, reference, generator):
    """What ``compute`` makes of some inputs of the operation."""
    if operation == "sparse_attention":
        return differentiated(lambda one: compute(one)[0], [attention(generator)])
    if operation.startswith("sparse_attention."):
        absorbed = absorbed_inputs(attention(generator))
        if operation == "sparse_attention.forward":
            return compute(absorbed)
        out, lse = attended(absorbed)
        return compute(absorbed, out, lse, drawn(generator, *out.shape))
    if operation == "index_loss":
        settings = LossSettings(0.2, 0.3, sparse=True)
        return differentiated(compute, [indexer(generator)], attention(generator), settings)
    if operation == "index_loss.head_sums":
        absorbed = absorbed_inputs(attention(generator))
        return (compute(absorbed, attended(absorbed)[1]),)
    if operation == "index_loss.target":
        return (compute(attention(generator), None),)
    if operation == "index_loss.of_target":
        of = attention(generator)
        target = torch.rand(of.topk_indices.shape, generator=generator).to(DEVICE)
        target = target.masked_fill_(of.topk_indices < 0, 0.0)
        target /= target.sum(-1, keepdim=True)
        keys, settings = SelectedKeys(of.topk_indices, of.queries), LossSettings(0.2, 0.3, True)
        return differentiated(compute, [indexer(generator)], keys, target, settings)
    if operation == "rotation":
        by = Rotation(drawn(generator, 6, 16), drawn(generator, 6, 16), interleaved=True)
        tensor = drawn(generator, 6, 1, 2, 3, 40).requires_grad_()
        result = compute(tensor, by, 8)
        return result, *torch.autograd.grad(result, tensor, drawn(generator, *result.shape))
    if operation == "quantization":
        return compute(drawn(generator, 6, 1, INDEX_HEADS, INDEX_DIM), True)
    queries = queries_at_the_end()
    if operation == "index_topk":
        return (compute(indexer(generator), queries, K, 0.2).sort(-1)[0],)
    if operation == "index_topk.fp8":
        return (compute(indexer(generator), queries, K, 0.2, True),)
    if operation == "index_scores":
        scores = compute(indexer(generator), queries, slice(0, 6), 0.2)
        seen = torch.arange(S, device=DEVICE) <= queries.places[:, None]
        return (scores.masked_fill(~seen, 0.0),)
    if operation == "recorded_keys":
        keys = torch.rand(3, S, generator=generator).argsort(1)[:, :K].numpy()
        wanted = torch.tensor([2, 0])
        return (compute([Frame.encode(S, keys).unpack()], wanted, K, DEVICE),)
    scores = torch.randn(6, S, generator=generator).to(DEVICE)
    return (compute(scores, *queries.spans(), S, K),)


@pytest.mark.parametrize("one", KINDS, ids=lambda one: f"{one.operation}-{one.name}")
@pytest.mark.parametrize("seed", range(2))
def test_a_backend_computes_what_the_reference_does(one, seed, monkeypatch):
    monkeypatch.setenv("GLM5_PATCH_KERNELS", one.name)
    sizes = (("keys", S), ("one_sequence", 0))
    if reason := why_not(one, Call(torch.device(DEVICE), DTYPE, (), sizes)):
        pytest.skip(f"{one.operation} by {one.name}: {reason}")
    heads = one.needs.widths.get("heads")
    if heads is not None and not heads.fits(HEADS):
        monkeypatch.setattr(sys.modules[__name__], "HEADS", 16)
    (reference,) = (other for other in backends(one.operation) if other.name == "torch")
    found, expected = (
        run(one.operation, kind.compute, reference, torch.Generator().manual_seed(seed))
        for kind in (one, reference)
    )
    for ours, theirs in zip(found, expected, strict=True):
        if ours.is_floating_point():
            assert relative(ours.float(), theirs.float()) < MOST
        else:
            assert torch.equal(ours, theirs)


def test_triton_is_walked_where_it_can_run(monkeypatch):
    """The walk skips what can't run: this says that it does not skip everything."""
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setenv("GLM5_PATCH_KERNELS", "triton")
    call = Call(torch.device(DEVICE), DTYPE)
    ran = {one.operation for one in KINDS if one.name == "triton" and not why_not(one, call)}
    assert ran == {one.operation for one in backends()} - {"index_topk.fp8"}  # it asks index_topk


def test_every_operation_has_a_reference():
    operations = {one.operation for one in backends()}
    assert operations == {one.operation for one in backends() if one.name == "torch"}
    assert len(operations) == 14


def test_the_switch_knows_the_backends(monkeypatch):
    for name in names():
        monkeypatch.setenv(env.KERNELS, name)
        assert env.kernels() == name
        assert f"``{name}``" in env.__doc__
    assert sorted(env._KERNELS) == sorted(names())


def test_the_table_has_every_backend_and_why_it_does_not_compute(monkeypatch):
    monkeypatch.setenv("GLM5_PATCH_KERNELS", "torch")
    rows = table(torch.device("cpu"), torch.bfloat16)
    assert [(row.operation, row.backend) for row in rows] == [
        (one.operation, one.name) for one in backends()
    ]
    for row in rows:
        assert row.here == ("yes" if row.backend == "torch" else "GLM5_PATCH_KERNELS=torch")
    takes = {(row.operation, row.backend): row.takes for row in rows}
    assert "bfloat16, heads 64 or 128" in takes["sparse_attention.forward", "flash_mla"]
    assert "218 KiB of shared memory" in takes["sparse_attention.forward", "gluon"]


@pytest.mark.parametrize("rank", [1, 3])
def test_a_library_is_named_where_it_computes(rank, monkeypatch):
    own = Backend("sum", "gluon", compute=sum, rank=2)
    library = Backend("sum", "flash_mla", compute=sum, rank=rank, most_difference=1e-3)
    found = tuple(sorted((own, library), key=lambda one: -one.rank))
    monkeypatch.setattr(registry, "backends", lambda operation=None: found)
    monkeypatch.setenv("GLM5_PATCH_KERNELS", "auto")
    named = registry.triton_and_libraries(torch.device("cpu"), torch.float32)
    assert named == ("triton, sum by flash_mla" if rank > own.rank else "triton")


def test_a_gluon_that_compiles_something_else_gives_way_with_a_warning(monkeypatch):
    def unknown():
        raise AttributeError("module 'gluon' has no attribute 'warp_specialize'")

    gluon_backend = Backend("sum", "gluon", compute=sum, rank=2, load=compiles(unknown))
    own = Backend("sum", "triton", compute=sum, rank=1)
    monkeypatch.setattr(registry, "backends", lambda operation=None: (gluon_backend, own))
    monkeypatch.setenv("GLM5_PATCH_KERNELS", "auto")
    call = Call(torch.device("cpu"), torch.float32)
    with pytest.warns(RuntimeWarning, match="Gluon is unknown .*warp_specialize.*plain Triton"):
        assert choose("sum", call) is own
    assert "warp_specialize" in why_not(gluon_backend, call)
