"""On a GPU, with real Transformer Engine and without any stand-in: what users run."""

import importlib.util
import shutil

import pytest
import torch

from glm5_patch.patches.probes.megatron_core import has_transformer_engine
from glm5_patch.testing.cpu_host import single_process
from tests.hosts.bridge.helpers import (
    EXPERTS,
    MLA,
    build,
    hugging_face,
    logits,
    tensors_in,
    train,
    write_checkpoint,
)
from tests.tiny import add_mtp_layer, relative, tokens

if importlib.util.find_spec("megatron.bridge") is None:
    pytest.skip("megatron-bridge is not installed", allow_module_level=True)
if not torch.cuda.is_available() or not has_transformer_engine():
    pytest.skip("needs CUDA and Transformer Engine", allow_module_level=True)

from megatron.bridge import AutoBridge
from megatron.bridge.peft.lora import LoRA

BF16 = dict(
    bf16=True,
    params_dtype=torch.bfloat16,
    pipeline_dtype=torch.bfloat16,
    gradient_accumulation_fusion=False,  # needs Apex
    moe_token_dispatcher_type="alltoall",  # the default of 0.6, HybridEP, is a package of its own
    moe_flex_dispatcher_backend=None,
    moe_shared_expert_overlap=False,
)


@pytest.fixture(scope="module")
def gpu_world():
    with single_process("cuda"):
        yield


@pytest.fixture(scope="module", params=["5.2", "5.1"])
def source(request, gpu_world, tmp_path_factory):
    directory = tmp_path_factory.mktemp("bridge") / "source"
    write_checkpoint(directory, request.param, torch.bfloat16, kv_lora_rank=64, index_n_heads=16)
    return directory


@pytest.fixture
def bridge(source):
    return AutoBridge.from_hf_pretrained(str(source))


@pytest.fixture
def ids():
    return tokens(3, 2, 64).cuda()


def assert_as_near_as_hugging_face(ours, directory, ids):
    """In bf16 one flipped key changes all that follows: no farther from fp32 than its own bf16."""
    exact, rounded = (
        hugging_face([directory], ids, directory.parent, dtype)[str(directory)]
        for dtype in ("float32", "bfloat16")
    )
    assert relative(ours.float(), exact) < 1.5 * relative(rounded, exact)


def test_there_and_back(bridge, source, ids, tmp_path):
    model = build(bridge, BF16)
    assert_as_near_as_hugging_face(logits(model, ids), source, ids)
    bridge.save_hf_pretrained([model], str(tmp_path / "written"))
    before, after = tensors_in(source), tensors_in(tmp_path / "written")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_ten_lora_steps(bridge, source, ids, tmp_path):
    lora = LoRA(target_modules=[*MLA, "linear_proj", *EXPERTS], dim=16, alpha=32)
    chunks = lora([build(bridge, BF16)], training=True)
    before = logits(chunks[0], ids)
    losses = train(chunks[0], ids)
    assert losses[-1] < losses[0] - 0.05
    trainable = {n for n, p in chunks[0].named_parameters() if p.requires_grad}
    assert trainable and all(".adapter." in name for name in trainable)
    after = logits(chunks[0], ids)
    assert (after - before).abs().max() > 0.1
    bridge.save_hf_pretrained(chunks, str(tmp_path / "merged"))
    assert_as_near_as_hugging_face(after, tmp_path / "merged", ids)


def test_ten_full_steps(bridge, ids, tmp_path):
    model = build(bridge, BF16)
    losses = train(model, ids)
    assert losses[-1] < losses[0] - 0.05
    bridge.save_hf_pretrained([model], str(tmp_path / "full"))
    assert_as_near_as_hugging_face(logits(model, ids), tmp_path / "full", ids)


def test_the_mtp_layer_goes_there_and_back(source, tmp_path):
    directory = shutil.copytree(source, tmp_path / "with_mtp")
    made = add_mtp_layer(directory)
    bridge = AutoBridge.from_hf_pretrained(str(directory))
    model = build(bridge, {**BF16, "mtp_num_layers": 1})
    bridge.save_hf_pretrained([model], str(tmp_path / "written"))
    after = tensors_in(tmp_path / "written")
    assert made.keys() <= after.keys()
    assert all(torch.equal(made[name], after[name]) for name in made)
