"""ms-swift's Megatron backend: its own arguments and builder, on mcore-bridge and Megatron-Bridge.

Only its arguments' ``__post_init__`` does not run, which starts NCCL; what it derives is set here.
What a CPU needs goes through its own ``megatron_extra_kwargs``.
"""

import dataclasses
import importlib.util
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import glm5_patch
from glm5_patch.attention.build import HF_LATENT_NORM_EPSILON, set_latent_norm_epsilon
from glm5_patch.patches.built import Owner, attentions_of
from glm5_patch.testing.cpu_host import CudaLiterals
from tests.clients.parity import assert_equals_hugging_face, assert_recomputes
from tests.hosts.bridge import standin
from tests.hosts.bridge.helpers import CPU
from tests.tiny import saved

if importlib.util.find_spec("swift") is None:
    pytest.skip("ms-swift is not installed", allow_module_level=True)
standin.install()

utils = pytest.importorskip("swift.megatron.model.utils", exc_type=ImportError)


def arguments(backend: str, **overrides) -> SimpleNamespace:
    """Of a command line that sets nothing but the model."""
    from megatron.core.transformer.enums import AttnBackend
    from swift.megatron.arguments.megatron_args import MegatronArguments

    args = SimpleNamespace()
    for field in dataclasses.fields(MegatronArguments):
        missing = field.default_factory is dataclasses.MISSING
        default = field.default if missing else field.default_factory()
        setattr(args, field.name, None if default is dataclasses.MISSING else default)
    args.bridge_backend = backend
    args.task_type = "causal_lm"
    args.padding_free = False  # needs the alltoall dispatcher, which needs a GPU
    args.torch_dtype = torch.float32
    args.gradient_accumulation_fusion = False  # needs apex
    args.attention_backend = AttnBackend.local
    args.megatron_extra_kwargs = {**CPU_OF[backend], **overrides}
    if overrides.get("recompute_granularity") is None:
        args.recompute_granularity = None
    if backend == "mcore-bridge":
        from mcore_bridge.model import get_mcore_model_type, get_model_meta

        args.megatron_model_meta = get_model_meta(get_mcore_model_type("glm_moe_dsa"))
    return args


CPU_OF = {
    "megatron-bridge": CPU,
    "mcore-bridge": dict(
        transformer_impl="local",
        use_cpu_initialization=True,
        moe_token_dispatcher_type="allgather",
        variable_seq_lengths=False,
        moe_grouped_gemm=False,
    ),
}


@pytest.fixture(params=["mcore-bridge", "megatron-bridge"])
def build(request, world):
    """Makes and loads a model by ms-swift."""
    backend = request.param
    package = backend.replace("-", ".", 1) if backend == "megatron-bridge" else "mcore_bridge"
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{backend} is not installed")
    if backend == "mcore-bridge":
        row = glm5_patch.status()["mcore_bridge_layers"]
        if row.state.value == "not_needed":
            pytest.skip(f"mcore-bridge builds layers of Transformer Engine here: {row.reason}")

    def make(checkpoint, **overrides):
        from transformers import AutoConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        hf_config = AutoConfig.from_pretrained(checkpoint.directory)
        # mcore-bridge puts in ropes of its own; Bridge moves the model to a GPU.
        with mock.patch.dict(ROPE_INIT_FUNCTIONS), CudaLiterals():
            (model,) = utils.get_mcore_model(arguments(backend, **overrides), hf_config)
        set_latent_norm_epsilon(model, HF_LATENT_NORM_EPSILON)
        if backend == "mcore-bridge":
            checkpoint.load_into(model)
        else:
            model.config.bridge.load_weights([model], str(checkpoint.directory))
        glm5_patch.require(model=model)
        return model

    return make


@pytest.mark.parametrize("seed", range(3))
def test_its_model_is_right(build, tmp_path, seed):
    assert_equals_hugging_face(build, tmp_path / "hf", seed)
    assert_recomputes(build, tmp_path / "hf", seed)


def test_every_layer_is_the_plugin_s(build, tmp_path):
    model = build(saved(tmp_path / "hf"))
    found = attentions_of(model)
    assert {attention.owner for attention in found} == {Owner.PLUGIN}
    assert [a.layer_number for a in found if a.core.indexer is not None] == [1, 2, 3, 7]
