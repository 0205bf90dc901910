"""Sums of integers in the place of sums that depend on their order."""

import pytest
import torch

from glm5_patch.ops.exact_sums import ExactPairs, ExactSums
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
    return sums.value()


def added_in_pairs(terms, bound):
    """The same, of terms [terms, columns] as a row with a bound of its own."""
    pairs = ExactPairs.zeros(terms.shape[1], torch.tensor(bound))
    for term in terms:
        lower, upper = (term * pairs.units).round().long().unflatten(0, (-1, 2)).unbind(1)
        pairs.integers.add_(lower + (upper << 32))
    return pairs.value()


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e30])
@pytest.mark.parametrize(("add", "bits"), [(added, 60), (added_in_pairs, 30)])
def test_the_order_changes_no_bit_and_the_sum_is_right(size, add, bits):
    generator = torch.Generator().manual_seed(0)
    terms = torch.randn(2000, 8, generator=generator) * size * torch.logspace(-6, 0, 8)
    bound = terms.abs().sum(0).max().item()
    found = add(terms, bound)
    assert torch.equal(found, add(terms.flip(0), bound))
    expected = terms.double().sum(0)
    unit = bound * 2.0 ** (1 - bits)
    assert ((found - expected).abs() <= len(terms) * unit + 1e-7 * expected.abs()).all()
    # What it is for: rounded sums do depend on it.
    forwards, backwards = torch.zeros(8), torch.zeros(8)
    for term, other in zip(terms, terms.flip(0)):
        forwards += term
        backwards += other
    assert not torch.equal(forwards, backwards)


@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_a_pair_keeps_both_sums(signs):
    terms = torch.tensor(signs, dtype=torch.float32).expand(1000, 2)
    assert added_in_pairs(terms, 1000.0).tolist() == [1000.0 * sign for sign in signs]
    # As small as a unit.
    assert added_in_pairs(terms[:1], 2.0**30).tolist() == list(signs)


@pytest.mark.parametrize("add", [added, added_in_pairs])
def test_zeros_stay_zeros_and_what_is_no_number_is_none(add):
    assert add(torch.zeros(3, 2), 0.0).tolist() == [0.0, 0.0]
    for bound in (float("inf"), float("nan")):
        assert add(torch.ones(3, 2), bound).isnan().all()


@pytest.mark.parametrize(
    ("heads", "sink", "scale"),
    [
        pytest.param(4, True, 0.2, id="4-sink"),
        pytest.param(4, False, 1e-6, id="4-as-values"),  # as keys they have no gradient then
        *(
            pytest.param(heads, sink, 0.2, id=name, marks=pytest.mark.nightly)
            for heads, sink, name in ((4, False, "4"), (40, True, "40-sink"), (40, False, "40"))
        ),
    ],
)
def test_no_gradient_of_a_key_exceeds_its_bound(interpreted, monkeypatch, heads, sink, scale):
    """Also where all queries attend to the first key alone, with the same upstream gradient."""
    pytest.importorskip("triton", reason="triton is not installed")
    queries, tensors = layout([24]), [t.detach() for t in inputs(24, 1, heads, SMALL, seed=1)]
    if sink:
        tensors[0] = tensors[0].abs()
        tensors[1] = tensors[1].abs() * 0.01
        tensors[1][0] = 50.0
        tensors[2] = tensors[2].abs()
    attention = AttentionInputs(*tensors, chosen_keys(queries, 1, 24, 0), queries, SMALL, scale)
    absorbed = absorbed_inputs(attention)
    out, lse = triton.forward(absorbed)
    upstream = torch.ones_like(out)
    plain = triton.backward(absorbed, out, lse, upstream)[1]
    made = []
    pairs = ExactPairs.zeros
    monkeypatch.setattr(ExactPairs, "zeros", lambda *a: made.append(a[-1]) or pairs(*a))
    torch.use_deterministic_algorithms(True)
    try:
        exact = triton.backward(absorbed, out, lse, upstream)[1]
    finally:
        torch.use_deterministic_algorithms(False)
    (bound,) = made  # [t, b]
    largest = plain.abs().amax(-1)
    assert (largest <= bound).all()
    if sink:  # the bound is no guess far above
        assert largest.max() > 0.1 * bound.max()
    assert relative(exact, plain) < 1e-5
