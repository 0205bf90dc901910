"""A patch that can't be applied: the host survives, one warning, and no GLM-5 model is built."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.activation.fresh import PATCHES, python

FAULTS = ["probe_raises", "apply_raises", "seam_renamed", "signature_changed"]
# This model is not refused for these: a stack of layers refuses to recompute without the first,
# the second is needed under fp8 only, the third only makes it fast, the fourth is needed by
# pipelines, the fifth under dsa_topk_across_stages, the sixth only writes figures, the seventh is
# needed under dsa_training_phase, and a Megatron configuration does not need the last two.
NO_MODEL_NEEDS = {
    "checkpoint_recompute",
    "te_checkpoint",
    "dsa_kernels",
    "pipeline_sends",
    "stage_shapes",
    "indexer_loss_figures",
    "training_phase",
    "hf_config_values",
    "hf_config_weights",
}
# Their wrappers look at no parameter, so that no change of signature can harm them.
READ_NOTHING = {"topk_carrier", "index_share_carrier", "checkpoint_without_te", "hf_config_values"}


def cases():
    """Every patch with one of the faults in turn; with the others nightly."""
    for number, patch in enumerate(PATCHES):
        for place, fault in enumerate(FAULTS):
            marks = [] if number % len(FAULTS) == place else [pytest.mark.nightly]
            yield pytest.param(patch, fault, id=f"{patch.id}-{fault}", marks=marks)


@pytest.fixture(scope="module")
def outcomes(request):
    """What happened after each fault, by patch and fault; (None, None) is the host as it is."""
    asked = [
        "{patch.id}:{fault}".format(**item.callspec.params)
        for item in request.session.items
        if getattr(item, "originalname", None) == "test_a_fault_is_survived_and_named"
    ]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.activation.break_hosts", *asked],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith(("{", "null"))]
    assert "null" not in lines, "a forked copy died"
    found = [json.loads(line) for line in lines]
    return {(one["patch"], one["fault"]): one for one in found}


def test_as_released_both_models_build_without_a_word(outcomes):
    assert outcomes[None, None]["warnings"] == []
    assert outcomes[None, None]["gate"] is outcomes[None, None]["require"] is None
    assert "failed" not in outcomes[None, None]["states"].values()


@pytest.mark.parametrize(("patch", "fault"), cases())
def test_a_fault_is_survived_and_named(outcomes, patch, fault):
    if (patch.id, fault) not in outcomes:
        assert fault in ("seam_renamed", "signature_changed")
        pytest.skip(f"{patch.attribute} is no function, or Python itself insists on its name")
    found = outcomes[patch.id, fault]
    assert found["other_model"] == [1, 8, 32]
    others = dict(found["states"], **{patch.id: None})
    assert others == dict(outcomes[None, None]["states"], **{patch.id: None})
    if found["state"] != "failed":
        as_released = outcomes[None, None]["states"][patch.id]
        harmless = fault == "signature_changed" and patch.id in READ_NOTHING
        assert fault != "probe_raises" and (harmless or as_released == "not_needed")
        assert (found["state"], found["warnings"], found["gate"]) == (as_released, [], None)
        pytest.skip("no parameter is read, so none is missed" if harmless else "not needed here")
    assert f"patch '{patch.id}' is not in place" in found["require"]
    assert len(found["warnings"]) == 1
    assert f"glm5-patch: {patch.id} failed on {patch.seam}" in found["warnings"][0]
    if patch.id in NO_MODEL_NEEDS:
        assert found["gate"] is None
    else:
        assert f"patch '{patch.id}' is not in place" in found["gate"]
        assert found["reason"] in found["gate"]


BREAK = """
from glm5_patch.patches import table
patch = next(p for p in table.PATCHES if p.id == "{id}")
def broken(*args): raise RuntimeError("broken on purpose")
type(patch).apply = broken
"""
# A patch of any host, and the host's import that applies it.
SEAM = "megatron.core.transformer.transformer_block"


def test_the_import_of_a_host_survives_a_fault():
    code = BREAK.format(id="gate") + f"import torch, {SEAM}\nprint('imported')"
    result = python(code, "-W", "default::RuntimeWarning")
    assert result.stdout.strip() == "imported", result.stderr
    assert result.stderr.count("glm5-patch: gate failed") == 1


def test_strict_raises_where_the_patch_fails():
    code = BREAK.format(id="gate") + f"import torch, {SEAM}"
    result = python(code, GLM5_PATCH_STRICT="1")
    assert result.returncode == 1
    assert "GLM5PatchError: glm5-patch: gate failed" in result.stderr


@pytest.mark.parametrize(
    "patch_id",
    ["gate"]
    + [
        pytest.param(name, marks=pytest.mark.nightly)
        for name in ("topk_carrier", "pipeline_split_check")
    ],
)
def test_a_needed_patch_that_was_switched_off_is_named(patch_id):
    code = """
    import torch
    from megatron.core.models.gpt import experimental_attention_variant_module_specs as specs
    from megatron.core.transformer.transformer_block import TransformerBlock
    from megatron.core.transformer.transformer_config import MLATransformerConfig
    config = MLATransformerConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, transformer_impl="local",
        experimental_attention_variant="dsa", rope_type="rope", add_bias_linear=False,
        dsa_is_glm5=True)
    for build in (
        lambda: specs.get_transformer_block_with_experimental_attention_variant_spec(config),
        lambda: TransformerBlock(config, None),
    ):
        try:
            build()
        except Exception as error:
            print(type(error).__name__, error)
    """
    out = python(code, GLM5_PATCH_DISABLE=patch_id).stdout
    assert f"GLM5PatchError patch '{patch_id}' is not in place" in out
    assert "named in GLM5_PATCH_DISABLE, but needed" in out


def test_require_refuses_a_host_that_lacks_a_module():
    code = (
        "from glm5_patch.patches import table\n"
        "gate = next(patch for patch in table.PATCHES if patch.id == 'gate')\n"
        "type(gate).module = 'megatron.core.not_there'\n"
        "import glm5_patch\n"
        "try: glm5_patch.require()\n"
        "except glm5_patch.errors.GLM5PatchError as error: print(error)\n"
    )
    assert "has no module megatron.core.not_there" in python(code).stdout
