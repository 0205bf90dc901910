"""The bits of a top-k beside hidden states: exact, whatever number they are the pattern of."""

import pytest
import torch
from megatron.core.pipeline_parallel.schedules import custom_backward, deallocate_output_tensor
from megatron.core.utils import make_viewless_tensor

from glm5_patch.config.costs import topk_bytes_per_token
from glm5_patch.errors import MissingTopkError
from glm5_patch.ops.query_positions import QueryPositions
from glm5_patch.topk.stages import StageTopk, split, widen
from glm5_patch.topk.tokens import Layout

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
H = 6


def layout(lengths):
    """Of a pack of documents of these lengths."""
    starts = torch.cat([torch.full((n,), sum(lengths[:i])) for i, n in enumerate(lengths)])
    queries = QueryPositions(starts, longest=max(lengths))
    return Layout(queries, queries)


def last_queries(length, count):
    """Of one document, the last queries alone."""
    places = torch.arange(length - count, length)
    queries = QueryPositions(torch.zeros_like(places), places, length, length)
    return Layout(queries, queries)


def any_topk(of: Layout, k, batch=2):
    """As an indexer selects: ascending, as many as the query sees, then -1."""
    rows = []
    for position in of.queries.local_positions.tolist() * batch:
        chosen = torch.randperm(position + 1)[:k].sort().values
        rows.append(torch.nn.functional.pad(chosen, (0, k - len(chosen)), value=-1))
    return torch.stack(rows).view(batch, -1, k).int()


def crossed(topk_indices, of, dtype, narrow_gradient=False):
    """What the next stage decodes, and whether anything that crossed was a NaN pattern."""
    hidden = torch.randn(topk_indices.shape[1], len(topk_indices), H).to(dtype)
    sent = widen(hidden, StageTopk.encode(topk_indices, hidden, of, None), narrow_gradient)
    assert torch.equal(sent[..., :H], hidden)
    received = sent.detach().clone().requires_grad_()
    hidden_again, bits = split(received, H, narrow_gradient)
    assert torch.equal(hidden_again, hidden)
    decoded = StageTopk(bits, None).decode(of, topk_indices.shape[-1])
    return decoded, bool(sent[..., H:].isnan().any())


@pytest.mark.parametrize("k", [1, 4, 5])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_positions_arrive_as_they_left(dtype, narrow, k):
    for of in (layout([1, 9, 30]), layout([40])):
        topk_indices = any_topk(of, k)
        decoded, _ = crossed(topk_indices, of, dtype, narrow)
        assert decoded.dtype == torch.int32 and torch.equal(decoded, topk_indices)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_16_bit_pattern_arrives_nans_included(dtype):
    length = 1 << 16
    of = last_queries(length, 32)
    topk_indices = torch.arange(length, dtype=torch.int32).view(1, 32, -1)
    decoded, has_nans = crossed(topk_indices, of, dtype)
    assert has_nans and torch.equal(decoded, topk_indices)


@pytest.mark.parametrize("dtype", DTYPES)
def test_longer_documents_take_32_bits(dtype):
    length = (1 << 16) + 1
    of = last_queries(length, 32)
    topk_indices = any_topk(of, 8)
    topk_indices[..., -1] = length - 1
    topk_indices[0, 0, 3:] = -1
    assert torch.equal(crossed(topk_indices, of, dtype)[0], topk_indices)


def test_a_token_costs_at_most_4_kib_up_to_65536_tokens():
    assert topk_bytes_per_token(2048, 2048) == 0
    assert topk_bytes_per_token(2048, 1 << 16) == 4096
    assert topk_bytes_per_token(2048, (1 << 16) + 1) == 8192
    of, dtype = layout([40]), torch.bfloat16
    hidden = torch.zeros(40, 1, H, dtype=dtype)
    bits = StageTopk.encode(any_topk(of, 8, 1), hidden, of, None).bits
    assert bits.shape[-1] * dtype.itemsize == topk_bytes_per_token(8, 40)


@pytest.mark.parametrize("narrow", [False, True], ids=["kept", "freed"])
def test_gradients_pass_and_the_extra_columns_have_none(narrow):
    """As a schedule runs two stages: the output is sent and freed, the gradient comes back."""
    of = layout([20])
    weight = torch.randn(20, 2, H)
    hidden = torch.randn(20, 2, H, requires_grad=True)
    doubled = hidden * 2
    output = widen(doubled, StageTopk.encode(any_topk(of, 5), doubled, of, None), narrow)
    assert make_viewless_tensor(output, requires_grad=True, keep_graph=True) is output

    received = output.detach().clone().requires_grad_()
    deallocate_output_tensor(output, narrow)
    taken, _ = split(received, H, narrow)
    (taken * weight).sum().backward()
    assert torch.equal(received.grad[..., :H], weight)
    assert received.grad.shape[-1] == H if narrow else not received.grad[..., H:].any()

    if narrow:
        custom_backward(output, received.grad)
    else:
        torch.autograd.backward(output, received.grad)
    assert torch.equal(hidden.grad, weight * 2)


def test_a_stage_with_another_batch_says_so():
    of = layout([20])
    bits = StageTopk.encode(any_topk(of, 5), torch.zeros(20, 2, H), of, None).bits
    with pytest.raises(MissingTopkError, match="20 tokens and 3 columns, where 21 and 3"):
        StageTopk(bits, None).decode(layout([21]), 5)
    with pytest.raises(MissingTopkError, match="dsa_indexer_topk=9"):
        StageTopk(bits, None).decode(of, 9)
