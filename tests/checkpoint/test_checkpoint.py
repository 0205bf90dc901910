"""Checkpoints that can't be loaded: one line that names the file and the cause, exit code 2."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from glm5_patch.checkpoint import writer
from glm5_patch.checkpoint.names import pieces
from glm5_patch.checkpoint.reader import HFCheckpoint
from glm5_patch.checkpoint.writer import save
from glm5_patch.errors import CheckpointError
from glm5_patch.testing.parity import LowerTies
from glm5_patch.tools import cli
from glm5_patch.tools.verify import forward
from tests.tiny import add_mtp_layer, hf_config, hf_model, megatron_model, saved, tokens

INDEXER = "model.layers.6.self_attn.indexer.wk.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("checkpoint") / "good").directory


@pytest.fixture
def copy(good, tmp_path):
    return Path(shutil.copytree(good, tmp_path / "copy"))


def edit(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def edit_config(directory, **fields):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def truncate(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


DAMAGE = {
    "missing indexer": (
        lambda d: edit(d, lambda t: t.pop(INDEXER)),
        "copy: model.layers.6.self_attn.indexer.wk.weight is missing: layer 7 comp",
    ),
    "wrong shape": (
        lambda d: edit(d, lambda t: t.update({INDEXER: torch.ones(31, 64)})),
        r"model.safetensors: .*wk.weight has shape \[31, 64\], .*\[32, 64\]",
    ),
    "unknown tensor": (
        lambda d: edit(d, lambda t: t.update({"model.extra": torch.ones(1)})),
        "model.safetensors: model.extra is no tensor of this model",
    ),
    "truncated": (truncate, "model.safetensors: damaged or truncated"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "no .safetensors file"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json: no such file"),
    "other model": (lambda d: edit_config(d, model_type="llama"), "model_type is 'llama'"),
    "not JSON": (lambda d: (d / "config.json").write_text("{"), "config.json: not valid JSON"),
    "bad schedule": (lambda d: edit_config(d, indexer_types=["shared"] * 8), "layer 1 a skip"),
    "other scoring": (
        lambda d: edit_config(d, scoring_func="softmax"),
        "scoring_func is 'softmax'",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_in_one_line_and_nothing_is_written(case, copy, tmp_path, capsys):
    damage, says = DAMAGE[case]
    damage(copy)
    before = sorted(tmp_path.iterdir())
    arguments = ["demo", "--checkpoint", str(copy), "--output", str(tmp_path / "out")]
    assert cli.main(arguments) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("glm5-patch: ")]
    assert len(lines) == 1
    with pytest.raises(CheckpointError, match=says):
        str(HFCheckpoint(copy).report)
    assert sorted(tmp_path.iterdir()) == before


def test_an_empty_directory_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="config.json: no such file"):
        HFCheckpoint(tmp_path)


def test_indexers_on_skip_layers_are_reported_and_dropped(world, good, copy):
    def add(tensors):
        for name in [n for n in tensors if ".layers.2.self_attn.indexer." in n]:
            tensors[name.replace(".2.", ".4.", 1)] = tensors[name].clone()

    edit(copy, add)
    report = HFCheckpoint(copy).report
    assert len(report.dropped) == 5
    assert "5 indexer tensors on skip layers dropped" in str(report)
    ids = tokens(0, 1, 32)
    ours, plain = (forward(megatron_model(HFCheckpoint(d)), ids) for d in (copy, good))
    assert torch.equal(ours, plain)


def test_saving_gives_back_every_tensor_and_every_file(world, copy, tmp_path, monkeypatch):
    mtp = {"model.layers.8.eh_proj.weight": torch.randn(64, 128)}
    edit(copy, lambda tensors: tensors.update(mtp))
    edit_config(copy, num_nextn_predict_layers=1)
    (copy / "tokenizer.json").write_text("{}")
    source = HFCheckpoint(copy)
    model = megatron_model(source)
    monkeypatch.setattr(writer, "MAX_SHARD_BYTES", 1 << 18)
    save(model, source.config, tmp_path / "out", source)
    again = HFCheckpoint(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert again.report.mtp == tuple(mtp)
    assert again.shapes == source.shapes
    assert all(torch.equal(again.read(name), source.read(name)) for name in source.shapes)
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert not list(tmp_path.glob(".*partial*"))


def test_an_mtp_layer_is_loaded_and_saved_with_a_model_that_has_one(world, copy, tmp_path):
    made = add_mtp_layer(copy)
    source = HFCheckpoint(copy)
    model = megatron_model(source, mtp_num_layers=1)
    own = {source for _, _, sources in pieces(model) for source in sources}
    assert own == source.shapes.keys()
    save(model, source.config, tmp_path / "out")
    again = HFCheckpoint(tmp_path / "out")
    assert again.shapes == source.shapes
    assert all(torch.equal(again.read(name), source.read(name)) for name in source.shapes)
    assert all(torch.equal(again.read(name), tensor) for name, tensor in made.items())


def test_an_mtp_layer_is_loaded_under_its_published_names(world, copy):
    """Of the index of GLM-5.2's checkpoint, where the MTP layer comes after the last one."""
    made = add_mtp_layer(copy)
    model = megatron_model(HFCheckpoint(copy), mtp_num_layers=1)
    parameters = dict(model.named_parameters())
    for ours, published in {
        "enorm": "enorm",
        "hnorm": "hnorm",
        "eh_proj": "eh_proj",
        "final_layernorm": "shared_head.norm",
    }.items():
        expected = made[f"model.layers.8.{published}.weight"]
        assert torch.equal(parameters[f"mtp.layers.0.{ours}.weight"], expected), ours


@pytest.mark.parametrize("mtp_num_layers", [None, 1])
def test_copies_in_the_mtp_layer_are_written_in_step(world, copy, tmp_path, mtp_num_layers):
    add_mtp_layer(copy)
    copies = {"embed_tokens": "model.embed_tokens", "shared_head.head": "lm_head"}
    edit(
        copy,
        lambda tensors: tensors.update(
            {
                f"model.layers.8.{name}.weight": tensors[f"{original}.weight"].clone()
                for name, original in copies.items()
            }
        ),
    )
    source = HFCheckpoint(copy)
    model = megatron_model(source, mtp_num_layers=mtp_num_layers)
    with torch.no_grad():  # some training
        model.embedding.word_embeddings.weight.add_(1)
        model.output_layer.weight.mul_(2)
    save(model, source.config, tmp_path / "out", source)
    again = HFCheckpoint(tmp_path / "out")
    for name, original in copies.items():
        trained = again.read(f"{original}.weight")
        assert torch.equal(again.read(f"model.layers.8.{name}.weight"), trained)
        assert not torch.equal(trained, source.read(f"{original}.weight"))


@pytest.mark.parametrize("name", ["enorm.weight", "self_attn.indexer.wk.weight"])
def test_an_incomplete_mtp_layer_is_refused_by_a_model_that_has_one(name, world, copy):
    add_mtp_layer(copy)
    edit(copy, lambda tensors: tensors.pop(f"model.layers.8.{name}"))
    megatron_model(HFCheckpoint(copy))
    with pytest.raises(CheckpointError, match=f"model.layers.8.{name} is missing"):
        megatron_model(HFCheckpoint(copy), mtp_num_layers=1)


def test_saving_over_files_is_refused(world, good, copy):
    source = HFCheckpoint(good)
    with pytest.raises(CheckpointError, match="not an empty directory"):
        save(megatron_model(source), source.config, copy, source)


def test_a_failed_save_leaves_nothing(world, good, tmp_path, monkeypatch):
    source = HFCheckpoint(good)
    monkeypatch.setattr(writer, "write_shards", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(megatron_model(source), source.config, tmp_path / "out", source)
    assert list(tmp_path.iterdir()) == []


def test_a_tied_head_is_loaded_once(world, tmp_path):
    model = hf_model(hf_config(tie_word_embeddings=True))
    model.save_pretrained(tmp_path / "hf")
    ids = tokens(0, 1, 32)
    ours = forward(megatron_model(HFCheckpoint(tmp_path / "hf")), ids)
    with LowerTies():
        theirs = model(ids, use_cache=False).logits
    assert (ours - theirs).abs().max() < 2e-5
