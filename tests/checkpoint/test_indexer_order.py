"""The order of an indexer's dimensions: measured by a relative, and converted only where needed."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from glm5_patch.checkpoint import writer
from glm5_patch.checkpoint.indexer_order import (
    ROPE_FIRST,
    ROPE_LAST,
    convert,
    find_orders,
    reordered,
)
from glm5_patch.checkpoint.reader import HFCheckpoint
from glm5_patch.errors import CheckpointError
from glm5_patch.tools import cli
from tests.tiny import add_mtp_layer, saved


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Unequal parts, 8 rotary dimensions of 32, so that there and back are different moves."""
    return saved(tmp_path_factory.mktemp("published"), qk_rope_head_dim=8)


def converted(source: HFCheckpoint, output: Path, to: str = ROPE_LAST) -> HFCheckpoint:
    given = ROPE_FIRST if to == ROPE_LAST else ROPE_LAST
    convert(source, output, to, find_orders(source, given=given))
    return HFCheckpoint(output)


def as_a_trainer_writes(checkpoint: HFCheckpoint, directory: Path, change=lambda tensors: None):
    """A copy that carries no record of a conversion, and is a little further trained."""
    shutil.copytree(checkpoint.directory, directory)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: tensor + 0.1 * tensor.std() * torch.randn(tensor.shape, generator=generator)
        for name, tensor in weights(checkpoint).items()
    }
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return HFCheckpoint(directory)


@pytest.fixture
def half_swapped(published, tmp_path):
    return converted(published, tmp_path / "swapped")


@pytest.fixture
def trained(published, tmp_path):
    return as_a_trainer_writes(published, tmp_path / "trained")


@pytest.fixture
def trained_swapped(half_swapped, tmp_path):
    return as_a_trainer_writes(half_swapped, tmp_path / "trained-swapped")


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
    back = weights(converted(half_swapped, tmp_path / "back", ROPE_FIRST))
    assert all(torch.equal(back[name], tensor) for name, tensor in weights(published).items())


def run(capsys, *arguments, code):
    """What a command printed as JSON."""
    capsys.readouterr()
    assert cli.main(["checkpoint", *map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_a_fine_tuned_relative_tells_the_order(published, trained, trained_swapped, capsys):
    like = ["--like", published.directory]
    found = run(capsys, "check", trained.directory, *like, code=0)
    assert found["indexer_order"] == "rope-first"
    found = run(capsys, "check", trained_swapped.directory, *like, code=1)
    assert found["indexer_order"] == "rope-last"
    assert set(found["indexer_orders"].values()) == {"rope-last"}


def test_a_right_checkpoint_is_not_turned_wrong(published, trained, tmp_path, capsys):
    for how in (["--like", published.directory], ["--from", "rope-first"]):
        done = run(capsys, "convert", trained.directory, tmp_path / "out", *how, code=0)
        assert done["layers"] == [] and done["output"] is None
    arguments = ["convert", trained.directory, tmp_path / "out", "--like", published.directory]
    assert cli.main(["checkpoint", *map(str, arguments)]) == 0
    assert "nothing was written: every indexer is rope-first" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_wrong_one_is_converted_and_the_report_says_so(
    published, trained, trained_swapped, tmp_path, capsys
):
    like = ["--like", published.directory]
    done = run(capsys, "convert", trained_swapped.directory, tmp_path / "out", *like, code=0)
    assert done["indexer_order"] == "rope-last" and done["to"] == "rope-first"
    assert (done["layers"], done["tensors"]) == ([1, 2, 3, 7], 16)
    moved = HFCheckpoint(tmp_path / "out")
    assert find_orders(moved, published).order == ROPE_FIRST
    wk = "model.layers.6.self_attn.indexer.wk.weight"
    assert torch.cosine_similarity(moved.read(wk), weights(trained)[wk]).min() > 0.9


def test_an_unknown_order_is_not_moved(trained, tmp_path, capsys):
    done = run(capsys, "convert", trained.directory, tmp_path / "out", code=2)
    assert "nothing was written" in done["error"] and "--like DIR" in done["error"]
    assert "--from ORDER" in done["error"]
    assert not (tmp_path / "out").exists()


def test_a_statement_that_the_tensors_contradict_is_refused(published, trained, tmp_path, capsys):
    arguments = ["convert", trained.directory, tmp_path / "out", "--from", "rope-last"]
    done = run(capsys, *arguments, "--like", published.directory, code=2)
    assert "rope-first on 4 layers" in done["error"] and "rope-last is given" in done["error"]


def test_a_second_conversion_of_the_result_is_refused(half_swapped, tmp_path, capsys):
    arguments = ["convert", half_swapped.directory, tmp_path / "out", "--to", "rope-last"]
    done = run(capsys, *arguments, "--from", "rope-first", code=2)
    assert "rope-last is recorded in its files by a conversion" in done["error"]
    done = run(capsys, *arguments, code=0)  # the record is enough to know it
    assert done["layers"] == [] and done["known_by"] == "recorded by a conversion"


def test_only_the_layers_in_the_other_order_are_moved(published, tmp_path, capsys):
    """A trainer without an MTP layer copies the tensors of the source's, which it never moved."""
    own = Path(shutil.copytree(published.directory, tmp_path / "own"))
    add_mtp_layer(own)
    source = HFCheckpoint(own)
    original = weights(source)

    def keep_the_mtp_layer(tensors):
        tensors.update({name: t for name, t in original.items() if ".layers.8." in name})

    swapped = converted(source, tmp_path / "swapped")
    mixed = as_a_trainer_writes(swapped, tmp_path / "mixed", keep_the_mtp_layer)
    found = run(capsys, "check", mixed.directory, "--like", own, code=1)
    assert found["indexer_order"] == "mixed" and found["indexer_orders"]["9"] == "rope-first"
    done = run(capsys, "convert", mixed.directory, tmp_path / "out", "--like", own, code=0)
    assert done["layers"] == [1, 2, 3, 7]
    assert find_orders(HFCheckpoint(tmp_path / "out"), source).order == ROPE_FIRST


def test_a_layer_that_the_relative_lacks_has_the_order_of_the_others_or_none(
    published, trained_swapped, tmp_path
):
    add_mtp_layer(trained_swapped.directory)
    own = HFCheckpoint(trained_swapped.directory)
    assert find_orders(own, published).orders == dict.fromkeys((1, 2, 3, 7, 9), ROPE_LAST)

    def swap_a_layer(tensors):
        for name in [name for name in tensors if ".layers.0.self_attn.indexer." in name]:
            if "weights_proj" not in name:
                tensors[name] = reordered(tensors[name], 8, 32, ROPE_FIRST)

    mixed = as_a_trainer_writes(own, tmp_path / "mixed", swap_a_layer)
    with pytest.raises(CheckpointError, match="different orders, .* no indexer on layer 9"):
        find_orders(mixed, published)


K_NORM = "model.layers.6.self_attn.indexer.k_norm.weight"
WK = "model.layers.6.self_attn.indexer.wk.weight"


def swap_one_norm(tensors):
    tensors[K_NORM] = reordered(tensors[K_NORM], 8, 32, ROPE_LAST)


def swap_one_matrix(tensors):
    tensors[WK] = reordered(tensors[WK], 8, 32, ROPE_LAST)


def by_halves(tensors):
    """Rotary pairs (0, 1), (2, 3), ... stored as 0, 2, 4, ... and 1, 3, 5, ..."""
    tensors[WK] = tensors[WK][[0, 2, 4, 6, 1, 3, 5, 7, *range(8, 32)]].contiguous()


def lose_one(tensors):
    tensors[WK].fill_(float("nan"))


@pytest.mark.parametrize(
    "damage, says",
    [
        (swap_one_norm, "layer 7 is half converted: .*k_norm.weight is rope-last"),
        (swap_one_matrix, "layer 7 is half converted: .*wk.weight is rope-last"),
        (by_halves, "does not resemble .*layers.6.*wk.weight is 0"),
        (lose_one, "does not resemble .*layers.6.*wk.weight is -1"),
    ],
)
def test_an_indexer_that_fits_neither_order_is_refused(damage, says, published, tmp_path):
    odd = as_a_trainer_writes(published, tmp_path / "odd", damage)
    with pytest.raises(CheckpointError, match=says):
        find_orders(odd, published)


def test_a_wrong_relative_tells_nothing(published, half_swapped, tmp_path):
    other = saved(tmp_path / "other", seed=5, qk_rope_head_dim=8)
    with pytest.raises(CheckpointError, match="does not resemble"):
        find_orders(published, other)
    narrow = saved(tmp_path / "narrow", index_head_dim=16, qk_rope_head_dim=8)
    with pytest.raises(CheckpointError, match=r"are \(8, 32\) and \(8, 16\)"):
        find_orders(published, narrow)
    with pytest.raises(CheckpointError, match="they are one directory"):
        find_orders(published, HFCheckpoint(published.directory))
    with pytest.raises(CheckpointError, match="a conversion made .* rope-last"):
        find_orders(published, half_swapped)


def test_without_a_relative_the_order_is_not_claimed(published, capsys):
    assert cli.main(["checkpoint", "check", str(published.directory)]) == 0
    assert "order of the indexers: unknown" in capsys.readouterr().out


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


@pytest.fixture
def interrupted(published, tmp_path, monkeypatch):
    """The source of a conversion of three files that was interrupted in the third."""
    source = sharded(published, tmp_path / "source")
    written = []

    def save_two(tensors, path, metadata):
        if len(written) == 2:
            path.write_bytes(b"half a file")
            raise KeyboardInterrupt
        written.append(path)
        write_tensors(tensors, path, metadata)

    write_tensors = writer.write_tensors
    monkeypatch.setattr(writer, "write_tensors", save_two)
    with pytest.raises(KeyboardInterrupt):
        converted(source, tmp_path / "output")
    assert len(written) == 2 and not (tmp_path / "output").exists()
    monkeypatch.setattr(writer, "write_tensors", write_tensors)
    return source


def test_an_interrupted_conversion_goes_on_where_it_was(interrupted, published, tmp_path):
    first = next(tmp_path.glob(".output.partial/model-0.safetensors")).stat().st_mtime_ns
    output = converted(interrupted, tmp_path / "output")
    assert (output.directory / "model-0.safetensors").stat().st_mtime_ns == first
    whole = converted(published, tmp_path / "whole")
    assert all(torch.equal(output.read(name), whole.read(name)) for name in whole.shapes)
    assert sorted(p.name for p in output.directory.iterdir()) == sorted(
        p.name for p in interrupted.directory.iterdir()
    )
    assert not list(tmp_path.glob(".*"))


def test_what_another_conversion_left_is_not_mixed_in(interrupted, tmp_path):
    with pytest.raises(CheckpointError, match="left by another conversion"):
        converted(interrupted, tmp_path / "output", ROPE_FIRST)
    (interrupted.directory / "model-0.safetensors").touch()  # written anew since
    with pytest.raises(CheckpointError, match="the source has changed since; remove it"):
        converted(interrupted, tmp_path / "output")


def test_a_conversion_interrupted_at_its_very_end_is_complete(published, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", interrupt)
        with pytest.raises(KeyboardInterrupt):
            converted(published, tmp_path / "output")
    output = converted(published, tmp_path / "output")
    assert sorted(p.name for p in output.directory.iterdir()) == sorted(
        p.name for p in published.directory.iterdir()
    )


def test_a_full_disk_is_named(published, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer, "write_tensors", full)
    arguments = ["convert", published.directory, tmp_path / "out", "--from", "rope-last"]
    done = run(capsys, *arguments, code=2)
    assert "No space left" in done["error"]
    assert "the same command finishes the output" in done["error"]


def test_nothing_is_overwritten(published, tmp_path):
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(CheckpointError, match="exists and is not an empty directory"):
        converted(published, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
