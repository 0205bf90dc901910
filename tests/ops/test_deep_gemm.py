"""DeepGEMM's ``fp8_mqa_logits`` as a backend: a function by its documented contract stands in."""

import dataclasses
import sys
from types import ModuleType

import pytest
import torch

from glm5_patch.ops import fallback, registry
from glm5_patch.ops.index_topk import deep_gemm
from glm5_patch.ops.index_topk.fp8 import shortfall
from glm5_patch.ops.index_topk.operation import fp8_index_topk
from glm5_patch.ops.index_topk.reference import IndexerInputs
from glm5_patch.ops.needs import Call, Needs, Width
from glm5_patch.ops.query_positions import QueryPositions, document_starts, longest_document
from glm5_patch.ops.registry import backends, choose, why_not

HEADS, DIM, K, SCALE = 32, 64, 6, 64**-0.5
CALLS = []


def fp8_mqa_logits(
    q, kv, weights, cu_seq_len_k_start, cu_seq_len_k_end, clean_logits=True, max_seqlen_k=0
):
    """As README and csrc/apis/attention.hpp have it (2026-06): logits fp32 [seq_len, seq_len_kv]
    in wider rows. Of keys that are not from start to end, anything unless ``clean_logits``."""
    seq_len, heads, dim = q.shape
    keys, scales = kv
    assert heads in (32, 64) and dim in (64, 128) and max_seqlen_k == 0
    assert q.dtype == keys.dtype == torch.float8_e4m3fn and q.is_contiguous()
    assert keys.shape == (len(scales), dim) and keys.is_contiguous()
    assert scales.dtype == weights.dtype == torch.float32 and scales.is_contiguous()
    assert weights.shape == (seq_len, heads) and weights.stride(1) == 1
    for bound in (cu_seq_len_k_start, cu_seq_len_k_end):
        assert bound.dtype == torch.int32 and bound.shape == (seq_len,) and bound.is_contiguous()
    CALLS.append((cu_seq_len_k_start.tolist(), cu_seq_len_k_end.tolist()))
    width = -(-(len(keys) + 256) // 256) * 256
    logits = torch.full((-(-seq_len // 4) * 4, width), float("nan"))[:seq_len, : len(keys)]
    for i, (start, end) in enumerate(zip(*CALLS[-1])):
        own = keys[start:end].double() * scales[start:end, None].double()  # [keys, dim]
        products = (own @ q[i].double().T).relu() * weights[i].double()  # [keys, heads]
        logits[i, start:end] = products.sum(1).float()
        if clean_logits:
            logits[i, :start] = logits[i, end:] = float("-inf")
    return logits


@pytest.fixture
def there(monkeypatch):
    """The library is installed, and its needs of a device are met."""
    module = ModuleType("deep_gemm")
    module.fp8_mqa_logits = fp8_mqa_logits
    monkeypatch.setitem(sys.modules, "deep_gemm", module)
    monkeypatch.setattr(fallback, "_compared", set())
    monkeypatch.setattr(registry, "_refused", {})
    monkeypatch.setenv("GLM5_PATCH_KERNELS", "auto")
    (library,) = (one for one in backends("index_topk.fp8") if one.name == "deep_gemm")
    needs = Needs(distribution="deep_gemm", widths=library.needs.widths)
    found = [dataclasses.replace(library, needs=needs)]
    own = [one for one in backends() if one is not library]

    def with_library(operation=None):
        return tuple(one for one in (*found, *own) if operation in (None, one.operation))

    monkeypatch.setattr(registry, "backends", with_library)
    CALLS.clear()
    deep_gemm.fp8_mqa_logits.cache_clear()
    registry._loads.cache_clear()
    yield found
    deep_gemm.fp8_mqa_logits.cache_clear()
    registry._loads.cache_clear()


def layout(lengths):
    bounds = torch.tensor([0, *lengths]).cumsum(0).tolist()
    return QueryPositions(document_starts(bounds), longest=longest_document(bounds))


def random_inputs(s, b=1, heads=HEADS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator)
    size = draw(s, b, 1).exp()  # tokens of different sizes have different scales
    return IndexerInputs(draw(s, b, heads, DIM), draw(s, b, DIM) * size, draw(s, b, heads))


def own(inputs, queries, rotate=True):
    (reference,) = (one for one in backends("index_topk.fp8") if one.name == "torch")
    return reference.compute(inputs, queries, K, SCALE, rotate)


@pytest.mark.parametrize(("lengths", "b"), [([21], 2), ([1, 12, 8], 1)], ids=["bshd", "thd"])
@pytest.mark.parametrize("rotate", [True, False])
def test_the_library_gets_what_it_documents(there, lengths, b, rotate, monkeypatch):
    """And every key is the package's own; also in blocks of queries."""
    queries, inputs = layout(lengths), random_inputs(21, b)
    for blocks in (1, 3):
        monkeypatch.setattr("glm5_patch.ops.query_positions.BLOCK_BYTES", 21 * 4 * -(-21 // blocks))
        CALLS.clear()
        found = deep_gemm.index_topk(inputs, queries, K, SCALE, rotate)
        assert torch.equal(found, own(inputs, queries, rotate))
        assert len(CALLS) == b * blocks
    starts, ends = (sum((call[n] for call in CALLS[::b]), []) for n in (0, 1))
    assert starts == queries.starts.tolist() and ends == list(range(1, 22))


def test_some_of_the_queries(there):
    """As of a context-parallel rank: queries from the middle see all keys before them."""
    whole, inputs = layout([9, 12]), random_inputs(21)
    rows = torch.tensor([2, 8, 13, 20])
    some = inputs._replace(query=inputs.query[rows], weights=inputs.weights[rows])
    found = deep_gemm.index_topk(some, whole.of_queries(rows), K, SCALE, True)
    assert torch.equal(found, own(inputs, whole)[:, rows])


def test_it_is_used_once_its_first_result_agrees(there):
    queries, inputs = layout([21]), random_inputs(21)
    expected = own(inputs, queries)
    for calls in (1, 2):
        assert torch.equal(fp8_index_topk(inputs, queries, K, SCALE, True), expected)
        assert len(CALLS) == calls
    assert ("index_topk.fp8", "deep_gemm") in {key[:2] for key in fallback._compared}
    fp8_index_topk(random_inputs(21, heads=4), queries, K, SCALE, True)
    assert len(CALLS) == 2  # it has no kernel for that many heads


def test_a_library_that_selects_other_keys_is_not_used(there):
    wrong = lambda *args: deep_gemm.index_topk(args[0], *args[1:4], False)  # it does not rotate
    there[0] = dataclasses.replace(there[0], compute=wrong)
    queries, inputs = layout([21]), random_inputs(21)
    says = "index_topk.fp8 by deep_gemm .* is off by .*, where 2e-03 is allowed"
    with pytest.warns(RuntimeWarning, match=f"{says}.*; it is not used in this process"):
        found = fp8_index_topk(inputs, queries, K, SCALE, True)
    assert torch.equal(found, own(inputs, queries))
    assert choose("index_topk.fp8", inputs.call).name == "torch"


def test_an_old_library_is_not_used(there):
    del sys.modules["deep_gemm"].fp8_mqa_logits
    queries, inputs = layout([21]), random_inputs(21)
    assert torch.equal(fp8_index_topk(inputs, queries, K, SCALE, True), own(inputs, queries))
    assert "deep_gemm does not load: ImportError" in why_not(there[0], inputs.call)


def test_where_it_can_not_run_the_table_says_why():
    (library,) = (one for one in backends("index_topk.fp8") if one.name == "deep_gemm")
    assert "compute capability at least 9.0 and below 11.0" in str(library.needs)
    anywhere = dataclasses.replace(library.needs, package=None, device=None)
    for name, value in (("dsa_indexer_n_heads", 16), ("dsa_indexer_head_dim", 96)):
        verdict = anywhere.check(Call(torch.device("cpu"), torch.bfloat16, ((name, value),)))
        assert verdict.reason == f"{name}={value} must be {library.needs.widths[name]}"
    assert isinstance(library.needs.widths["dsa_indexer_n_heads"], Width)


def changed(topk, row, place, value):
    topk = topk.clone()
    topk[0, row, place] = value
    return topk


def test_how_far_a_selection_is_off():
    queries, inputs = layout([21]), random_inputs(21)
    expected = own(inputs, queries)
    off = lambda found: shortfall(found, expected, inputs, queries, K, SCALE, True)
    assert off(expected) == 0
    missing = sorted(set(range(21)) - set(expected[0, 20].tolist()))
    other = torch.tensor(sorted([*expected[0, 20].tolist()[1:], missing[0]]))
    assert 0 < off(changed(expected, 20, slice(None), other)) < 2
    for wrong in (
        changed(expected, 20, 0, expected[0, 20, 1]),  # a key twice
        changed(expected, 10, K - 1, 11),  # a key after the query
        changed(expected, 20, K - 1, -1),  # too few
        changed(expected, 2, 3, 3),  # too many
        expected.flip(-1),  # no order
    ):
        assert off(wrong) == float("inf")


def test_it_is_not_chosen_unless_it_is_asked_for():
    assert [one.name for one in backends("index_topk.fp8")] == ["torch", "deep_gemm"]
