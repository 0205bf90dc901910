"""One rank of two: a HybridModel whose second stage starts between a source and its skip layers.

Each rank writes ``WORLD-RANK.json``: the parameters of its stage whose gradients are not those of
the whole model, bit for bit, and the layers with gradients.
"""

from __future__ import annotations

import json
import warnings
from datetime import timedelta
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid import hybrid_block
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    model_parallel_cuda_manual_seed,
)
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from glm5_patch.attention.local_backend import LocalNorm
from glm5_patch.config.huggingface import HFConfig
from glm5_patch.testing import cpu_host
from tests.clients.stacks import layer_spec, randomized
from tests.distributed import schedule
from tests.tiny import hf_config, megatron_config, tokens

BATCH, LENGTH, MICROBATCHES = 2, 48, 3
STAGES = "D-D-D-D|-D-D-D-D-"
"""The second stage starts on an MLP, and its first attention reuses the top-k of layer 5."""
TYPES = "FSFSFSSSSSSSFSSS"
"""Of all layers, those without attention included."""
PIPELINE = dict(
    pipeline_model_parallel_size=2, pipeline_dtype=torch.float32, dsa_topk_across_stages=True
)


def build(pattern: str, **settings) -> HybridModel:
    """This rank's stage, with the weights that the whole model has."""
    config = megatron_config(
        HFConfig(hf_config().to_dict()),
        **{"num_layers": len(TYPES), "dsa_indexer_types": TYPES, "moe_layer_freq": 1, **settings},
    )
    hybrid_block.TENorm = LocalNorm  # Transformer Engine is not here
    mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    layers = hybrid_block.HybridStackSubmodules(
        dsa_layer=layer_spec(config),
        mlp_layer=ModuleSpec(
            module=MLPLayer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=LocalNorm,
                mlp=ModuleSpec(module=MLP, submodules=mlp),
                mlp_bda=get_bias_dropout_add,
            ),
        ),
    )
    return HybridModel(
        config,
        ModuleSpec(module=hybrid_block.HybridStack, submodules=layers),
        vocab_size=96,
        max_sequence_length=LENGTH,
        hybrid_layer_pattern=pattern,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    ).train()


def named(model: HybridModel) -> dict[str, torch.nn.Parameter]:
    """By the names of the whole model."""
    found = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(model.decoder.layers[int(parts[2])].layer_number)
        found[".".join(parts)] = parameter
    return found


def gradients(model: HybridModel) -> dict[str, torch.Tensor]:
    schedule.train(model, [tokens(seed, BATCH, LENGTH) for seed in range(MICROBATCHES)])
    return {name: p.grad for name, p in named(model).items() if p.grad is not None}


def main(rank: int, world: int, folder: Path) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    cpu_host.enable("cpu")
    store = torch.distributed.FileStore(str(folder / f"store-{world}"), world)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(minutes=3)
    )
    with cpu_host.CudaLiterals():
        parallel_state.initialize_model_parallel()  # each rank has the whole model
        model_parallel_cuda_manual_seed(1)
        whole = randomized(build(STAGES.replace("|", "")))
        expected = gradients(whole)
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(pipeline_model_parallel_size=world)
        stage = build(STAGES, **PIPELINE)
        with torch.no_grad():
            for name, parameter in named(stage).items():
                parameter.copy_(named(whole)[name])
        found = gradients(stage)
    result = {
        "differ": [n for n, gradient in found.items() if not torch.equal(gradient, expected[n])],
        "layers": sorted({int(n.split(".")[2]) for n in found if n.startswith("decoder.layers.")}),
    }
    (folder / f"{world}-{rank}.json").write_text(json.dumps(result))
