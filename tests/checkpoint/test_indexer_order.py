"""Checkpoints whose indexers have the rotary dimensions last: told by a relative, and converted."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from glm5_patch.checkpoint import indexer_order
from glm5_patch.checkpoint.indexer_order import ROPE_FIRST, ROPE_LAST, convert, order_beside
from glm5_patch.checkpoint.reader import HFCheckpoint
from glm5_patch.errors import CheckpointError
from glm5_patch.tools import cli
from tests.tiny import saved


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Unequal parts, 8 rotary dimensions of 32, so that there and back are different moves."""
    return saved(tmp_path_factory.mktemp("published"), qk_rope_head_dim=8)


@pytest.fixture
def half_swapped(published, tmp_path):
    convert(published, tmp_path / "swapped", ROPE_LAST)
    return HFCheckpoint(tmp_path / "swapped")


def weights(checkpoint: HFCheckpoint) -> dict[str, torch.Tensor]:
    return load_file(checkpoint.directory / "model.safetensors")


def test_only_the_indexers_rotary_dimensions_move(published, half_swapped):
    before, after = weights(published), weights(half_swapped)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    kinds = ("wq_b.weight", "wk.weight", "k_norm.weight", "k_norm.bias")
    assert changed == {
        f"model.layers.{layer}.self_attn.indexer.{kind}" for layer in (0, 1, 2, 6) for kind in kinds
    }
    wk = "model.layers.6.self_attn.indexer.wk.weight"
    assert torch.equal(after[wk], torch.cat([before[wk][8:], before[wk][:8]]))
    wq = "model.layers.6.self_attn.indexer.wq_b.weight"
    assert torch.equal(after[wq][32:56], before[wq][40:64])  # the second head's other dimensions
    for path in published.directory.iterdir():
        assert (half_swapped.directory / path.name).exists()


def test_there_and_back_is_the_same(published, half_swapped, tmp_path):
    assert (
        cli.main(["checkpoint", "convert", str(half_swapped.directory), str(tmp_path / "b")]) == 0
    )
    back = weights(HFCheckpoint(tmp_path / "b"))
    assert all(torch.equal(back[name], tensor) for name, tensor in weights(published).items())


def test_a_fine_tuned_relative_tells_the_order(published, half_swapped, tmp_path, capsys):
    generator = torch.Generator().manual_seed(0)
    for checkpoint in (published, half_swapped):  # some training: a tenth of noise
        copy = Path(shutil.copytree(checkpoint.directory, tmp_path / f"{checkpoint is published}"))
        noisy = {
            name: tensor + 0.1 * tensor.std() * torch.randn(tensor.shape, generator=generator)
            for name, tensor in weights(checkpoint).items()
        }
        save_file(noisy, copy / "model.safetensors", metadata={"format": "pt"})
    arguments = ["--like", str(published.directory)]
    assert cli.main(["checkpoint", "check", str(tmp_path / "True"), *arguments]) == 0
    assert "order of the indexers: rope-first" in capsys.readouterr().out
    assert cli.main(["checkpoint", "check", str(tmp_path / "False"), *arguments, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["indexer_order"] == "rope-last"


def test_a_stranger_tells_nothing(published, tmp_path):
    other = saved(tmp_path, seed=5, qk_rope_head_dim=8)
    with pytest.raises(CheckpointError, match="does not resemble"):
        order_beside(published, other)
    third = saved(tmp_path / "narrow", index_head_dim=16, qk_rope_head_dim=8)
    with pytest.raises(CheckpointError, match="no indexer of the same shape"):
        order_beside(published, third)


def test_without_a_relative_the_order_is_not_claimed(published, capsys):
    assert cli.main(["checkpoint", "check", str(published.directory)]) == 0
    assert "not looked at; --like DIR" in capsys.readouterr().out


def sharded(checkpoint: HFCheckpoint, directory: Path) -> HFCheckpoint:
    """The same checkpoint in three files."""
    shutil.copytree(checkpoint.directory, directory)
    (directory / "model.safetensors").unlink()
    tensors, weight_map = weights(checkpoint), {}
    for number in range(3):
        part = dict(sorted(tensors.items())[number::3])
        save_file(part, directory / f"model-{number}.safetensors", metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, f"model-{number}.safetensors"))
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return HFCheckpoint(directory)


def test_an_interrupted_conversion_goes_on_where_it_was(published, tmp_path, monkeypatch, capsys):
    source, output = sharded(published, tmp_path / "source"), tmp_path / "output"
    written = []

    def interrupted(tensors, path, metadata):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.stem)
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(indexer_order, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(source, output, ROPE_LAST)
    assert not output.exists()
    with pytest.raises(CheckpointError, match="left by another conversion; remove it"):
        convert(source, output, ROPE_FIRST)
    monkeypatch.setattr(indexer_order, "save_file", save_file)
    convert(source, output, ROPE_LAST)
    assert written == ["model-0", "model-1"]
    assert order_beside(HFCheckpoint(output), published) == ROPE_LAST
    assert sorted(p.name for p in output.iterdir()) == sorted(
        p.name for p in source.directory.iterdir()
    )
    assert "converting: 3 of 3, model-2.safetensors" in capsys.readouterr().err


def test_nothing_is_overwritten(published, tmp_path):
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(CheckpointError, match="exists and is not an empty directory"):
        convert(published, tmp_path, ROPE_LAST)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
