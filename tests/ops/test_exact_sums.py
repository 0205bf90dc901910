"""Sums of integers in the place of sums that depend on their order."""

import pytest
import torch

from glm5_patch.ops.exact_sums import ExactSums
from glm5_patch.ops.sparse_attention import triton
from glm5_patch.ops.sparse_attention.absorption import absorbed_inputs
from glm5_patch.ops.sparse_attention.inputs import AttentionInputs
from tests.ops.test_triton import SMALL, chosen_keys, inputs, layout
from tests.tiny import relative


def added(terms, bound):
    """As the kernels add them."""
    sums = ExactSums.zeros(terms.shape[1:], torch.tensor(bound))
    for term in terms:
        sums.integers.add_((term * sums.units).to(torch.int64))
    return sums


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e30])
def test_the_order_changes_no_bit_and_the_sum_is_right(size):
    generator = torch.Generator().manual_seed(0)
    terms = torch.randn(2000, 8, generator=generator) * size * torch.logspace(-6, 0, 8)
    bound = terms.abs().sum(0).max().item()
    found = added(terms, bound).value()
    assert torch.equal(found, added(terms.flip(0), bound).value())
    expected = terms.double().sum(0)
    assert ((found - expected).abs() / expected.abs()).max() < 2e-6
    # What it is for: rounded sums do depend on it.
    forwards, backwards = torch.zeros(8), torch.zeros(8)
    for term, other in zip(terms, terms.flip(0)):
        forwards += term
        backwards += other
    assert not torch.equal(forwards, backwards)


def test_zeros_stay_zeros_and_what_is_no_number_is_none():
    assert added(torch.zeros(3, 2), 0.0).value().tolist() == [0.0, 0.0]
    for bound in (float("inf"), float("nan")):
        assert added(torch.ones(3, 2), bound).value().isnan().all()


@pytest.mark.parametrize(
    ("heads", "sink"),
    [
        pytest.param(4, True, id="4-sink"),
        *(
            pytest.param(heads, sink, id=name, marks=pytest.mark.nightly)
            for heads, sink, name in ((4, False, "4"), (40, True, "40-sink"), (40, False, "40"))
        ),
    ],
)
def test_no_gradient_of_a_key_exceeds_its_bound(interpreted, heads, sink):
    """Also where all queries attend to the first key alone, with the same upstream gradient."""
    pytest.importorskip("triton", reason="triton is not installed")
    queries, tensors = layout([24]), [t.detach() for t in inputs(24, 1, heads, SMALL, seed=1)]
    if sink:
        tensors[0] = tensors[0].abs()
        tensors[1] = tensors[1].abs() * 0.01
        tensors[1][0] = 50.0
        tensors[2] = tensors[2].abs()
    attention = AttentionInputs(*tensors, chosen_keys(queries, 1, 24, 0), queries, SMALL, 0.2)
    absorbed = absorbed_inputs(attention)
    out, lse = triton.forward(absorbed)
    upstream = torch.ones_like(out)
    plain = triton.backward(absorbed, out, lse, upstream)[1]
    torch.use_deterministic_algorithms(True)
    try:
        room, units = triton.room_for_latents(absorbed, upstream)
        exact = triton.backward(absorbed, out, lse, upstream)[1]
    finally:
        torch.use_deterministic_algorithms(False)
    bound = 2.0**60 / units.item()
    assert plain.abs().max() < 2 * bound
    if sink:  # the bound is no guess far above
        assert plain.abs().max() > 1e-6 * bound
    assert relative(exact, plain) < 1e-5
