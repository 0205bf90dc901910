"""One rank of two: a checkpoint through Bridge under tensor, pipeline and expert parallelism.

python -m tests.bridge.worker RANK FOLDER

FOLDER has ``source``; each split writes a folder of its name, and each rank ``RANK.json``: split ->
how many tensors an export yields here.
"""

from __future__ import annotations

import json
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch

from glm5_patch import cpu_host
from tests.bridge import standin
from tests.bridge.helpers import CPU, build

WORLD = 2
SPLITS = {
    "tp": dict(tensor_model_parallel_size=2),
    "pp": dict(pipeline_model_parallel_size=2),
    "ep": dict(expert_model_parallel_size=2, expert_tensor_parallel_size=1),
}
SETTINGS = {
    "tp": dict(sequence_parallel=True),  # megatron-core 0.19 insists on it
    # Layers 1, 2, 3 and 7 of 8 compute their top-k: a stage can start on the seventh.
    "pp": dict(num_layers_in_first_pipeline_stage=6, num_layers_in_last_pipeline_stage=2),
    "ep": {},
}


def there_and_back(split: str, folder: Path) -> int:
    from megatron.bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(str(folder / "source"))
    model = build(bridge, {**CPU, **SPLITS[split], **SETTINGS[split]})
    count = sum(1 for _ in bridge.export_hf_weights([model], cpu=True, show_progress=False))
    bridge.save_hf_pretrained([model], str(folder / split))
    return count


def main(rank: int, folder: Path) -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    standin.install()
    cpu_host.enable("cpu")
    store = torch.distributed.FileStore(str(folder / "store"), WORLD)
    found = {}
    for split, sizes in SPLITS.items():
        torch.distributed.init_process_group(
            "gloo",
            store=torch.distributed.PrefixStore(split, store),
            rank=rank,
            world_size=WORLD,
            timeout=timedelta(minutes=3),
        )
        parallel_state.initialize_model_parallel(**sizes)
        model_parallel_cuda_manual_seed(1)
        with cpu_host.CudaLiterals():
            found[split] = there_and_back(split, folder)
        torch.distributed.barrier()
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
