"""slime and miles: their own builder, from Megatron-LM's own parser, makes a right GLM-5.

``MEGATRON_LM`` names a source tree of Megatron-LM, whose parser reads a command line as their
scripts for GLM-5.2 have it. Packages that they import for rollouts and tokenizers are made up where
they are absent.
"""

import importlib.util
import os
import sys
from importlib import import_module

import pytest
import torch

from glm5_patch.testing.cpu_host import CudaLiterals
from tests.clients.parity import assert_equals_hugging_face, assert_recomputes, loaded
from tests.clients.rl.packages import made_up

SOURCE = os.environ.get("MEGATRON_LM")
CLIENTS = [name for name in ("slime", "miles") if importlib.util.find_spec(name)]
if not (SOURCE and CLIENTS):
    pytest.skip(
        "neither slime nor miles is installed, or MEGATRON_LM names no source tree of Megatron-LM",
        allow_module_level=True,
    )
NOT_OF_THE_MODEL = (
    "six",
    "ray",
    "wandb",
    "sglang",
    "sglang_router",
    "httpx",
    "tensorboard",
    "aiohttp",
)
# No flag of sparse attention, of the rope's type or of its fusion; ``--kv-channels`` without the
# rotary width.
COMMAND = """
    --spec glm5_patch.attention.spec get_glm5_spec --transformer-impl local
    --num-layers 8 --hidden-size 64 --ffn-hidden-size 112 --num-attention-heads 6 --kv-channels 24
    --multi-latent-attention --q-lora-rank 48 --kv-lora-rank 56 --qk-head-dim 24
    --qk-pos-emb-head-dim 16 --v-head-dim 80 --qk-layernorm --normalization RMSNorm
    --norm-epsilon 3e-5 --disable-bias-linear --swiglu --untie-embeddings-and-output-weights
    --make-vocab-size-divisible-by 1 --vocab-size 96 --tokenizer-type NullTokenizer
    --max-position-embeddings 64 --seq-length 64 --micro-batch-size 1 --train-iters 1 --lr 1e-3
    --position-embedding-type rope --rotary-base 8000000 --attention-dropout 0 --hidden-dropout 0
    --num-experts 10 --moe-layer-freq [0]*3+[1]*5 --moe-ffn-hidden-size 72
    --moe-shared-expert-intermediate-size 144 --moe-router-topk 3
    --moe-router-score-function sigmoid --moe-router-enable-expert-bias
    --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0
    --moe-router-topk-scaling-factor 1.7 --moe-router-pre-softmax --moe-router-dtype fp32
    --moe-token-dispatcher-type allgather --use-cpu-initialization
    --no-gradient-accumulation-fusion --no-persist-layer-norm --no-masked-softmax-fusion
    --no-bias-swiglu-fusion --no-bias-dropout-fusion --distributed-backend gloo
"""


@pytest.fixture(scope="module", params=CLIENTS)
def provider_of(request):
    """The client's ``get_model_provider_func``."""
    sys.path.append(SOURCE)  # after the core that is tested
    with made_up(*NOT_OF_THE_MODEL):
        module = import_module(f"{request.param}.backends.megatron_utils.model_provider")
        yield module.get_model_provider_func
    sys.path.remove(SOURCE)


@pytest.fixture
def build(provider_of, world, monkeypatch):
    def make(checkpoint, **recompute):
        from megatron.training.arguments import parse_args, validate_args

        flags = [f"--{name.replace('_', '-')}={value}" for name, value in recompute.items()]
        monkeypatch.setattr(sys, "argv", ["train.py", *COMMAND.split(), *flags])
        with CudaLiterals():
            args = parse_args(ignore_unknown_args=True)
            validate_args(args)
            args.hf_checkpoint = str(checkpoint.directory)
            args.padded_vocab_size = 96
            args.megatron_to_hf_mode = "raw"
            model = provider_of(args)(pre_process=True, post_process=True)
        return loaded(model, checkpoint)

    return make


@pytest.mark.parametrize("seed", range(3))
def test_its_model_is_right(build, tmp_path, seed):
    assert_equals_hugging_face(build, tmp_path / "hf", seed)
    assert_recomputes(build, tmp_path / "hf", seed)


def test_the_attention_is_the_plugin_s_and_trains(build, tmp_path):
    from tests.tiny import saved, tokens

    model, ids = build(saved(tmp_path / "hf")), tokens(0, 1, 48)
    modules = {type(layer.self_attention).__module__ for layer in model.decoder.layers}
    assert modules == {"glm5_patch.attention.mla"}
    model(ids, torch.arange(48)[None], None, labels=ids).sum().backward()
    assert all(p.grad is not None or ".indexer." in n for n, p in model.named_parameters())
