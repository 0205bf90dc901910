"""How right one installed megatron-core is, with the plugin and as released; one JSON object.

    python -m tests.hosts.figures              patched
    python -m tests.hosts.figures --released   the host's own selection, sharing and recompute
    python -m tests.hosts.figures --seeds 1    sooner

As released a host can't build the model without Transformer Engine, CUDA and bf16. So the patches
that make it run here stay, its dispatcher is told about 'dsa' where it does not know it, and its
Hadamard rotation and fused norm are done by plain torch. What it selects and shares is its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import warnings

RUNS_HERE = {
    "local_backend",
    "local_linear",
    "local_absorbed_linear",
    "moe_without_te",
    "checkpoint_without_te",
}
INDEX_TOPK, LENGTH, BATCH = 8, 64, 2


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--released", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    released = options.released
    warnings.filterwarnings("ignore")
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # not before the switches are set
    from glm5_patch.patches.table import PATCHES
    from glm5_patch.patching.imports import import_host

    if released:
        others = {patch.id for patch in PATCHES} - RUNS_HERE
        os.environ["GLM5_PATCH_DISABLE"] = ",".join(sorted(others))
    import glm5_patch.auto  # noqa: F401
    from glm5_patch.testing.cpu_host import single_process

    if released:
        run_as_released()
    with single_process("cpu"):
        figures = {flavour: measure(flavour, released, options.seeds) for flavour in ("5.1", "5.2")}
    for patch in PATCHES:
        if patch.host == "megatron.core":
            import_host(patch.module)
    rows = [row for row in glm5_patch.status() if row.seam.startswith("megatron.core.")]
    states = {row.id: [row.state.value, row.reason] for row in rows}
    print(json.dumps({"states": states, "figures": figures}))


def run_as_released() -> None:
    import torch
    from megatron.core.models.gpt import experimental_attention_variant_module_specs as specs
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear
    from megatron.core.transformer.experimental_attention_variant import dsa

    from glm5_patch.attention.local_backend import local_spec_provider

    class NormAndLinear(ColumnParallelLinear):
        """What Transformer Engine's layer of that kind computes."""

        def __init__(self, input_size, output_size, *, config, **kwargs):
            super().__init__(input_size, output_size, config=config, **kwargs)
            self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size))

        def forward(self, x, *args):
            eps = self.config.layernorm_epsilon
            normed = torch.nn.functional.rms_norm(x, x.shape[-1:], self.layer_norm_weight, eps)
            return super().forward(normed, *args)

    def rotate(x):
        size = x.shape[-1]
        hadamard = torch.ones(1, 1)
        while len(hadamard) < size:
            pair = torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)
            hadamard = torch.cat(pair, 0)
        return x @ hadamard * size**-0.5

    type(local_spec_provider()).column_parallel_layer_norm_linear = lambda self: NormAndLinear
    dsa.rotate_activation = rotate
    dispatch = specs.get_experimental_attention_variant_module_spec

    def knows_dsa(config, backend=None):
        try:
            return dispatch(config=config, backend=backend)
        except ValueError:
            spec = specs.get_dsa_module_spec_for_backend(config=config, backend=backend)
            spec.metainfo["fuse_input_layernorm"] = False
            return spec

    specs.get_experimental_attention_variant_module_spec = knows_dsa


def measure(flavour: str, released: bool, seeds: int) -> dict | None:
    """None where the host has no index sharing and so no place for this checkpoint."""
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    fields = MLATransformerConfig.__dataclass_fields__
    if flavour == "5.2" and "dsa_indexer_topk_freq" not in fields:
        return None
    found = [_one_seed(flavour, seed, released) for seed in range(seeds)]
    return {
        "same_input": sum(one["same_input"] for one in found) / len(found),
        "end_to_end": sum(one["end_to_end"] for one in found) / len(found),
        "logits": max(one["logits"] for one in found),
        "gradients": max(one["gradients"] for one in found),
        "recompute": max(one["recompute"] for one in found),
    }


def _one_seed(flavour: str, seed: int, released: bool) -> dict[str, float]:
    import torch

    from glm5_patch.checkpoint.reader import HFCheckpoint
    from glm5_patch.testing.parity import (
        LowerTies,
        kept_share,
        recorded,
        recorded_hf,
        same_input_shares,
    )
    from glm5_patch.tools.verify import forward
    from tests.tiny import hf_config, hf_model, loss_of, tokens

    record = recorded if not released else _recorded_as_released
    # Epsilons that agree, and weights beside which they don't matter: they hide the rest.
    theirs = hf_model(hf_config(INDEX_TOPK, flavour, rms_norm_eps=1e-6), seed, small=()).eval()
    ids = tokens(seed, BATCH, LENGTH)
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        checkpoint = HFCheckpoint(directory)
        ours = _model(checkpoint).eval()
        same_input = same_input_shares(ours, theirs, ids, record)
        with torch.no_grad(), record(ours) as found, recorded_hf(theirs) as expected:
            logits, reference = forward(ours, ids), theirs(ids, use_cache=False).logits
        shares = [kept_share(found.topk_indices[n], expected[n]) for n in expected]
        ours.train()
        with LowerTies():  # in the host's own selection too
            loss_of(forward(ours, ids), ids).backward()
            loss_of(theirs(ids, use_cache=False).logits, ids).backward()
        plain = _two_microbatches(_model(checkpoint), seed)
        again = _two_microbatches(
            _model(
                checkpoint,
                recompute_granularity="full",
                recompute_method="uniform",
                recompute_num_layers=1,
            ),
            seed,
        )
    return {
        "same_input": sum(same_input.values()) / len(same_input),
        "end_to_end": sum(shares) / len(shares),
        "logits": (logits - reference).abs().max().item(),
        "gradients": _gradient_error(ours, theirs),
        "recompute": ((again - plain).norm() / plain.norm()).item(),
    }


def _model(checkpoint, **overrides):
    """Built and loaded, from the settings that this core's configuration knows."""
    import torch
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    from glm5_patch.attention.build import gpt_model

    known = MLATransformerConfig.__dataclass_fields__
    schedule = {
        "dsa_indexer_topk_freq": checkpoint.config.raw.get("index_topk_freq") or 1,
        "dsa_indexer_skip_topk_offset": checkpoint.config.raw.get("index_skip_topk_offset") or 0,
    }
    kwargs = {
        **schedule,
        **checkpoint.config.megatron_kwargs(),
        "transformer_impl": "local",
        "params_dtype": torch.float32,
        "use_cpu_initialization": True,
        "perform_initialization": False,
        "moe_token_dispatcher_type": "allgather",
        "dsa_indexer_loss_coeff": 0.0,
        **overrides,
    }
    config = MLATransformerConfig(**{k: v for k, v in kwargs.items() if k in known})
    config.dsa_is_glm5 = True  # no field as released; what makes the model run here asks for it
    model = gpt_model(checkpoint.config, config)
    checkpoint.load_into(model)
    return model


def _two_microbatches(model, seed: int):
    """The gradient of two forwards followed by two backwards."""
    import torch

    from glm5_patch.tools.verify import forward
    from tests.tiny import loss_of, tokens

    model.train()
    batches = [tokens(seed + n, BATCH, LENGTH) for n in (10, 20)]
    for loss in [loss_of(forward(model, ids), ids) for ids in batches]:
        loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _gradient_error(ours, theirs) -> float:
    """Relative error over all parameters that both sides have one by one (not the experts)."""
    import torch

    from glm5_patch.checkpoint.names import pieces

    references = dict(theirs.named_parameters())
    pairs = [
        (parameter.grad.flatten(), torch.cat([references[s].grad.flatten() for s in sources]))
        for name, parameter, sources in pieces(ours)
        if parameter.grad is not None and all(s in references for s in sources)
        if ".indexer." not in name
    ]
    mine, expected = (torch.cat(parts) for parts in zip(*pairs))
    return ((mine - expected).norm() / expected.norm()).item()


@contextlib.contextmanager
def _recorded_as_released(model):
    """``parity.recorded`` for a core whose own DSAttention computes a top-k in every layer."""
    import torch
    from megatron.core.transformer.experimental_attention_variant import dsa

    from glm5_patch.patches.probes.megatron_core import shares_topk
    from glm5_patch.testing.parity import Recording, recorded

    if shares_topk(dsa):
        with recorded(model) as found:
            yield found
        return
    recording = Recording()
    with contextlib.ExitStack() as undo:
        for layer in model.decoder.layers:
            indexer = layer.self_attention.core_attention.indexer

            def recording_forward(*args, indexer=indexer, number=layer.layer_number, **kwargs):
                scores, topk_indices = type(indexer).forward_with_scores(indexer, *args, **kwargs)
                queries = torch.arange(topk_indices.shape[1])[None, :, None]
                recording.topk_indices[number] = topk_indices.int().masked_fill(
                    topk_indices > queries, -1
                )
                return scores, topk_indices

            indexer.forward_with_scores = recording_forward
            undo.callback(delattr, indexer, "forward_with_scores")
        yield recording


if __name__ == "__main__":
    main()
