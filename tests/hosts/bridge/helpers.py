"""From a Hugging Face directory to a model through Bridge, trained and read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from safetensors import safe_open

from glm5_patch.attention.build import HF_LATENT_NORM_EPSILON, set_latent_norm_epsilon
from glm5_patch.tools.verify import forward
from tests.tiny import hf_config, hf_model, loss_of

STEPS = 10
MLA = ["linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj", "linear_kv_up_proj"]
EXPERTS = ["*.mlp.experts.*linear_fc1", "*.mlp.experts.*linear_fc2"]


CPU = dict(
    transformer_impl="local",
    params_dtype=torch.float32,
    pipeline_dtype=torch.float32,
    use_cpu_initialization=True,
    gradient_accumulation_fusion=False,
    persist_layer_norm=False,
    bias_activation_fusion=False,
    bias_dropout_fusion=False,
    masked_softmax_fusion=False,
    moe_token_dispatcher_type="allgather",
    moe_flex_dispatcher_backend=None,
    moe_grouped_gemm=False,
    moe_permute_fusion=False,
    moe_shared_expert_overlap=False,
    make_vocab_size_divisible_by=1,
)
"""What a provider needs to be told without CUDA and Transformer Engine; none of it is of GLM-5."""


def write_checkpoint(directory: Path, flavour: str, dtype=torch.float32, **config) -> None:
    """A small random GLM-5 with a tokenizer, as Bridge expects one."""
    from tokenizers import Tokenizer, models

    hf_model(hf_config(flavour=flavour, **config)).to(dtype).save_pretrained(directory)
    words = {f"word{number}": number for number in range(96)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="word0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)


def provider_of(bridge, settings: dict):
    provider = bridge.to_megatron_provider(load_weights=False)
    for name, value in settings.items():
        setattr(provider, name, value)
    return provider


def build(bridge, settings: dict):
    """The model of this rank, loaded."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    provider = provider_of(bridge, settings)
    provider.finalize()
    provider._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    model = provider.provide(
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    if torch.cuda.is_available():
        model.cuda()
    set_latent_norm_epsilon(model, HF_LATENT_NORM_EPSILON)  # or Hugging Face computes others
    bridge.load_hf_weights([model])
    return model


def train(model, ids) -> list[float]:
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trainable, 1e-3), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(forward(model, ids), ids)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def logits(model, ids):
    with torch.no_grad():
        return forward(model.eval(), ids)


def hugging_face(places, ids, folder: Path, dtype: str = "float32") -> dict[str, torch.Tensor]:
    """Logits of saved models by the newest transformers, which Bridge may not import under.

    Args:
        places: directories, or ``DIRECTORY+ADAPTER``.
        ids: on the device to compute on.
        folder: where files may be written.
    """
    torch.save(ids, folder / "ids.pt")
    command = [dtype, folder / "ids.pt", folder / "logits.pt", *places]
    subprocess.run(
        [sys.executable, "-m", "tests.hosts.bridge.oracle", *map(str, command)],
        check=True,
        cwd=Path(__file__).parents[3],
        env={**os.environ, "PYTHONPATH": ""},
    )
    return torch.load(folder / "logits.pt")


def tensors_in(directory: Path) -> dict[str, torch.Tensor]:
    with safe_open(directory / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}
