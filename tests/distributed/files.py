"""What worlds of real processes save, and what they load of what others saved: distributed
checkpoints of megatron-core, and Hugging Face directories."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import dist_checkpointing

from glm5_patch.checkpoint.reader import HFCheckpoint
from glm5_patch.checkpoint.writer import save
from glm5_patch.config.huggingface import HFConfig
from glm5_patch.errors import CheckpointError
from tests.distributed.cases import Case, source_of
from tests.distributed.worker import build, built, configuration, model_parallel, part, tensors


@dataclass
class Files:
    """Splits, and what they do with files. Each does it in the world of its size."""

    checkpoints: tuple[Case, ...] = ()
    """Save a distributed checkpoint, and load those that are there already."""
    readers: tuple[Case, ...] = ()
    """Load a Hugging Face directory that one process saved, each rank its part."""
    savers: tuple[Case, ...] = ()
    """Load one and write it again, each rank files of its own."""

    @classmethod
    def read(cls, folder: Path) -> Files:
        """What ``run.write_files`` wrote."""
        path = folder / "files.json"
        written = json.loads(path.read_text()) if path.exists() else {}
        return cls(**{kind: tuple(Case(**one) for one in cases) for kind, cases in written.items()})

    def attempts(self, world: int, folder: Path) -> Iterator[tuple[str, Callable, tuple]]:
        """Name, function and arguments, in order."""
        for case in self.checkpoints:
            if case.world != world:
                continue
            for other in self.checkpoints:
                if other != case and checkpoint_of(other, folder).exists():
                    yield f"load, {other.name}, {case.name}", load_checkpoint, (case, folder, other)
            if not checkpoint_of(case, folder).exists():
                yield f"save, {case.name}", save_checkpoint, (case, folder)
        if world == 1:
            sources = {source_of(case): case.alone() for case in (*self.readers, *self.savers)}
            for name, case in sources.items():
                if not (folder / name).exists():
                    yield f"save {name}", save_hugging_face, (case, folder / name)
            return
        for case in self.readers:
            if case.world == world:
                yield f"read, {case.name}", load_hugging_face, (case, folder)
        for case in self.savers:
            if case.world == world:
                yield f"save again, {case.name}", save_again, (case, folder)
        if self.savers:
            yield "save, refused", refused_save, (Case("", dp=world), folder)


def checkpoint_of(case: Case, folder: Path) -> Path:
    return folder / f"checkpoint, {case.name}"


def sharded(models) -> dict:
    return {f"model{number}": model.sharded_state_dict() for number, model in enumerate(models)}


def save_checkpoint(case: Case, folder: Path) -> None:
    """By megatron-core's own distributed checkpointing."""
    with model_parallel(case):
        models = [chunk.module for chunk in build(case, folder)]
        directory = checkpoint_of(case, folder)
        if torch.distributed.get_rank() == 0:
            directory.mkdir()
        torch.distributed.barrier()
        dist_checkpointing.save(sharded(models), str(directory))


def emptied(case: Case, folder: Path):
    """This rank's chunks, all zeros."""
    models = [chunk.module for chunk in build(case, folder)]
    with torch.no_grad():
        for _, tensor in tensors(models):
            tensor.zero_()
    return models


def differing(models, folder: Path) -> list[str]:
    """The tensors that are not what was saved."""
    whole = torch.load(folder / f"{Case('alone').model}.pt")
    return [n for n, t in tensors(models) if not torch.equal(t, part(n, whole[n], t))]


def load_checkpoint(case: Case, folder: Path, saved: Case) -> dict:
    """Whether what another world saved arrives in this one, parameter by parameter."""
    with model_parallel(case):
        models = emptied(case, folder)
        state = dist_checkpointing.load(sharded(models), str(checkpoint_of(saved, folder)))
        for number, model in enumerate(models):
            model.load_state_dict(state[f"model{number}"])
        return {
            "differ": differing(models, folder),
            "computing": sorted({n.split(".")[2] for n, _ in tensors(models) if ".indexer." in n}),
        }


def save_hugging_face(case: Case, directory: Path) -> None:
    with model_parallel(case):
        (model,) = (chunk.module for chunk in build(case, directory.parent))
        save(model, saved_config(case), directory)


def saved_config(case: Case) -> HFConfig:
    mtp = case.settings.get("mtp_num_layers", 0)
    return HFConfig({**configuration(case)[0].raw, "num_nextn_predict_layers": mtp})


def save_again(case: Case, folder: Path) -> None:
    """Load what one process saved, on a split with a padded vocabulary, and save it from there."""
    source = HFCheckpoint(folder / source_of(case))
    with model_parallel(case):
        chunks = built(case, padding=32)
        for number, chunk in enumerate(chunks):
            for tensor in chunk.parameters():
                tensor.data.fill_(number)
        source.load_into(chunks)
        save(chunks, source.config, folder / f"saved, {case.name}", source)


def refused_save(case: Case, folder: Path) -> str:
    """What every rank says when only one of them can't save."""
    with model_parallel(case):
        output = folder / f"refused-{torch.distributed.get_world_size()}"
        if torch.distributed.get_rank() == 0:
            output.mkdir(exist_ok=True)
            (output / "file").touch()
        torch.distributed.barrier()
        try:
            save(built(case), configuration(case)[0], output)
        except CheckpointError as error:
            return str(error).rpartition("CheckpointError: ")[2]
    return "not refused"


def load_hugging_face(case: Case, folder: Path) -> dict:
    """Whether this rank's part of a Hugging Face directory arrives, parameter by parameter."""
    with model_parallel(case):
        models = emptied(case, folder)
        HFCheckpoint(folder / source_of(case)).load_into(models)
        return {"differ": differing(models, folder)}
