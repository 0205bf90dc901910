"""One rank of a world of real processes: a training step of every case, against one process alone.

    python -m tests.distributed.worker RANK WORLD FOLDER

FOLDER holds ``cases.json``, a Hugging Face checkpoint ``hf``, and after a run with WORLD 1 the
reference of every batch. Each rank writes ``RANK.json``: case -> what it found.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import experimental_attention_variant_module_specs as specs
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from glm5_patch import cpu_host
from glm5_patch.model.checkpoint import HFCheckpoint
from glm5_patch.model.parity import recorded
from tests.patches.test_recompute import packed
from tests.tiny import megatron_config, tokens

MICROBATCHES, BATCH, LENGTH = 4, 2, 48
PACKS = ([1, 20, 27], [48], [0, 9, 39], [30, 18])
"""Lengths of the documents of each microbatch: one token, one document, an empty one."""


@dataclass
class Case:
    """A way to split the model, and what is trained on."""

    name: str
    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    ep: int = 1
    cp: int = 1
    thd: bool = False
    indexer_loss: float | None = None
    distributed_optimizer: bool = False
    settings: dict = field(default_factory=dict)

    @property
    def world(self) -> int:
        return max(self.tp * self.pp * self.cp, self.ep)

    @property
    def batch(self) -> str:
        """Cases of the same batch have the same gradients."""
        return f"thd={self.thd},indexer_loss={self.indexer_loss}"


def run(case: Case, folder: Path) -> dict:
    """One training step; how far loss, gradients and top-k are from one process alone."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=case.tp,
        pipeline_model_parallel_size=case.pp,
        virtual_pipeline_model_parallel_size=case.vpp,
        context_parallel_size=case.cp,
        expert_model_parallel_size=case.ep,
    )
    try:
        model_parallel_cuda_manual_seed(1)
        chunks = build(case, folder)
        losses, topk_indices = step(case, chunks)
        return compare(case, chunks, losses, topk_indices, folder)
    finally:
        parallel_state.destroy_model_parallel()


def build(case: Case, folder: Path) -> list:
    checkpoint = HFCheckpoint(folder / "hf")
    settings = dict(case.settings)
    if case.pp > 1:
        settings["pipeline_dtype"] = torch.float32
    config = megatron_config(
        checkpoint,
        tensor_model_parallel_size=case.tp,
        pipeline_model_parallel_size=case.pp,
        virtual_pipeline_model_parallel_size=case.vpp,
        context_parallel_size=case.cp,
        expert_model_parallel_size=case.ep,
        dsa_indexer_loss_coeff=case.indexer_loss,
        **settings,
    )
    config.finalize_model_grads_func = finalize_model_grads
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=case.distributed_optimizer, overlap_grad_reduce=False
    )
    chunks = []
    for vp_stage in range(case.vpp) if case.vpp else (None,):
        if case.vpp:
            parallel_state.set_virtual_pipeline_model_parallel_rank(vp_stage)
        spec = specs.get_transformer_block_with_experimental_attention_variant_spec(
            config, vp_stage=vp_stage
        )
        ends = dict(ignore_virtual=False, vp_stage=vp_stage)
        model = GPTModel(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=checkpoint.config.vocab_size,
            max_sequence_length=4096,
            pre_process=parallel_state.is_pipeline_first_stage(**ends),
            post_process=parallel_state.is_pipeline_last_stage(**ends),
            position_embedding_type="none",
            vp_stage=vp_stage,
        )
        chunks.append(model)
    load(chunks, checkpoint, folder / "whole.pt")
    return [DistributedDataParallel(config, ddp_config, model) for model in chunks]


def load(chunks, checkpoint, whole: Path) -> None:
    """This rank's part of the whole model."""
    if torch.distributed.get_world_size() == 1:
        checkpoint.load_into(chunks[0])
        torch.save({n: t.detach().clone() for n, t in tensors(chunks)}, whole)
        return
    values = torch.load(whole)
    with torch.no_grad():
        for name, tensor in tensors(chunks):
            tensor.copy_(part(name, values[name], tensor))


def tensors(chunks):
    """Parameters and expert biases by the names that one whole model gives them."""
    for chunk in chunks:
        layers = chunk.decoder.layers
        named = dict(chunk.named_parameters())
        named.update({n: t for n, t in chunk.named_buffers() if n.endswith("expert_bias")})
        for name, tensor in named.items():
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[2] = str(layers[int(parts[2])].layer_number - 1)
            if "local_experts" in parts:
                at = parts.index("local_experts") + 1
                count = len(layers[int(name.split(".")[2])].mlp.experts.local_experts)
                first = parallel_state.get_expert_model_parallel_rank() * count
                parts[at] = str(int(parts[at]) + first)
            yield ".".join(parts), tensor


def part(name: str, whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The slice of a whole tensor that a tensor-parallel rank holds."""
    split = [d for d in range(whole.dim()) if whole.shape[d] != like.shape[d]]
    if not split:
        return whole
    rank, size = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    # Gate and up projection are split each by itself.
    halves = whole.chunk(2, 0) if "linear_fc1" in name else (whole,)
    return torch.cat([half.chunk(size, split[0])[rank] for half in halves], split[0])


def batches(case: Case):
    """This data-parallel rank's microbatches, [ids, labels, positions, packed_seq_params]."""
    rank, size = (
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )
    for number in range(rank, MICROBATCHES, size):
        if case.thd:
            lengths = PACKS[number]
            ids, pack = tokens(number, 1, LENGTH), packed(lengths)
            positions = torch.cat([torch.arange(n) for n in lengths])[None]
        else:
            ids, pack = tokens(number, BATCH, LENGTH), None
            positions = torch.arange(LENGTH).expand_as(ids)
        yield ids, ids.roll(-1, 1), positions, pack


def step(case: Case, chunks):
    """Forward and backward of all microbatches by the host's own schedule."""
    own = list(batches(case))
    found: list[dict[int, torch.Tensor]] = []

    def forward_step(iterator, model):
        ids, labels, positions, pack = next(iterator)
        with recorded(model.module) as recording:
            output = model(ids, positions, None, labels=labels, packed_seq_params=pack)
        found.append(recording.topk_indices)
        return output, lambda output: (output.mean(), {"loss": output.detach().mean()})

    for chunk in chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    iterators = [iter(own) for _ in chunks]
    reduced = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(own),
        seq_length=LENGTH,
        micro_batch_size=1 if case.thd else BATCH,
        decoder_seq_length=LENGTH,
        forward_only=False,
    )
    return [one["loss"].item() for one in reduced], found


def compare(case: Case, chunks, losses, topk_indices, folder: Path) -> dict:
    gradients = {
        name: parameter.main_grad.clone()
        for name, parameter in tensors([chunk.module for chunk in chunks])
        if getattr(parameter, "main_grad", None) is not None
    }
    reference = folder / f"{case.batch}.pt"
    if torch.distributed.get_world_size() == 1:
        torch.save({"gradients": gradients, "losses": losses}, reference)
        return {"loss": losses}
    expected = torch.load(reference)
    rank, size = (
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )
    own_losses = expected["losses"][rank::size]
    pairs = {n: (g, part(n, expected["gradients"][n], g)) for n, g in gradients.items()}
    if case.distributed_optimizer:
        pairs = {}
    errors = {n: ((a - b).norm() / b.norm().clamp_min(1e-12)).item() for n, (a, b) in pairs.items()}
    total = torch.tensor(
        [sum((a - b).square().sum().item() for a, b in pairs.values())]
        + [sum(b.square().sum().item() for _, b in pairs.values())]
    )
    worst = max(errors, key=errors.get)
    return {
        "loss": max((abs(a - b) for a, b in zip(losses, own_losses)), default=0.0),
        "gradients": (total[0] / total[1]).sqrt().item(),
        "worst": [worst, errors[worst]],
        "computing": sorted({int(n.split(".")[2]) + 1 for n in gradients if ".indexer." in n}),
        "topk_equal": _same_on_all_tensor_parallel_ranks(topk_indices),
    }


def _same_on_all_tensor_parallel_ranks(found) -> bool:
    group = parallel_state.get_tensor_model_parallel_group()
    everyone = [None] * group.size()
    torch.distributed.all_gather_object(everyone, found, group=group)
    return all(
        torch.equal(mine[layer], others[layer])
        for other in everyone
        for mine, others in zip(found, other)
        for layer in mine
    )


def main(rank: int, world: int, folder: Path) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    cpu_host.enable("cpu")
    store = torch.distributed.FileStore(str(folder / f"store-{world}"), world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    results = {}
    for fields in json.loads((folder / "cases.json").read_text())[str(world)]:
        case = Case(**fields)
        try:
            with cpu_host.CudaLiterals():
                results[case.name] = run(case, folder)
        except Exception as error:
            results[case.name] = {"error": f"{type(error).__name__}: {error}"}
            print(f"rank {rank}, {case.name}:\n{traceback.format_exc()}", file=sys.stderr)
        torch.distributed.barrier()
    (folder / f"{world}-{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
