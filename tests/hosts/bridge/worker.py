"""One rank of two: a checkpoint through Bridge under tensor, pipeline and expert parallelism.

The folder has ``source``; each split writes a folder of its name, and each rank
``WORLD-RANK.json``: split -> how many tensors an export yields here, and what this package said;
"gradients" -> those of stages that start on a skip layer, against the whole model's on this rank.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from datetime import timedelta
from pathlib import Path

import torch

from glm5_patch.testing import cpu_host
from tests.hosts.bridge import standin
from tests.hosts.bridge.helpers import CPU, build
from tests.tiny import tokens

BATCH, LENGTH = 2, 48

SPLITS = {
    "tp": dict(tensor_model_parallel_size=2),
    "pp": dict(pipeline_model_parallel_size=2),
    "ep": dict(expert_model_parallel_size=2, expert_tensor_parallel_size=1),
    "free pp": dict(pipeline_model_parallel_size=2),
}
SETTINGS = {
    "tp": dict(sequence_parallel=True),  # megatron-core 0.19 insists on it
    # Layers 1, 2, 3 and 7 of 8 compute their top-k: a stage can start on the seventh.
    "pp": dict(num_layers_in_first_pipeline_stage=6, num_layers_in_last_pipeline_stage=2),
    "ep": {},
    # The second stage starts on the fifth.
    "free pp": dict(num_layers_in_first_pipeline_stage=4, dsa_topk_across_stages=True),
}


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def there_and_back(split: str, folder: Path) -> dict:
    from megatron.bridge import AutoBridge

    lines = Lines()
    logging.getLogger("glm5_patch").handlers = [lines]

    bridge = AutoBridge.from_hf_pretrained(str(folder / "source"))
    model = build(bridge, {**CPU, **SPLITS[split], **SETTINGS[split]})
    count = sum(1 for _ in bridge.export_hf_weights([model], cpu=True, show_progress=False))
    bridge.save_hf_pretrained([model], str(folder / split))
    return {"yields": count, "says": list(lines.said)}


def gradients(folder: Path, split: str | None) -> dict[str, torch.Tensor]:
    """Of two microbatches of what this rank has of a model that Bridge built."""
    from megatron.bridge import AutoBridge

    from tests.distributed import schedule
    from tests.distributed.worker import tensors

    bridge = AutoBridge.from_hf_pretrained(str(folder / "source"))
    settings = {**SPLITS[split], **SETTINGS[split]} if split else {}
    model = build(bridge, {**CPU, **settings}).train()

    schedule.train(model, [tokens(seed, BATCH, LENGTH) for seed in (0, 1)])
    return {name: p.grad for name, p in tensors([model]) if p.grad is not None}


def differing_gradients(folder: Path, in_world) -> dict:
    """Names of parameters whose gradients are not those of the whole model, bit for bit."""
    whole = in_world("whole", {}, gradients, folder, None)
    own = in_world("gradients", SPLITS["free pp"], gradients, folder, "free pp")
    return {
        "differ": [n for n, gradient in own.items() if not torch.equal(gradient, whole[n])],
        "layers": sorted({int(n.split(".")[2]) + 1 for n in own if n.startswith("decoder.layers")}),
    }


def main(rank: int, world: int, folder: Path) -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    warnings.filterwarnings("ignore")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))  # which Bridge asks for
    logging.getLogger("glm5_patch").setLevel(logging.INFO)
    torch.set_num_threads(1)
    standin.install()
    cpu_host.enable("cpu")
    store = torch.distributed.FileStore(str(folder / f"store-{world}"), world)

    def in_world(name: str, sizes: dict, action, *args):
        torch.distributed.init_process_group(
            "gloo",
            store=torch.distributed.PrefixStore(name, store),
            rank=rank,
            world_size=world,
            timeout=timedelta(minutes=3),
        )
        parallel_state.initialize_model_parallel(**sizes)
        model_parallel_cuda_manual_seed(1)
        with cpu_host.CudaLiterals():
            result = action(*args)
        torch.distributed.barrier()
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
        return result

    found = {
        split: in_world(split, sizes, there_and_back, split, folder)
        for split, sizes in SPLITS.items()
    }
    found["gradients"] = differing_gradients(folder, in_world)
    (folder / f"{world}-{rank}.json").write_text(json.dumps(found))
