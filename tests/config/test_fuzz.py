"""Random edits of the published files: read as transformers reads them, or refused by name."""

import copy
import json
import math
import os
import random
import re
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig
from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as hf_modeling

from glm5_patch.checkpoint.names import expected_tensors
from glm5_patch.config.huggingface import HFConfig
from glm5_patch.errors import CheckpointError

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = ("glm-5.1.json", "glm-5.2.json", "glm-5.2-saved-by-transformers-5.23.0.json")
EDITS = int(os.environ.get("GLM5_FUZZ_EDITS", "50"))
"""For each of ten seeds."""

ODD = (None, True, False, 0, -1, 1, 2, 3, 7, 2.5, 1e300, 10**30, math.nan, "", "64", "x", [], {})
NAMES = {
    "num_local_experts": (256, 128, None, "8"),
    "num_experts": (256, 128, None, 1),
    "torch_dtype": ("bfloat16", "float8_e4m3fn", "auto", None),
    "rope_theta": (1000000, 8e6, None, "1e6", True),
    "rope_scaling": (
        None,
        {},
        {"type": "yarn", "factor": 4.0},
        {"rope_type": "default", "rope_theta": 5e5},
        {"type": "default"},
        [],
    ),
    "partial_rotary_factor": (1.0, 0.5, None),
    "index_topk_pattern": ("F" * 78, "FS" * 39, "FSX", "SF" * 39, ["full"] * 78, ["F", "S"] * 39),
    "index_topk_freq": (1, 2, 4, 5, 0, None),
    "index_skip_topk_offset": (0, 1, 2, 3, 78, None),
    "indexer_types": (["full"] * 78, ["F", "S"] * 39, "FS" * 39, ["shared"] * 78, ["full"], None),
    "mlp_layer_types": (["sparse"] * 78, ["dense"] * 77, ["x"] * 78, None),
    "layer_types": (["deepseek_sparse_attention"] * 78, ["full_attention"] * 78, None),
    "n_group": (1, 2, 4, 8),
    "topk_group": (1, 2, 4, 8),
    "tie_word_embeddings": (True,),
    "first_k_dense_replace": (0, 1, 78, 100),
    "mlp_bias": (True,),
}
ROPE = {
    "rope_type": ("default", "linear", "yarn", None, 1),
    "type": ("default", "yarn"),
    "rope_theta": (5e5, 10000, None, "x", 0, -1.0),
    "factor": (2.0,),
    "partial_rotary_factor": (0.5, 1.0),
    "indexed_attention": ({"rope_theta": 1.0},),
}


def edited(raw: dict, rng: random.Random) -> dict:
    raw = copy.deepcopy(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        fields, kind = sorted(set(raw) - {"model_type"}), rng.random()
        if kind < 0.1:
            del raw[rng.choice(fields)]
        elif kind < 0.5:
            raw[rng.choice(fields)] = rng.choice(ODD)
        elif kind < 0.75:
            name = rng.choice(sorted(NAMES))
            raw[name] = rng.choice(NAMES[name])
        elif kind < 0.85:
            name = rng.choice(sorted(ROPE))
            raw["rope_parameters"] = {
                **(raw.get("rope_parameters") or {}),
                name: rng.choice(ROPE[name]),
            }
        else:
            name = rng.choice([n for n in fields if type(raw[n]) in (int, float)] or ["vocab_size"])
            raw[name] = rng.choice((2, 0.5, 1)) * raw.get(name, 1) + rng.choice((0, 1, 2))
            if rng.random() < 0.8 and math.isfinite(raw[name]) and raw[name] == int(raw[name]):
                raw[name] = int(raw[name])
    return raw


def ours(directory: Path) -> dict:
    hf = HFConfig.from_directory(directory)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in expected_tensors(hf).items():
        if match := re.match(r"(.*\.experts\.)(\d+)\.(gate|up|down)_proj\.weight", name):
            if int(match[2]) == 0:
                rows = shape[0] * (1 if match[3] == "down" else 2)
                stacked = "down_proj" if match[3] == "down" else "gate_up_proj"
                shapes[match[1] + stacked] = (hf.n_routed_experts, rows, shape[1])
        else:
            shapes[name] = shape
    kwargs = hf.megatron_kwargs()
    width = kwargs["qk_pos_emb_head_dim"]
    frequencies = 1.0 / (
        kwargs["rotary_base"] ** (torch.arange(0, width, 2, dtype=torch.float) / width)
    )
    scale = (kwargs["qk_head_dim"] + width) ** -0.5
    return {"shapes": shapes, "frequencies": frequencies.tolist(), "scale": scale}


def theirs(directory: Path) -> dict:
    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        model = hf_modeling.GlmMoeDsaForCausalLM(config)
    tied = config.tie_word_embeddings
    return {
        "shapes": {
            name: tuple(tensor.shape)
            for name, tensor in model.state_dict().items()
            if not (tied and name == "lm_head.weight")
        },
        "frequencies": hf_modeling.GlmMoeDsaRotaryEmbedding(config).inv_freq.tolist(),
        "scale": model.model.layers[0].self_attn.scaling,
    }


@pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23),
    reason="the reading of the newest transformers is compared",
)
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(1, 10))]
)
def test_an_edited_config_is_read_as_transformers_reads_it_or_refused(seed, tmp_path):
    rng = random.Random(seed)
    accepted = 0
    for number in range(EDITS):
        published = json.loads((CONFIGS / rng.choice(FILES)).read_text())
        raw = edited(published, rng)
        (tmp_path / "config.json").write_text(json.dumps(raw))
        changed = {
            name: raw.get(name, "removed")
            for name in raw.keys() | published.keys()
            if repr(raw.get(name, ...)) != repr(published.get(name, ...))
        }
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read = ours(tmp_path)
        except CheckpointError as error:
            nested = raw.get("rope_parameters")
            names = {*changed, *(nested if isinstance(nested, dict) else ()), "rope_theta"}
            assert any(name in str(error) for name in names), (number, changed, str(error))
            assert "\n" not in str(error)
            continue
        try:
            expected = theirs(tmp_path)
        except Exception as error:
            pytest.fail(f"edit {number}, {changed}: accepted, but transformers: {error!r}")
        for what, value in expected.items():
            different = f"edit {number}, {changed}: {what} differs"
            assert read[what] == value, different
        accepted += 1
    assert accepted > EDITS // 10
