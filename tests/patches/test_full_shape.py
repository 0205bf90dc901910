"""GLM-5.2 in its published shape, built without memory on the meta device."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import collections, sys, warnings
warnings.filterwarnings("ignore")
import torch
from glm5_patch.testing.cpu_host import single_process
from glm5_patch.attention.build import gpt_model, transformer_config
from glm5_patch.config.huggingface import HFConfig
import json
hf = HFConfig(json.loads(open(sys.argv[1]).read()))
with single_process("meta"):
    config = transformer_config(hf, transformer_impl="local", params_dtype=torch.bfloat16,
                                perform_initialization=False, moe_token_dispatcher_type="allgather")
    model = gpt_model(hf, config)
    counts = collections.Counter()
    indexers = set()
    for name, p in model.named_parameters():
        parts = name.split(".")
        layer = parts[2] if parts[1] == "layers" else None
        if ".indexer." in name:
            indexers.add(int(layer) + 1)
            counts["indexer_norms" if "k_norm" in name else "indexer"] += p.numel()
        counts["total"] += p.numel()
    print(json.dumps({"counts": counts, "indexers": sorted(indexers)}))
"""

# As published for GLM-5.2, the multi-token-prediction layer included.
PUBLISHED_TOTAL = 753_329_921_024
PUBLISHED_INDEXER = 9_371_648  # matrices of one indexer
HIDDEN, Q_RANK, KV_RANK, ROPE, HEADS, QK, V = 6144, 2048, 512, 64, 64, 256, 256
MTP_LAYER = (
    Q_RANK * HIDDEN
    + Q_RANK
    + HEADS * QK * Q_RANK  # query
    + (KV_RANK + ROPE) * HIDDEN
    + KV_RANK
    + HEADS * (QK - ROPE + V) * KV_RANK  # key and value
    + HIDDEN * HEADS * V
    + 2 * HIDDEN  # output, norms
    + PUBLISHED_INDEXER
    + 2 * 128  # indexer and its k_norm
    + 257 * 3 * HIDDEN * 2048
    + 256 * HIDDEN  # experts and router
    + 2 * HIDDEN * HIDDEN
    + 3 * HIDDEN  # eh_proj, enorm, hnorm and the head's norm
)


@pytest.mark.nightly
def test_parameters_equal_the_published_count_with_21_indexers():
    import json

    config = Path(__file__).parents[1] / "configs" / "glm-5.2.json"
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(config)], capture_output=True, text=True, check=True
    )
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["indexers"] == [1, 2, 3, *range(7, 76, 4)]
    assert found["counts"]["indexer"] == 21 * PUBLISHED_INDEXER
    assert found["counts"]["indexer_norms"] == 21 * 2 * 128
    assert found["counts"]["total"] + MTP_LAYER == PUBLISHED_TOTAL
