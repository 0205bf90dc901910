"""Trains models that are no GLM-5 for two steps and prints all that could differ, as JSON."""

import dataclasses
import hashlib
import json
import typing

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import experimental_attention_variant_module_specs as specs
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer import multi_latent_attention as mla
from megatron.core.transformer.experimental_attention_variant import dsa
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

try:
    from megatron.core.transformer.experimental_attention_variant import absorbed_mla
except ImportError:  # megatron-core 0.16
    absorbed_mla = None

from glm5_patch.attention.local_backend import DuplicatedLinear, local_spec_provider
from glm5_patch.patches.probes.megatron_core import refuses_dsa
from glm5_patch.testing.cpu_host import single_process

SIZES = dict(
    num_layers=2,
    hidden_size=64,
    num_attention_heads=4,
    use_cpu_initialization=True,
    add_bias_linear=False,
)
# DeepSeek-V3.2's own choices of what GLM-5 has otherwise, where the release knows them.
DEEPSEEK = dict(
    experimental_attention_variant="dsa",
    multi_latent_attention=True,
    transformer_impl="local",
    normalization="RMSNorm",
    qk_layernorm=True,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_head_dim=16,
    qk_pos_emb_head_dim=16,
    v_head_dim=16,
    rope_type="yarn",
    dsa_indexer_n_heads=4,
    dsa_indexer_head_dim=32,
    dsa_indexer_topk=8,
    dsa_indexer_loss_coeff=0.1,
    dsa_indexer_rope_interleaved=False,
    dsa_indexer_rotate_activation=True,
    dsa_indexer_k_norm_epsilon=1e-6,
)


class NormAndLinear(ColumnParallelLinear):
    """What Transformer Engine's layer of that kind computes."""

    def __init__(self, input_size, output_size, *, config, **kwargs):
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size))

    def forward(self, x, *args):
        normed = torch.nn.functional.rms_norm(x, x.shape[-1:], self.layer_norm_weight)
        return super().forward(normed, *args)


def without_transformer_engine():
    provider = local_spec_provider()
    provider.column_parallel_layer_norm_linear = lambda: NormAndLinear
    specs._get_backend_spec_provider = lambda config: provider
    dsa.rotate_activation = lambda x: x.roll(1, -1)
    for module in (mla, absorbed_mla):
        if module is not None and not isinstance(getattr(module, "TELinear", None), type):
            module.TELinear = DuplicatedLinear


def trained(model):
    losses = []
    for step in range(2):
        ids = torch.randint(32, (2, 16), generator=torch.Generator().manual_seed(step))
        mask = torch.ones(1, 1, 16, 16, dtype=torch.bool).triu(1)
        loss = model(ids, torch.arange(16).expand(2, 16), mask, labels=ids.roll(-1, 1)).mean()
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode() + parameter.detach().numpy().tobytes())
    return [losses, digest.hexdigest(), str(model)]


def dense():
    config = TransformerConfig(**SIZES)
    return trained(GPTModel(config, get_gpt_layer_local_spec(), 32, 16))


def deepseek():
    known = MLATransformerConfig.__dataclass_fields__
    settings = {name: value for name, value in (SIZES | DEEPSEEK).items() if name in known}
    config = MLATransformerConfig(**settings)
    spec = specs.get_transformer_block_with_experimental_attention_variant_spec(config)
    return trained(GPTModel(config, spec, 32, 16, position_embedding_type="rope"))


def fields(config_class):
    hints = typing.get_type_hints(config_class)
    return {
        f.name: [repr(hints[f.name]), repr(f.default).split(" at 0x")[0]]
        for f in dataclasses.fields(config_class)
    }


if __name__ == "__main__":
    without_transformer_engine()
    with single_process("cpu"):
        found = {"dense": dense(), "deepseek": None if refuses_dsa() else deepseek()}
        assert parallel_state.is_initialized()
    found["fields"] = fields(MLATransformerConfig)
    print(json.dumps(found))
