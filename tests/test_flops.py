"""The operations that benchmarks count, beside the shapes of a checkpoint's tensors."""

import sys
from pathlib import Path

import pytest

from glm5_patch.checkpoint.names import expected_tensors

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import flops  # noqa: E402
from splits.model import Shape  # noqa: E402


@pytest.mark.parametrize("experts", [0, 8])
@pytest.mark.parametrize("length", [1, 16, 50])  # index_topk is 16
def test_a_step_counts_every_weight_and_every_visible_pair(experts, length):
    hf = Shape(layers=5, experts=experts).config(on_cpu=True)
    used = {True: hf.num_experts_per_tok / hf.n_routed_experts if experts else 0, False: 1}
    weights = sum(
        shape[0] * shape[1] * used[".experts." in name]
        for name, shape in expected_tensors(hf).items()
        if len(shape) == 2 and "embed" not in name
    )
    selected = sum(min(query + 1, hf.index_topk) for query in range(length))
    visible = sum(query + 1 for query in range(length))
    of_a_pair = hf.num_attention_heads * (2 * hf.kv_lora_rank + hf.qk_rope_head_dim)
    computing = hf.schedule.types.count("full")
    assert 0 < computing < 5
    scores = 2 * visible * computing * hf.index_n_heads * hf.index_head_dim
    products = 2 * (length * weights + 5 * selected * of_a_pair)
    assert flops.index_scores_flops(hf, length) == scores
    assert flops.training_flops(hf, length) == pytest.approx(3 * (products + scores))


def test_a_rate_with_the_scores_counted_once():
    hf = Shape(layers=5, experts=0).config(on_cpu=True)
    found = flops.rates(hf, 4096, 1e9)
    every, scores = flops.training_flops(hf, 4096), flops.index_scores_flops(hf, 4096)
    assert found["TFLOP/s a GPU"] == pytest.approx(every / 4096 / 1e3, abs=0.1)
    assert found["scores counted once"] == pytest.approx((every - 2 * scores) / 4096 / 1e3, abs=0.1)
