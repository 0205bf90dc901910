"""One rank of a world of real processes: a training step of every case, against one process alone.

``tests.distributed.run`` runs it. The folder holds ``cases.json``, and after a world of 1 the
weights and the reference of every batch. Each rank writes ``WORLD-RANK.json``: case -> what it
found, or its error. ``tests.distributed.files`` says what a world saves and loads.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
import zlib
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
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
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.experimental_attention_variant.dsa import DSAIndexerLossLoggingHelper

from glm5_patch import env
from glm5_patch.attention.build import mtp_block_spec
from glm5_patch.attention.loss_log import LOSSES
from glm5_patch.config.huggingface import HFConfig
from glm5_patch.errors import PipelineSplitError
from glm5_patch.testing import cpu_host
from glm5_patch.testing.halved_products import HalvedProducts
from glm5_patch.testing.models import let_go
from glm5_patch.testing.parity import recorded
from glm5_patch.topk import tokens as where_tokens_stand
from glm5_patch.topk.stages import StageTopk
from glm5_patch.training.figures import indexer_losses
from tests.distributed import schedule
from tests.distributed.adapters import adapt
from tests.distributed.cases import CONTIGUOUS, Case
from tests.tiny import hf_config, megatron_config, packed, tokens

BATCH, LENGTH = 2, 48
PACKS = (
    *([1, 20, 27], [48], [0, 9, 39], [30, 18]),
    *([9, 8, 9, 9, 8, 5], [47, 1], [6, 42], [10, 10, 10, 10, 8]),
)
"""Lengths of the documents of microbatches: one token, one document, an empty one. In the fifth
each query selects every key."""
VARIED_PACKS = ([1, 20, 27], [30], [9, 8, 7], [0, 24, 16])
VARIED_LENGTHS = (48, 30, 8, 40)
EVEN_PACKS = ([4, 20, 24], [48], [0, 8, 40], [32, 16])
REAL = ([3, 18, 0], [20], [0, 8, 10], [21, 0])
"""Tokens of the documents of even packs that are not padding, where there is padding."""
DEALT_FROM = where_tokens_stand.DEALT_FROM
BEFORE = ((100, True), (200, False), (300, True))
"""Seeds of the tokens of the steps before the one that is compared, and whether they evaluate."""
PRODUCTS = torch.ops.aten.mm.default, torch.ops.aten.bmm.default
LEARNING_RATE, ADAM_EPS = 1000.0, 1.0  # updates well above the rounding of the parameters

TIMEOUT_MINUTES = 4
"""A rank that fails alone leaves the others waiting; one that compiles an extension does too."""

build_block_spec = specs.get_transformer_block_with_experimental_attention_variant_spec


def run(case: Case, folder: Path) -> dict:
    """One step; how far loss, gradients and top-k are from one process alone."""
    with model_parallel(case), stale_topk(case):
        chunks = build(case, folder)
        for seed, forward_only in BEFORE if case.evaluates else ():
            step(replace(case, forward_only=forward_only), chunks, seed)
        if case.evaluates:  # training has changed the routers' biases
            load([chunk.module for chunk in chunks], folder / f"{case.model}.pt")
        found = logged_step(case, chunks)
        if torch.distributed.get_world_size() > 1:
            return compare(case, chunks, found, folder)
        save(case, chunks, found, folder)
        return {}


def logged_step(case: Case, chunks):
    """As ``step``, and nothing is logged but what it logs."""
    DSAIndexerLossLoggingHelper.tracker.clear()
    LOSSES.sums = None
    return step(case, chunks)


def save(case: Case, chunks, found, folder: Path) -> None:
    """The reference of a batch, and how far one process is from it that adds up in another order:
    the processor's own rounding."""
    models, (losses, topk_indices) = [chunk.module for chunk in chunks], found
    whole = reference_of(models, losses)
    load(models, folder / f"{case.model}.pt")  # training has changed the routers' biases
    with HalvedProducts(*PRODUCTS):
        losses, others = logged_step(case, chunks)
    rounding = distances(reference_of(models, losses), whole)
    if not _same_topk(topk_indices, others):
        rounding = {}  # of other keys, it would say nothing of this processor
    torch.save({**whole, "rounding": rounding}, folder / f"{case.batch}.pt")


def reference_of(models, losses) -> dict:
    """What others are compared with."""
    return {
        "gradients": gradients(models),
        "losses": losses,
        "logged": logged_indexer_losses(),
        "figures": indexer_losses(),
    }


def distances(ours: dict, theirs: dict) -> dict[str, float]:
    """Of two references of a batch, by the names that ``compare`` gives them."""
    gradients = _distance(ours["gradients"], theirs["gradients"])
    return {
        "loss": _off(dict(enumerate(ours["losses"])), dict(enumerate(theirs["losses"]))),
        "logged": _off(ours["logged"], theirs["logged"]),
        "figures": _off(ours["figures"], theirs["figures"]),
        "gradients": gradients["gradients"],
        "worst": gradients["worst"][1],
    }


def _off(ours: dict, theirs: dict) -> float:
    """The largest relative difference of numbers of the same names."""
    return max((abs(value / theirs[name] - 1) for name, value in ours.items()), default=0.0)


@contextmanager
def stale_topk(case: Case):
    """If the case asks for it, a stage finds the top-k of the microbatch before its own."""
    decode, arrived = StageTopk.decode, []

    def stale(self, layout, index_topk):
        arrived.append(decode(self, layout, index_topk))
        return arrived[max(0, len(arrived) - 2)]

    if case.stale:
        StageTopk.decode = stale
    try:
        yield
    finally:
        StageTopk.decode = decode


class model_parallel:
    """megatron-core's process groups for one case."""

    def __init__(self, case: Case):
        self.sizes = dict(
            tensor_model_parallel_size=case.tp,
            pipeline_model_parallel_size=case.pp,
            virtual_pipeline_model_parallel_size=case.vpp,
            expert_model_parallel_size=case.ep,
            context_parallel_size=case.cp,
        )

    def __enter__(self):
        parallel_state.initialize_model_parallel(
            **self.sizes, distributed_timeout_minutes=TIMEOUT_MINUTES
        )
        model_parallel_cuda_manual_seed(1)

    def __exit__(self, *_):
        parallel_state.destroy_model_parallel()
        let_go(_wrapped)


_wrapped: list[DistributedDataParallel] = []
"""The chunks of the model of the case that runs."""


def configuration(case: Case):
    settings = dict(case.settings)
    if case.pp > 1:
        settings["pipeline_dtype"] = torch.bfloat16 if case.bf16 else torch.float32
    if case.bf16:
        settings.update(params_dtype=torch.bfloat16, bf16=True)
    os.environ[env.TENSOR_PARALLEL] = case.shares
    where_tokens_stand.DEALT_FROM = 0 if case.deals else DEALT_FROM
    hf = HFConfig(hf_config(num_attention_heads=case.heads).to_dict())
    config = megatron_config(
        hf,
        tensor_model_parallel_size=case.tp,
        pipeline_model_parallel_size=case.pp,
        virtual_pipeline_model_parallel_size=case.vpp,
        expert_model_parallel_size=case.ep,
        context_parallel_size=case.cp,
        dsa_indexer_loss_coeff=case.indexer_loss,
        **case.loss,
        **settings,
    )
    config.finalize_model_grads_func = finalize_model_grads
    # Set late: a configuration with experts takes it only with dispatchers that need CUDA.
    config.variable_seq_lengths = case.varies
    return hf, config


def build(case: Case, folder: Path) -> list[DistributedDataParallel]:
    """This rank's model chunks, with their part of the weights."""
    models = built(case)
    for model in models if case.adapters else ():
        adapt(model)
    load(models, folder / f"{case.model}.pt")
    freeze(models, case.trains_from)
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=case.distributed_optimizer)
    _wrapped.extend(DistributedDataParallel(model.config, ddp_config, model) for model in models)
    return list(_wrapped)


def built(case: Case, padding: int = 0) -> list[GPTModel]:
    """This rank's model chunks, with so many tokens more than the configuration has."""
    hf, config = configuration(case)
    models = []
    for vp_stage in range(case.vpp) if case.vpp else (None,):
        if case.vpp:
            parallel_state.set_virtual_pipeline_model_parallel_rank(vp_stage)
        spec = build_block_spec(config, vp_stage=vp_stage)
        ends = dict(ignore_virtual=False, vp_stage=vp_stage)
        models.append(
            GPTModel(
                config=config,
                transformer_layer_spec=spec,
                vocab_size=hf.vocab_size + padding,
                max_sequence_length=4096,
                pre_process=parallel_state.is_pipeline_first_stage(**ends),
                post_process=parallel_state.is_pipeline_last_stage(**ends),
                position_embedding_type="none",
                vp_stage=vp_stage,
                mtp_block_spec=mtp_block_spec(config, spec, vp_stage),
            )
        )
    return models


def load(models, path: Path) -> None:
    """Random weights by name in a world of one, which saves them; this rank's part elsewhere."""
    alone = torch.distributed.get_world_size() == 1
    whole = {} if alone else torch.load(path)
    with torch.no_grad():
        for name, tensor in tensors(models):
            if alone:
                whole[name] = _random(name, tensor)
            tensor.copy_(part(name, whole[name], tensor))
    if alone:
        torch.save(whole, path)


def freeze(models, trains_from: int) -> None:
    """The embedding and the layers before this one; nothing if it is the first."""
    for name, tensor in tensors(models) if trains_from > 1 else ():
        parts = name.split(".")
        layer = int(parts[2]) + 1 if parts[:2] == ["decoder", "layers"] else None
        if parts[0] == "embedding" or (layer is not None and layer < trains_from):
            tensor.requires_grad_(False)


def _random(name: str, like: torch.Tensor) -> torch.Tensor:
    """Weights under which a wrong norm, bias or selection shows."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    values = torch.randn(like.shape, generator=generator)
    if name.endswith(("expert_bias", "bias")):
        return values * 0.1
    if values.dim() == 1:
        return values * 0.3 + 1
    return values * like.shape[-1] ** -0.5


def tensors(models):
    """Parameters and expert biases, by the names that one whole model gives them."""
    for model in models:
        named = dict(model.named_parameters())
        named.update({n: t for n, t in model.named_buffers() if n.endswith("expert_bias")})
        for name, tensor in named.items():
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[2] = str(model.decoder.layers[int(parts[2])].layer_number - 1)
            if "local_experts" in parts:
                at = parts.index("local_experts")
                experts = model.get_submodule(".".join(name.split(".")[: at + 1]))
                first = parallel_state.get_expert_model_parallel_rank() * len(experts)
                parts[at + 1] = str(int(parts[at + 1]) + first)
            yield ".".join(parts), tensor


def part(name: str, whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The slice of a whole tensor that this tensor-parallel rank holds."""
    split = [d for d in range(whole.dim()) if whole.shape[d] != like.shape[d]]
    if not split:
        return whole
    size = whole.shape[split[0]] // like.shape[split[0]]
    rank = parallel_state.get_tensor_model_parallel_rank()
    # Gate and up projection are split each by itself.
    halves = whole.chunk(2, 0) if "linear_fc1" in name else (whole,)
    return torch.cat([half.chunk(size, split[0])[rank] for half in halves], split[0])


def batches(case: Case, seed: int = 0):
    """This data-parallel rank's microbatches: ids, labels, positions, packed_seq_params."""
    for number in range(parallel_state.get_data_parallel_rank(), case.microbatches, _dp_size()):
        length = VARIED_LENGTHS[number % len(VARIED_LENGTHS)] if case.varies else LENGTH
        if case.thd:
            packs = EVEN_PACKS if case.even_packs else VARIED_PACKS if case.varies else PACKS
            lengths = packs[number % len(packs)]
            ids, pack = tokens(seed + number, 1, sum(lengths)), packed(lengths)
            if case.padding:
                pack.cu_seqlens_q_padded = pack.cu_seqlens_kv_padded = pack.cu_seqlens_q
                pack.cu_seqlens_q = pack.cu_seqlens_kv = packed(
                    REAL[number % len(REAL)]
                ).cu_seqlens_q
            positions = torch.cat([torch.arange(n) for n in lengths])[None]
        else:
            ids, pack = tokens(seed + number, BATCH, length), None
            positions = torch.arange(length).expand_as(ids)
        own = own_positions(case, lengths if case.thd else [length])
        yield ids[:, own], ids.roll(-1, 1)[:, own], positions[:, own], pack


def own_positions(case: Case, lengths: list[int]) -> torch.Tensor:
    """This rank's tokens of documents of these lengths, in Megatron-LM's order or contiguous."""
    rank = parallel_state.get_context_parallel_rank()
    size = parallel_state.get_context_parallel_world_size()
    if case.settings.items() >= CONTIGUOUS.items():
        return torch.arange(sum(lengths)).chunk(size)[rank]
    if size == 1:
        return torch.arange(sum(lengths))
    documents = torch.arange(sum(lengths)).split(lengths)
    chunks = [document.view(2 * size, -1) for document in documents]
    return torch.cat([torch.cat([c[rank], c[2 * size - 1 - rank]]) for c in chunks])


def _dp_size() -> int:
    return parallel_state.get_data_parallel_world_size()


def step(case: Case, chunks, seed: int = 0):
    """Forward and backward of all microbatches by the host's own schedule.

    Returns:
        The loss of each microbatch, where it is computed, and of each forward the tokens and the
        top-k.
    """
    own = list(batches(case, seed))
    found: list[tuple[int, dict[int, torch.Tensor]]] = []

    def forward_step(iterator, model):
        ids, labels, positions, pack = next(iterator)
        with recorded(model.module) as recording:
            output = model(ids, positions, None, labels=labels, packed_seq_params=pack)
        found.append((ids.shape[1], dict(recording.topk_indices)))
        return output, loss

    def loss(output):
        """The mean over the tokens of all context-parallel ranks; theirs are added up."""
        own = output.sum() / (output.numel() * parallel_state.get_context_parallel_world_size())
        whole = own.detach().clone()
        torch.distributed.all_reduce(whole, group=parallel_state.get_context_parallel_group())
        return own, {"loss": whole}

    for chunk in chunks:
        chunk.train(not case.forward_only)
        chunk.zero_grad_buffer()
    reduced = schedule.run(
        chunks,
        own,
        forward_step,
        length=LENGTH,
        micro_batch_size=1 if case.thd else BATCH,
        decoder_seq_length=LENGTH,
        forward_only=case.forward_only,
    )
    return [one["loss"].item() for one in reduced], found


def compare(case: Case, chunks, found, folder: Path) -> dict:
    """How far this rank's part of a step is from the reference, and the processor's rounding."""
    models, (losses, topk_indices) = [chunk.module for chunk in chunks], found
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    expected = case.microbatches // _dp_size() if last else 0
    if len(losses) != expected:
        raise AssertionError(f"{len(losses)} losses, where this rank computes {expected}")
    values = after_optimizer(case, chunks) if case.distributed_optimizer else gradients(models)
    reference = torch.load(folder / f"{case.batch}.pt")
    own_losses = reference["losses"][parallel_state.get_data_parallel_rank() :: _dp_size()]
    result = {
        "loss": _off(dict(enumerate(losses)), dict(enumerate(own_losses))),
        "topk_equal": _same_on_all_tensor_parallel_ranks(topk_indices, case),
        "rounding": reference["rounding"],
    }
    if case.forward_only:
        return result
    if _dp_size() == 1:
        result["logged"] = _off(logged_indexer_losses(), reference["logged"])
    figures = indexer_losses()
    if figures.keys() != reference["figures"].keys():
        raise AssertionError(f"losses of {list(figures)}, where one process has others")
    result["figures"] = _off(figures, reference["figures"])
    expected = {n: part(n, reference["gradients"][n], value) for n, value in values.items()}
    if case.distributed_optimizer:
        before = torch.load(folder / f"{case.model}.pt")
        values = {n: value - part(n, before[n], value) for n, value in values.items()}
        expected = {n: _adam_update(gradient) for n, gradient in expected.items()}
    if not values and case.trains_from > 1 and not trained(models):
        return {**result, "gradients": 0.0, "worst": ["none", 0.0], "computing": []}
    return {**result, **_distance(values, expected)}


def trained(models) -> list[str]:
    """The parameters that are not frozen."""
    return [name for name, tensor in tensors(models) if tensor.requires_grad]


def logged_indexer_losses() -> dict[int, float]:
    """Layer number -> what is logged of its indexer, as the host adds it up over the ranks."""
    DSAIndexerLossLoggingHelper.reduce_loss_in_tracker()
    values = DSAIndexerLossLoggingHelper.tracker.get("values", torch.zeros(0)).tolist()
    return {number: loss for number, loss in enumerate(values, 1) if loss}


def gradients(models) -> dict[str, torch.Tensor]:
    return {
        name: parameter.main_grad.clone()
        for name, parameter in tensors(models)
        if hasattr(parameter, "main_grad")
    }


def after_optimizer(case: Case, chunks) -> dict[str, torch.Tensor]:
    """The parameters after a first step of Adam by the host's distributed optimizer."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=LEARNING_RATE,
        adam_eps=ADAM_EPS,
        weight_decay=0.0,
        clip_grad=0.0,
        params_dtype=torch.float32,
        use_distributed_optimizer=True,
    )
    get_megatron_optimizer(config, chunks).step()
    return {
        name: tensor.detach().clone()
        for name, tensor in tensors([chunk.module for chunk in chunks])
        if isinstance(tensor, torch.nn.Parameter)
    }


def _adam_update(gradient: torch.Tensor) -> torch.Tensor:
    """Of the first step, where the moments are the gradient and its square."""
    return -LEARNING_RATE * gradient / (gradient.abs() + ADAM_EPS)


def _distance(values, expected) -> dict:
    """Relative L2 errors: over everything that this rank holds, and of the worst parameter."""
    if not values:
        raise AssertionError("no parameter of this rank has a gradient")
    squares = [
        ((v - expected[n]).square().sum(), expected[n].square().sum()) for n, v in values.items()
    ]
    total = torch.tensor(squares).sum(0)
    each = {
        n: ((v - expected[n]).norm() / expected[n].norm()).item()
        for n, v in values.items()
        if expected[n].any()
    }
    worst = max(each, key=each.get)
    return {
        "gradients": (total[0] / total[1]).sqrt().item(),
        "worst": [worst, each[worst]],
        "computing": sorted(
            {
                int(n.split(".")[2]) + 1
                for n in values
                if ".indexer." in n and n.startswith("decoder")
            }
        ),
    }


def _same_on_all_tensor_parallel_ranks(found, case: Case) -> bool:
    """Whether all ranks select the same keys; where they share the tokens out, whether each selects
    for an equal part of them."""
    group = parallel_state.get_tensor_model_parallel_group()
    everyone = [None] * group.size()
    torch.distributed.all_gather_object(everyone, found, group=group)
    if case.shares_tokens:
        return all(
            topk.shape[1] == length // group.size()
            for rank in everyone
            for length, one in rank
            for topk in one.values()
        )
    return all(_same_topk(found, other) for other in everyone)


def _same_topk(found, other) -> bool:
    """Whether two steps selected the same keys in each forward and layer."""
    return all(
        mine.keys() == others.keys() and all(torch.equal(mine[n], others[n]) for n in mine)
        for (_, mine), (_, others) in zip(found, other, strict=True)
    )


def refused_split(case: Case) -> str:
    """What every rank says of stages that start on a skip layer."""
    with model_parallel(case):
        try:
            build_block_spec(configuration(case)[1])
        except PipelineSplitError as error:
            return str(error)
    return "not refused"


def main(rank: int, world: int, folder: Path) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    cpu_host.enable("cpu")
    store = torch.distributed.FileStore(str(folder / f"store-{world}"), world)
    timeout = timedelta(minutes=TIMEOUT_MINUTES)
    results: dict[str, object] = {}

    def attempt(name: str, action, *args) -> None:
        """In a world of its own: the threads of its process groups end with it."""
        own = torch.distributed.PrefixStore(name, store)
        torch.distributed.init_process_group(
            "gloo", store=own, rank=rank, world_size=world, timeout=timeout
        )
        try:
            with cpu_host.CudaLiterals():
                results[name] = action(*args)
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"}
            print(f"rank {rank}, {name}:\n{traceback.format_exc()}", file=sys.stderr)
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()

    for fields in json.loads((folder / "cases.json").read_text())[str(world)]:
        case = Case(**fields)
        attempt(case.name, run, case, folder)
    from tests.distributed.files import Files  # here: it builds its models by this module

    for name, action, arguments in Files.read(folder).attempts(world, folder):
        attempt(name, action, *arguments)
    if world > 1:
        attempt("refused", refused_split, Case("", pp=world))
    (folder / f"{world}-{rank}.json").write_text(json.dumps(results))
