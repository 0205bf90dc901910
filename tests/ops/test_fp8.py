"""Selection in fp8 against the arithmetic written out: e4m3 rounding, scales, Hadamard matrix."""

import math

import pytest
import torch

from glm5_patch.errors import GLM5PatchError
from glm5_patch.ops.index_topk.fp8 import fp8_inputs
from glm5_patch.ops.index_topk.operation import index_topk
from glm5_patch.ops.index_topk.reference import IndexerInputs
from glm5_patch.ops.quantization.operation import quantize
from glm5_patch.ops.quantization.reference import hadamard
from glm5_patch.ops.query_positions import QueryPositions
from glm5_patch.testing.parity import kept_share, recorded
from glm5_patch.tools.verify import forward
from tests.ops.test_ties import lowest_of_equals
from tests.tiny import megatron_model, saved, tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
S, HEADS, DIM, K = 24, 4, 128, 7


def random_inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator)
    size = draw(S, 1, 1).exp()  # tokens of different sizes have different scales
    return IndexerInputs(draw(S, 1, HEADS, DIM), draw(S, 1, DIM) * size, draw(S, 1, HEADS))


def e4m3(value: float) -> float:
    """The nearest number with 3 bits of mantissa and an exponent of at least -6, ties to even."""
    if value == 0:
        return 0.0
    step = 2.0 ** (max(math.floor(math.log2(abs(value))), -6) - 3)
    return max(-448.0, min(448.0, round(value / step) * step))


def matrix(dim: int) -> torch.Tensor:
    signs = [[(-1) ** bin(i & j).count("1") for j in range(dim)] for i in range(dim)]
    return torch.tensor(signs, dtype=torch.float64)


def rounded(row: torch.Tensor) -> tuple[list[float], float]:
    """Of a row in bf16: its e4m3 numbers, and their scale."""
    row = (row.bfloat16().double() @ matrix(len(row)) * len(row) ** -0.5).bfloat16().tolist()
    scale = 2.0 ** math.ceil(math.log2(max(max(map(abs, row)), 1e-4) / 448))
    return [e4m3(value / scale) for value in row], scale


def written_out(inputs: IndexerInputs, scale: float) -> torch.Tensor:
    """Scores [s, t] in fp64."""
    keys = [rounded(row) for row in inputs.key[:, 0]]
    key = torch.tensor([values for values, _ in keys], dtype=torch.float64)
    key_scale = torch.tensor([scale for _, scale in keys], dtype=torch.float64)
    scores = []
    for query, weights in zip(inputs.query[:, 0], inputs.weights[:, 0].double()):
        heads = [rounded(row) for row in query]
        values = torch.tensor([values for values, _ in heads], dtype=torch.float64)
        scales = torch.tensor([scale for _, scale in heads], dtype=torch.float64)
        products = (values @ key.T).relu()  # [heads, t]
        scores.append((products * (weights * scales * scale)[:, None]).sum(0) * key_scale)
    return torch.stack(scores)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_the_hadamard_matrix_and_the_rounding(kernels, request):
    if kernels == "triton":
        request.getfixturevalue("interpreted")
    rows = random_inputs().key[:, 0]
    expected = rows.double() @ matrix(DIM) * DIM**-0.5
    assert (hadamard(rows) - expected).abs().max() < 1e-5 * expected.abs().max()
    values, scales = quantize(rows)
    for number, row in enumerate(rows):
        expected, scale = rounded(row)
        assert values[number].float().tolist() == expected and scales[number] == scale
    for power in (1.0, 448.0, 0.875 * 2.0**-5):  # the largest number fills the range exactly
        values, scale = quantize(torch.tensor([power, 0.0]), rotate=False)
        assert values[0].float() * scale == power


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize(("dim", "seed"), [(2, 0), (64, 1), (128, 2)])
def test_triton_rounds_as_torch_does(rotate, dim, seed):
    """Numbers of all sizes, exact ties, zeros and what is not finite."""
    pytest.importorskip("triton", reason="triton is not installed")
    from glm5_patch.ops.quantization import reference, triton

    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(37, 3, dim, generator=generator)
    rows *= torch.randn(37, 3, 1, generator=generator).mul(6).exp()
    halves = torch.arange(37 * 3 * dim).remainder(64).view(37, 3, dim) / 32  # between e4m3 numbers
    rows[::3] = halves[::3] * 2.0 ** torch.arange(-8, 5).view(13, 1, 1)
    rows[1], rows[4, 0], rows[4, 1, 0] = 0.0, float("nan"), float("inf")
    rows = rows.to(DEVICE, DTYPE)
    found, expected = (one.quantize(rows, rotate) for one in (triton, reference))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.nan_to_num(9999.0), theirs.nan_to_num(9999.0))


@pytest.mark.parametrize("kernels", ["torch", pytest.param("triton", marks=pytest.mark.nightly)])
def test_every_key_is_that_of_the_arithmetic_written_out(kernels, request, monkeypatch):
    if kernels == "triton":
        request.getfixturevalue("interpreted")
    inputs = random_inputs()
    rounded_inputs = fp8_inputs(inputs, DIM**-0.5)
    if kernels == "triton":  # whose interpreter knows no bf16
        rounded_inputs = IndexerInputs(*(tensor.float() for tensor in rounded_inputs))
    scores = written_out(inputs, DIM**-0.5)
    queries = QueryPositions(torch.zeros(S, dtype=torch.int64), longest=S)
    found = index_topk(rounded_inputs, queries, K, 1.0)[0]
    assert torch.equal(found, lowest_of_equals(scores, K))
    in_full = index_topk(inputs, queries, K, DIM**-0.5)
    assert kept_share(found[None], in_full) < 1  # or fp8 would not show


def test_a_model_that_selects_in_fp8(world, our_core, tmp_path):
    checkpoint = saved(tmp_path)
    ids, found = tokens(0, 2, 64), {}
    for precision in ("model", "fp8"):
        model = megatron_model(checkpoint, dsa_indexer_precision=precision)
        with torch.no_grad(), recorded(model) as recording:
            forward(model, ids)
        found[precision] = recording.topk_indices[1]
    assert 0.8 < kept_share(found["fp8"], found["model"]) < 1
    with pytest.raises(GLM5PatchError, match="dsa_indexer_precision='int8' must be one of model"):
        megatron_model(checkpoint, dsa_indexer_precision="int8")
