"""Selection in one pass over the keys: all but the Gluon kernels, which torch stands in for."""

import pytest
import torch

from glm5_patch.ops.index_topk import gluon, reference, triton
from glm5_patch.ops.index_topk.reference import IndexerInputs
from glm5_patch.ops.query_positions import QueryPositions, document_starts

LENGTH, K, ROWS, STRIDE = 150, 20, 12, 4
NOTHING = float("nan")


def sampled_keys(length, stride):
    number = torch.arange(length // stride)
    return number * stride + number % stride


def of_sequence(inputs, batch):
    return IndexerInputs(*(tensor[:, batch : batch + 1] for tensor in inputs))


class Kernels:
    """As the Gluon kernels compute, in torch; what they leave out is not a number."""

    def __init__(self):
        self.misled = 0

    def write_scores(self, out, inputs, queries, block, batch, scale, *, stride, least):
        scores = reference.index_scores(of_sequence(inputs, batch), queries, block, scale)[0]
        left_out = (queries.local_positions[block] < least)[:, None]
        out[: len(scores)] = scores[:, sampled_keys(scores.shape[1], stride)]
        out[: len(scores)].masked_fill_(left_out, NOTHING)

    def write_candidates(self, out, inputs, queries, block, batch, scale, bars, k):
        scores = reference.index_scores(of_sequence(inputs, batch), queries, block, scale)[0]
        starts, positions = (span[block].tolist() for span in queries.spans())
        room = out.values.shape[1]
        out.values.fill_(NOTHING)
        for row, (start, position) in enumerate(zip(starts, positions)):
            if position - start < k:
                continue
            seen = scores[row, start : position + 1]
            found = (seen >= bars[row]).nonzero()[:, 0]
            out.counts[row] = len(found) if k <= len(found) <= room else -1
            self.misled += int(out.counts[row] < 0)
            found = found[:room]
            out.values[row, : len(found)] = seen[found]
            out.names[row, : len(found)] = found.int()


def index_inputs(kind, b):
    """Whole numbers, whose sums are exact in every order."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randint(-9, 10, shape, generator=generator).float()
    query, key, weights = draw(LENGTH, b, 32, 128), draw(LENGTH, b, 128), draw(LENGTH, b, 32)
    if kind == "equal":
        key[:] = key[0]
    elif kind != "usual":
        query, weights = query.abs() + 1, weights.abs() + 1
        query[..., 1:] = 0
        key[:] = torch.arange(LENGTH)[:, None, None]
        if kind == "only sampled keys are high":  # fewer than k reach the bar
            key[sampled_keys(LENGTH, STRIDE)] += LENGTH
    return IndexerInputs(query, key, weights)


@pytest.mark.parametrize(
    ("kind", "bounds", "b", "misleads"),
    [
        ("usual", [0, 60, LENGTH], 1, False),
        ("equal", [0, LENGTH], 2, True),
        ("only sampled keys are high", [0, LENGTH], 1, True),
        pytest.param("ascending", [0, LENGTH], 1, False, marks=pytest.mark.nightly),
    ],
)
def test_one_pass_selects_what_the_reference_selects(
    kind, bounds, b, misleads, interpreted, monkeypatch
):
    """Also queries that their sample misled, and of documents that fit into the top-k."""
    kernels = Kernels()
    monkeypatch.setattr(gluon, "write_scores", kernels.write_scores)
    monkeypatch.setattr(gluon, "write_candidates", kernels.write_candidates)
    monkeypatch.setattr(gluon, "FEWEST_KEYS", 0)
    monkeypatch.setattr(gluon, "STRIDE", STRIDE)
    monkeypatch.setattr(gluon, "CANDIDATE_BYTES", 1)  # blocks of 16 queries
    last = torch.arange(LENGTH)[-ROWS:]
    places = torch.cat([torch.arange(10), last])
    queries = QueryPositions(document_starts(bounds)[places], places, LENGTH, LENGTH)
    inputs = index_inputs(kind, b)
    own = inputs._replace(query=inputs.query[places], weights=inputs.weights[places])
    ours = gluon.index_topk(own, queries, K, 1.0)
    assert torch.equal(ours, reference.index_topk(own, queries, K, 1.0))
    assert (kernels.misled > 0) == misleads


@pytest.mark.parametrize(("programs", "most_bytes"), [(3, 1 << 20), (99, 1 << 20), (3, 1)])
def test_several_programs_select_for_those_that_were_misled(programs, most_bytes, interpreted):
    """One after another has groups of queries among which some were misled, all, or none."""
    inputs = index_inputs("usual", 2)
    queries = QueryPositions(document_starts([0, 60, LENGTH]), longest=LENGTH - 60)
    expected = reference.index_topk(inputs, queries, K, 1.0)
    misled = torch.rand(LENGTH, generator=torch.Generator().manual_seed(0)) < 0.3
    misled[40:80], misled[100:124] = False, True
    for batch in range(2):
        found = torch.full_like(expected[batch], -7)
        counts = torch.where(misled, -1, K).int()
        triton.score_and_select_misled(
            found, counts, inputs, queries, batch, 1.0, programs, most_bytes
        )
        selected = misled & (queries.local_positions >= K)
        assert torch.equal(found[selected], expected[batch][selected])
        assert (found[~selected] == -7).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: programs run side by side")
def test_programs_share_no_scores():
    """Every query is misled, and every program has its own lines of scores."""
    length, k, draw = 5000, 64, torch.Generator("cuda").manual_seed(0)
    random = lambda *shape: torch.randn(shape, generator=draw, device="cuda")
    query, key = random(length, 1, 32, 128).bfloat16(), random(length, 1, 128).bfloat16()
    inputs = IndexerInputs(query, key, random(length, 1, 32))
    starts = torch.zeros(length, dtype=torch.int64, device="cuda")
    queries = QueryPositions(starts, longest=length)
    expected = triton.index_topk(inputs, queries, k, 1.0)[0]
    found, counts = torch.full_like(expected, -7), torch.full_like(expected[:, 0], -1)
    triton.score_and_select_misled(found, counts, inputs, queries, 0, 1.0, 132, 1 << 28)
    assert torch.equal(found[k:], expected[k:])


@pytest.mark.parametrize("longest", [16385, 32768, 131072, 262144, 1 << 20])
def test_a_sample_seldom_misleads(longest):
    """The share of the scores above the n-th largest of a sample has a beta distribution."""
    from glm5_patch.ops.index_topk.triton import DEVIATIONS

    k = 2048
    stride, room = gluon.Sampling.of(longest, k)
    sample, expected = longest // stride, k / stride
    wanted = int(expected + DEVIATIONS * expected**0.5) + 1
    torch.manual_seed(0)
    misled = 0.0
    for found in (wanted, wanted + wanted // 16):  # the search stops in between
        share = torch.distributions.Beta(found, sample - found + 1.0).sample((20000,))
        candidates = share * longest
        misled = max(misled, ((candidates < k) | (candidates > room)).float().mean().item())
    assert misled < 1e-3
