"""A patch that can't be applied: the host survives, one warning, and no GLM-5 model is built."""

import pytest

from glm5_patch.patches import PATCHES
from tests.activation.test_orders import python

BUILD = """
import sys, warnings
import torch
from megatron.core.models.gpt import experimental_attention_variant_module_specs as specs
import glm5_patch
from glm5_patch.errors import GLM5PatchError
from glm5_patch.cpu_host import single_process
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel import schedules
print(glm5_patch.status()["{id}"].state.value)
small = dict(num_layers=2, hidden_size=64, num_attention_heads=4, use_cpu_initialization=True)
with single_process("cpu"):
    GPTModel(TransformerConfig(**small), get_gpt_layer_local_spec(), 32, 16)
    print("other models build")
    config = MLATransformerConfig(
        **small, experimental_attention_variant="dsa", transformer_impl="local", rope_type="rope",
        num_moe_experts=2, recompute_granularity="selective", recompute_modules=["layernorm"],
        dsa_indexer_n_heads=2, dsa_indexer_head_dim=64, dsa_indexer_topk=4, qk_layernorm=True,
        dsa_indexer_loss_coeff=0.1)
    try:
        specs.get_transformer_block_with_experimental_attention_variant_spec(config)
        TransformerBlock(config, None)
    except GLM5PatchError as error:
        print("gate:", error)
"""
BREAK = """
import glm5_patch.patches as table
patch = next(p for p in table.PATCHES if p.id == "{id}")
def broken(*args): raise RuntimeError("seam renamed")
type(patch).{method} = broken
"""

# Without these another layer speaks up, or nothing of a model build depends on them.
SPOKEN_FOR = {"checkpoint_recompute", "hf_config_values", "te_checkpoint"}
NEEDED_BY_0_19_ALONE = {"index_share_carrier", "index_share_schedule"}
ON_THIS_PATH = [p.id for p in PATCHES if p.id not in SPOKEN_FOR | NEEDED_BY_0_19_ALONE]


@pytest.mark.parametrize("method", ["needed", "apply"])
@pytest.mark.parametrize("patch_id", [i for i in ON_THIS_PATH if i != "gate"])
def test_the_gate_names_the_patch_and_the_cause(patch_id, method):
    code = BREAK.format(id=patch_id, method=method) + BUILD.format(id=patch_id)
    result = python(code, "-W", "default::RuntimeWarning")
    assert result.stdout.splitlines()[:2] == ["failed", "other models build"], result.stderr
    assert f"gate: patch '{patch_id}' is not in place" in result.stdout, result.stderr
    assert "RuntimeError: seam renamed" in result.stdout
    assert result.stderr.count(f"glm5-patch: {patch_id} failed") == 1


def test_a_failed_gate_is_reported_by_the_spec_builders():
    code = BREAK.format(id="gate", method="apply") + BUILD.format(id="gate")
    assert "gate: patch 'gate' is not in place" in python(code).stdout


@pytest.mark.parametrize("patch_id", ["dsa_spec", "topk_carrier", "pipeline_split_check"])
def test_a_needed_patch_that_was_switched_off_is_named(patch_id):
    result = python(BUILD.format(id=patch_id), GLM5_PATCH_DISABLE=patch_id)
    assert result.stdout.splitlines()[:2] == ["disabled", "other models build"], result.stderr
    assert f"gate: patch '{patch_id}' is not in place" in result.stdout
    assert "named in GLM5_PATCH_DISABLE, but needed" in result.stdout


def test_strict_raises_where_the_patch_fails():
    code = BREAK.format(id="dsa_spec", method="apply") + BUILD.format(id="dsa_spec")
    result = python(code, GLM5_PATCH_STRICT="1")
    assert result.returncode == 1
    assert "GLM5PatchError: glm5-patch: dsa_spec failed" in result.stderr


def test_require_names_a_failed_patch():
    code = BREAK.format(id="topk_carrier", method="apply") + (
        "import glm5_patch\n"
        "try: glm5_patch.require()\n"
        "except glm5_patch.errors.GLM5PatchError as error: print(error)\n"
        "try: glm5_patch.require('nonsense')\n"
        "except ValueError as error: print(error)\n"
    )
    out = python(code).stdout
    assert "patch 'topk_carrier' is not in place" in out and "no patch is called" in out


def test_require_refuses_a_host_that_lacks_a_module():
    code = (
        "import glm5_patch.patches as table\n"
        "type(table.PATCHES[-2]).module = 'megatron.core.not_there'\n"
        "import glm5_patch\n"
        "try: glm5_patch.require()\n"
        "except glm5_patch.errors.GLM5PatchError as error: print(error)\n"
    )
    assert "has no module megatron.core.not_there" in python(code).stdout
