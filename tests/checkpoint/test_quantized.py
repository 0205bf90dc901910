"""Quantised checkpoints: block FP8 is read as its dequantised twin, everything else refused."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from glm5_patch.checkpoint import writer
from glm5_patch.checkpoint.bridge_report import (
    check_before_loading,
    dequantizing,
    refuse_saving_beside_float8,
)
from glm5_patch.checkpoint.reader import HFCheckpoint
from glm5_patch.errors import CheckpointError
from glm5_patch.tools import cli
from glm5_patch.tools.verify import forward
from tests.checkpoint.fp8 import SINGLE, edit_config, quantize
from tests.tiny import add_mtp_layer, megatron_model, saved, tokens

MATRIX = "model.layers.6.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    directory = saved(tmp_path_factory.mktemp("quantized") / "plain").directory
    add_mtp_layer(directory)
    return directory


@pytest.fixture
def fp8(plain, tmp_path):
    directory = Path(shutil.copytree(plain, tmp_path / "fp8"))
    quantize(directory)
    return directory


def test_block_fp8_is_what_the_blocks_mean(plain, tmp_path):
    directory = Path(shutil.copytree(plain, tmp_path / "fp8"))
    meant = quantize(directory)
    checkpoint = HFCheckpoint(directory)
    assert checkpoint.report.dequantized == sum(".layers.8." not in name for name in meant)
    assert "float8" in str(checkpoint.report)
    for name, values in meant.items():
        assert torch.equal(checkpoint.read(name), values.bfloat16()), name
        part = (slice(3, 29), slice(7, 33))
        assert torch.equal(checkpoint.read(name, part), values[part].bfloat16()), name


def test_a_model_is_that_of_the_dequantised_twin(world, fp8, tmp_path, capsys):
    assert cli.main(["checkpoint", "dequantize", str(fp8), str(tmp_path / "twin")]) == 0
    assert "dequantizing" in capsys.readouterr().err
    twin, source = HFCheckpoint(tmp_path / "twin"), HFCheckpoint(fp8)
    assert not twin.scales and "quantization_config" not in twin.config.raw
    assert twin.shapes == source.shapes
    assert all(torch.equal(twin.read(name), source.read(name)) for name in source.shapes)
    ids = tokens(0, 1, 32)
    ours, theirs = (forward(megatron_model(c), ids) for c in (source, twin))
    assert torch.equal(ours, theirs)
    assert sorted(p.name for p in (tmp_path / "twin").iterdir()) == sorted(
        p.name for p in fp8.iterdir()
    )


def test_dequantizing_goes_on_after_an_interruption(fp8, tmp_path, monkeypatch):
    arguments = ["checkpoint", "dequantize", str(fp8)]
    assert cli.main([*arguments, str(tmp_path / "whole")]) == 0

    def interrupted(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(writer, "write_tensors", interrupted)
        assert cli.main([*arguments, str(tmp_path / "again")]) == 130
    assert not (tmp_path / "again").exists()
    assert cli.main([*arguments, str(tmp_path / "again")]) == 0
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_a_source_that_changed_in_between_is_refused(fp8, tmp_path, monkeypatch, capsys):
    arguments = ["checkpoint", "dequantize", str(fp8), str(tmp_path / "out")]
    with monkeypatch.context() as patched:
        patched.setattr(writer, "write_tensors", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            from glm5_patch.checkpoint.dequantize import write_dequantized

            write_dequantized(HFCheckpoint(fp8), tmp_path / "out")
    edit_config(fp8, rms_norm_eps=1e-5)
    assert cli.main(arguments) == 2
    assert "the source has changed since; remove it" in capsys.readouterr().err


def lose_scale(tensors):
    del tensors[f"{MATRIX}_scale_inv"]


def lose_matrix(tensors):
    del tensors[MATRIX]


def plain_matrix(tensors):
    tensors[MATRIX] = tensors[MATRIX].bfloat16()


def other_blocks(tensors):
    tensors[f"{MATRIX}_scale_inv"] = torch.ones(1, 1)


def e5m2(tensors):
    tensors[MATRIX] = tensors[MATRIX].to(torch.float8_e5m2)


@pytest.mark.parametrize(
    "change, says",
    [
        (lose_scale, "o_proj.weight is float8, but .*_scale_inv, its scale, is not there"),
        (lose_matrix, "_scale_inv is a scale, but .*o_proj.weight is absent"),
        (plain_matrix, "_scale_inv is a scale, but .*o_proj.weight is BF16, not float8"),
        (other_blocks, r"blocks of 20 x 20 of .* \[64, 480\] need a float \[4, 24\]"),
        (e5m2, "F8_E5M2"),
    ],
)
def test_a_half_quantised_checkpoint_is_refused(change, says, fp8):
    tensors = load_file(fp8 / SINGLE)
    change(tensors)
    save_file(tensors, fp8 / SINGLE)
    with pytest.raises(CheckpointError, match=says):
        HFCheckpoint(fp8)


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ({"quant_method": "awq", "bits": 4}, "quantised by AWQ"),
        ({"quant_method": "gptq", "bits": 4}, "quantised by GPTQ"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "NVFP4"),
        ({"load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "new"}, "quantised by 'new'"),
        ({"quant_method": ["fp8"]}, r"quantised by \['fp8'\]"),
        ("fp8", "must be an object"),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "activation_scheme is 'static'"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt is 'e5m2'"),
        ({"quant_method": "fp8", "weight_block_size": None}, "weight_block_size is None"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, r"weight_block_size is \[0, 128"),
    ],
)
def test_other_quantisation_is_refused_by_name(settings, says, plain, tmp_path, capsys):
    directory = Path(shutil.copytree(plain, tmp_path / "other"))
    edit_config(directory, quantization_config=settings)
    assert cli.main(["checkpoint", "check", str(directory)]) == 2
    capsys.readouterr()
    with pytest.raises(CheckpointError, match=says):
        HFCheckpoint(directory)


def test_modelopt_says_so_in_a_file_of_its_own(plain, tmp_path):
    directory = Path(shutil.copytree(plain, tmp_path / "other"))
    (directory / "hf_quant_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="ModelOpt.*use the bf16 release"):
        HFCheckpoint(directory)


def test_float8_without_a_word_in_the_config_is_refused(fp8):
    config = json.loads((fp8 / "config.json").read_text())
    del config["quantization_config"]
    (fp8 / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="is float8, but config.json has no quantization_con"):
        HFCheckpoint(fp8)


def test_there_is_nothing_to_dequantize_in_bf16(plain, tmp_path, capsys):
    assert cli.main(["checkpoint", "dequantize", str(plain), str(tmp_path / "out")]) == 2
    assert "no tensor is float8" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["link", "under a file"])
def test_an_output_that_can_not_be_is_named_before_any_work(place, fp8, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    output = tmp_path / ("link" if place == "link" else "file/out")
    before = sorted(tmp_path.iterdir())
    assert cli.main(["checkpoint", "dequantize", str(fp8), str(output)]) == 2
    says = {"link": "a link; give the directory", "under a file": "is not a directory"}[place]
    assert says in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk_is_named_before_any_work(fp8, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert cli.main(["checkpoint", "dequantize", str(fp8), str(tmp_path / "out")]) == 2
    assert f"MB are to be written, but {tmp_path} has 0.001 MB" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["fp8"]


class Source:
    """A directory as Megatron-Bridge's ``SafeTensorsStateSource`` gives it."""

    def __init__(self, directory: Path):
        self.tensors = load_file(directory / SINGLE)

    def get_all_keys(self) -> list[str]:
        return sorted(self.tensors)

    def load_tensors(self, names: list[str]) -> dict[str, torch.Tensor]:
        return {name: self.tensors[name] for name in names}


def as_bridge_has_it(directory: Path) -> SimpleNamespace:
    return SimpleNamespace(
        config=AutoConfig.from_pretrained(directory),
        state=SimpleNamespace(source=Source(directory)),
        model_name_or_path=str(directory),
    )


def test_bridge_reads_float8_with_its_scales(fp8):
    pretrained, checkpoint = as_bridge_has_it(fp8), HFCheckpoint(fp8)
    source = pretrained.state.source
    with dequantizing(pretrained) as float8:
        for name in checkpoint.shapes:
            assert torch.equal(source.load_tensors([name])[name], checkpoint.read(name)), name
    assert float8 == set(checkpoint.scales)
    assert source.load_tensors([MATRIX])[MATRIX].dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("change, says", [(lose_scale, "has no"), (other_blocks, "needs .4, 24.")])
def test_bridge_reads_no_float8_without_its_scale(change, says, fp8):
    pretrained = as_bridge_has_it(fp8)
    change(pretrained.state.source.tensors)
    with dequantizing(pretrained), pytest.raises(CheckpointError, match=says):
        pretrained.state.source.load_tensors([MATRIX])


def test_bridge_reads_no_packed_integers(fp8):
    pretrained = as_bridge_has_it(fp8)
    pretrained.state.source.tensors[MATRIX] = torch.ones(64, 16, dtype=torch.uint8)
    with dequantizing(pretrained), pytest.raises(CheckpointError, match="packed or quantised"):
        pretrained.state.source.load_tensors([MATRIX])


def test_bridge_refuses_another_quantisation_before_it_loads(plain, tmp_path):
    directory = Path(shutil.copytree(plain, tmp_path / "other"))
    edit_config(directory, quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(CheckpointError, match="quantised by AWQ"):
        check_before_loading(as_bridge_has_it(directory), None)


def test_bridge_does_not_save_bf16_beside_an_fp8_config(fp8, plain):
    with pytest.raises(CheckpointError, match="checkpoint dequantize .* OUT"):
        refuse_saving_beside_float8(as_bridge_has_it(fp8))
    refuse_saving_beside_float8(as_bridge_has_it(plain))
