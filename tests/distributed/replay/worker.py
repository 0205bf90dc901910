"""One rank of a world that replays a recording; ``tests.distributed.run`` starts it.

A world of 1 records a model whose indexers have other weights, and replays it. The others replay
it too: a forward without gradients, then a training step with the microbatches in another order.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from megatron.core import parallel_state

from glm5_patch.attention.attention import CrossLayerDSAttention
from glm5_patch.testing import cpu_host
from glm5_patch.topk.record import TopkRecording, record_topk
from glm5_patch.topk.replay import replay_topk
from tests.distributed import schedule
from tests.distributed.cases import FULL, Case
from tests.distributed.worker import (
    BATCH,
    EVEN_PACKS,
    LENGTH,
    TIMEOUT_MINUTES,
    batches,
    build,
    model_parallel,
    own_positions,
)


def passes(case: Case, chunks, recordings, reverse: bool, forward_only: bool):
    """All microbatches by the host's own schedule.

    Returns:
        By microbatch: what the model returned, what was recorded in each chunk, the top-k of each
        layer in the forward, and in the recompute.
    """
    dp, size = (
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )
    own = list(zip(range(dp, case.microbatches, size), batches(case)))
    own = own[::-1] if reverse else own
    outputs, recorders, topk, recomputed = {}, {}, {}, {}
    running = []

    def observe(core, _, topk_indices):
        layer = core.topk_source.name
        if running:
            topk.setdefault(running[-1], {})[layer] = topk_indices
        else:  # in the backward, which takes the microbatches of a layer in order
            recomputed.setdefault(layer, []).append(topk_indices)

    for core in attentions(chunks):
        core.observer = partial(observe, core)

    def forward_step(iterator, model):
        number, (ids, labels, positions, pack) = next(iterator)
        running.append(number)
        with replay_topk(recordings[number]), record_topk() as recorder:
            output = model(ids, positions, None, labels=labels, packed_seq_params=pack)
        running.pop()
        recorders.setdefault(number, []).append(recorder)
        if model.module.post_process:
            outputs[number] = output.detach().clone()
        return output, lambda output: (output.mean(), {"loss": output.detach().mean()})

    for chunk in chunks:
        chunk.train(not forward_only)
        chunk.zero_grad_buffer()
    schedule.run(
        chunks,
        own,
        forward_step,
        length=LENGTH,
        micro_batch_size=1 if case.thd else BATCH,
        decoder_seq_length=LENGTH,
        forward_only=forward_only,
    )
    found = {n: [one.recordings for one in of_chunks] for n, of_chunks in recorders.items()}
    again: dict[int, dict[int, torch.Tensor]] = {}
    for layer, of_layer in recomputed.items():
        for (number, _), topk_indices in zip(own, of_layer, strict=True):
            again.setdefault(number, {})[layer] = topk_indices
    return outputs, found, topk, again


def attentions(chunks) -> list[CrossLayerDSAttention]:
    return [m for chunk in chunks for m in chunk.modules() if isinstance(m, CrossLayerDSAttention)]


def recording_paths(folder: Path, case: Case, number: int) -> list[Path]:
    documents = len(EVEN_PACKS[number % len(EVEN_PACKS)]) if case.thd else BATCH
    kind = f"{case.model}-{'thd' if case.thd else 'bshd'}"
    return [folder / f"{kind}-{number}-{document}.topk" for document in range(documents)]


def losses_path(folder: Path, case: Case) -> Path:
    """Microbatch -> the losses of its tokens, as one process replays it."""
    return folder / f"{case.model}-{'thd' if case.thd else 'bshd'}-losses.pt"


def roll_out(case: Case, folder: Path) -> dict:
    """Record, in one process, with indexers of other weights, and replay; how many keys the model's
    own would have selected."""
    with model_parallel(case):
        chunks = build(case, folder)  # saves its weights
        own = {n: p.clone() for n, p in chunks[0].named_parameters() if ".indexer." in n}
        with torch.no_grad():
            for name, parameter in chunks[0].named_parameters():
                if name in own:
                    parameter.copy_(parameter.flip(0))
        model, everything, losses = chunks[0].module, [], {}
        for number, (ids, labels, positions, pack) in enumerate(batches(case)):
            with torch.no_grad(), record_topk() as recorder:
                model(ids, positions, None, labels=labels, packed_seq_params=pack)
            for recording, path in zip(
                recorder.recordings, recording_paths(folder, case, number), strict=True
            ):
                recording.save(path)
            everything.append(recorder.recordings)
        with torch.no_grad():
            for name, parameter in chunks[0].named_parameters():
                if name in own:
                    parameter.copy_(own[name])
            for number, (ids, labels, positions, pack) in enumerate(batches(case)):
                with replay_topk(everything[number], report=True) as report:
                    losses[number] = model(
                        ids, positions, None, labels=labels, packed_seq_params=pack
                    )
        torch.save(losses, losses_path(folder, case))
        shares = {str(n): share for n, share in report.shares.items()}
        return {"shares": shares | {f"MTP {n}": share for n, share in report.mtp_shares.items()}}


def replay(case: Case, folder: Path) -> dict:
    """What differs between the two passes, between what was recorded and what is attended to, and
    from one process; how far the losses of the tokens are from those of one process."""
    recordings = {
        number: [TopkRecording.load(path) for path in recording_paths(folder, case, number)]
        for number in range(case.microbatches)
    }
    with model_parallel(case):
        chunks = build(case, folder)
        without = passes(case, chunks, recordings, reverse=False, forward_only=True)
        training = passes(case, chunks, recordings, reverse=True, forward_only=False)
        wrong = [
            f"microbatch {number}: other log-probabilities"
            for number, output in without[0].items()
            if not torch.equal(output, training[0][number])
        ]
        for what, topk in (("training forward", training[2]), ("recompute", training[3])):
            if what == "recompute" and not case.settings.items() >= FULL.items():
                continue
            wrong += [
                f"microbatch {number}, {layer}: other keys in the {what}"
                for number, of_layers in without[2].items()
                for layer, keys in of_layers.items()
                if not torch.equal(keys, topk[number][layer])
            ]
        alone = torch.load(losses_path(folder, case))
        return {
            "wrong": wrong + unlike(recordings, without[1]),
            "outputs": len(without[0]),
            "loss": max((off(case, n, one, alone[n]) for n, one in without[0].items()), default=0),
        }


def off(case: Case, number: int, losses: torch.Tensor, alone: torch.Tensor) -> float:
    """The largest relative difference of a token's loss from that of one process."""
    lengths = EVEN_PACKS[number % len(EVEN_PACKS)] if case.thd else [LENGTH]
    expected = alone[:, own_positions(case, lengths)]
    return (losses / expected - 1).abs().max().item()


def unlike(recordings, found) -> list[str]:
    """Where all ranks together attended to other keys than the recording's."""
    everyone = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, found)
    wrong = []
    for number, documents in recordings.items():
        parts = [chunk for rank in everyone for chunk in rank.get(number, ())]
        for document, recording in enumerate(documents):
            merged = TopkRecording.merge([part[document] for part in parts])
            if merged.names != recording.names:
                wrong.append(f"microbatch {number}: layers {merged.names}")
            for name in recording.names:
                whole = (one.keys(name.number, mtp=name.is_mtp) for one in (merged, recording))
                if not all(torch.equal(ours, theirs) for ours, theirs in zip(*whole)):
                    wrong.append(f"microbatch {number}, document {document}, {name}")
    return wrong


def main(rank: int, world: int, folder: Path) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    cpu_host.enable("cpu")
    store = torch.distributed.FileStore(str(folder / f"store-{world}"), world)
    results = {}
    for fields in json.loads((folder / "cases.json").read_text())[str(world)]:
        case = Case(**fields)
        torch.distributed.init_process_group(
            "gloo",
            store=torch.distributed.PrefixStore(case.name, store),
            rank=rank,
            world_size=world,
            timeout=timedelta(minutes=TIMEOUT_MINUTES),
        )
        try:
            with cpu_host.CudaLiterals():
                results[case.name] = (roll_out if world == 1 else replay)(case, folder)
        except Exception as error:
            results[case.name] = {"error": f"{type(error).__name__}: {error}"}
            print(f"rank {rank}, {case.name}:\n{traceback.format_exc()}", file=sys.stderr)
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    (folder / f"{world}-{rank}.json").write_text(json.dumps(results))
