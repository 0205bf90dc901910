"""Files as people have them: read as transformers reads them, or one line and exit code 2."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from glm5_patch.checkpoint.files import CheckpointFiles
from glm5_patch.checkpoint.reader import HFCheckpoint
from glm5_patch.errors import CheckpointError
from glm5_patch.tools import cli
from tests.tiny import saved

ROOT = Path(__file__).parents[2]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("files") / "good", num_hidden_layers=2).directory


@pytest.fixture
def copy(good, tmp_path):
    return Path(shutil.copytree(good, tmp_path / "copy"))


def shard(directory: Path, folder: str = "") -> dict:
    """Make two shards and their index of a checkpoint; the index."""
    tensors = load_file(directory / SINGLE)
    (directory / SINGLE).unlink()
    (directory / folder).mkdir(exist_ok=True)
    weight_map = {}
    for number in range(2):
        part, file = dict(sorted(tensors.items())[number::2]), f"{folder}model-{number}.safetensors"
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index))
    return index


def reindex(change):
    def damage(directory):
        index = shard(directory)
        (directory / INDEX).write_text(json.dumps(change(index)))

    return damage


def remap(**changes):
    names = {"norm": "model.norm.weight"}
    return reindex(
        lambda index: {
            "weight_map": {**index["weight_map"], **{names[n]: v for n, v in changes.items()}}
        }
    )


def edit(change):
    def damage(directory):
        tensors = load_file(directory / SINGLE)
        change(tensors)
        save_file(tensors, directory / SINGLE)

    return damage


def instead(name, make):
    def damage(directory):
        (directory / name).unlink()
        make(directory / name)

    return damage


def header(change):
    """Rewrite the header of a file, and keep its data."""

    def damage(directory):
        content = (directory / SINGLE).read_bytes()
        length = int.from_bytes(content[:8], "little")
        new = change(json.loads(content[8 : 8 + length]))
        new = new if isinstance(new, bytes) else json.dumps(new).encode()
        data = content[8 + length :]
        (directory / SINGLE).write_bytes(len(new).to_bytes(8, "little") + new + data)

    return damage


def a_socket(path):
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(path.name)
    os.chdir(here)


def both(directory):
    content = (directory / SINGLE).read_bytes()
    shard(directory)
    (directory / SINGLE).write_bytes(content)


def twice(directory):
    shard(directory)
    first, second = (directory / f"model-{n}.safetensors" for n in range(2))
    tensors = load_file(first)
    save_file({**load_file(second), **dict(list(tensors.items())[:1])}, second)


NORM = "model.norm.weight"


def other_file(index):
    return next(f for f in index["weight_map"].values() if f != index["weight_map"][NORM])


DAMAGE = {
    "index is no JSON": (lambda d: shard(d) and (d / INDEX).write_text("{"), "not valid JSON"),
    "index is a list": (reindex(lambda i: []), "weight_map is None"),
    "weight map is a list": (reindex(lambda i: {"weight_map": ["x"]}), r"weight_map is \['x'\]"),
    "weight map is empty": (reindex(lambda i: {"weight_map": {}}), "weight_map is {}"),
    "file is a number": (remap(norm=5), "model.norm.weight is in 5, which is no name"),
    "file is a list": (remap(norm=[]), r"is in \[\], which is no name"),
    "file is empty": (remap(norm=""), "is in '', which is no name"),
    "file is another kind": (remap(norm="pytorch_model.bin"), "which is no name of a .safetensors"),
    "file has a NUL": (remap(norm="a\0.safetensors"), "which is no name"),
    "absolute path": (remap(norm="/etc/x.safetensors"), "must lie in the directory"),
    "path out of it": (remap(norm="../x.safetensors"), "must lie in the directory"),
    "path out and in": (remap(norm="a/../x.safetensors"), "must lie in the directory"),
    "file is not there": (remap(norm="no.safetensors"), "no.safetensors: no such file, but model"),
    "index has another place": (
        reindex(lambda i: {"weight_map": {**i["weight_map"], NORM: other_file(i)}}),
        r"norm.weight is in model-.\.safetensors, but .* has it in model-.\.safetensors",
    ),
    "index has more": (
        reindex(lambda i: {"weight_map": {**i["weight_map"], "x": "model-0.safetensors"}}),
        "has x in model-0.safetensors, which lacks it",
    ),
    "index has less": (
        reindex(lambda i: {"weight_map": {k: v for k, v in i["weight_map"].items() if k != NORM}}),
        r"norm.weight is in model-.\.safetensors, but .* has it in no file",
    ),
    "index is deep": (
        lambda d: shard(d) and (d / INDEX).write_text("[" * 10**6),
        "nested too deeply",
    ),
    "index is no text": (
        lambda d: shard(d) and (d / INDEX).write_bytes(b"\xff\xfe\x00"),
        "not valid JSON",
    ),
    "shards without index": (lambda d: shard(d) and (d / INDEX).unlink(), "copy the index too"),
    "index and single file": (both, "are both there; transformers reads model.safetensors alone"),
    "a tensor in two files": (twice, "is in model-0.safetensors and in model-1.safetensors"),
    "weights are a directory": (instead(SINGLE, Path.mkdir), "model.safetensors: a directory"),
    "weights are a FIFO": (instead(SINGLE, os.mkfifo), "model.safetensors: a FIFO, not a file"),
    "weights are a socket": (instead(SINGLE, a_socket), "model.safetensors: a socket, not a file"),
    "weights are an LFS pointer": (
        instead(SINGLE, lambda p: p.write_text(LFS)),
        "model.safetensors: a Git LFS pointer.*git lfs pull",
    ),
    "weights are a dead link": (
        instead(SINGLE, lambda p: p.symlink_to("gone")),
        "model.safetensors: no such file: it is a link to a file that is not there",
    ),
    "weights link to themselves": (
        instead(SINGLE, lambda p: p.symlink_to(p)),
        "model.safetensors: can't be read: Too many levels",
    ),
    "weights are empty": (instead(SINGLE, Path.touch), "damaged or truncated"),
    "weights are a page": (
        instead(SINGLE, lambda p: p.write_text("<!DOCTYPE html>" * 9)),
        "damaged or truncated",
    ),
    "config is a directory": (instead("config.json", Path.mkdir), "config.json: a directory"),
    "config is a FIFO": (instead("config.json", os.mkfifo), "config.json: a FIFO"),
    "config is an LFS pointer": (
        instead("config.json", lambda p: p.write_text(LFS)),
        "config.json: a Git LFS pointer",
    ),
    "config is deep": (
        instead("config.json", lambda p: p.write_text('{"a":' * 10**5)),
        "config.json: not valid JSON: nested too deeply",
    ),
    "config is a list": (
        instead("config.json", lambda p: p.write_text("[]")),
        "model_type is in a list",
    ),
    "config has a huge number": (
        instead("config.json", lambda p: p.write_text('{"vocab_size": 1' + "0" * 9999 + "}")),
        "not valid JSON",
    ),
    "header is a list": (header(lambda h: []), "its header is a list"),
    "header is deep": (header(lambda h: b"[" * 10**5), "nested too deeply"),
    "header entry is null": (header(lambda h: {**h, NORM: None}), "entry of .*norm.weight is None"),
    "unknown dtype": (
        header(lambda h: {**h, NORM: {**h[NORM], "dtype": "F3"}}),
        "norm.weight has the unknown dtype 'F3'",
    ),
    "negative size": (header(lambda h: {**h, NORM: {**h[NORM], "shape": [-64]}}), "are .-64"),
    "tensors overlap": (
        header(lambda h: {**h, NORM: h["model.embed_tokens.weight"]}),
        "starts at byte",
    ),
    "integers": (edit(lambda t: t.update({NORM: torch.ones(64, dtype=torch.int8)})), "dtype I8"),
    "booleans": (edit(lambda t: t.update({NORM: torch.ones(64, dtype=bool)})), "dtype BOOL"),
    "a name of two lines": (
        edit(lambda t: t.update({"model.a\nglm5-patch: all is well": torch.ones(1)})),
        r"model.a\\nglm5-patch: all is well is no tensor of this model",
    ),
    "a layer too many": (
        edit(lambda t: t.update({"model.layers.2.input_layernorm.weight": torch.ones(64)})),
        "fewer layers than the file: model.layers.2.input.*num_hidden_layers is 2 and "
        "num_nextn_predict_layers 0",
    ),
    "GGUF": (
        lambda d: (d / SINGLE).rename(d / "model-Q4_K_M.gguf"),
        "model-Q4_K_M.gguf is a GGUF file.*use the bf16 release",
    ),
    "pickles": (lambda d: (d / SINGLE).rename(d / "pytorch_model.bin"), "convert them to safetens"),
}


def one_line(capsys) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("glm5-patch: "), lines
    return lines[0]


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_directory_is_named_in_one_line(case, copy, capsys):
    damage, says = DAMAGE[case]
    damage(copy)
    signal.alarm(20)  # nothing may wait for a FIFO's writer
    try:
        assert cli.main(["checkpoint", "check", str(copy)]) == 2
        with pytest.raises(CheckpointError, match=says):
            str(HFCheckpoint(copy).report)
    finally:
        signal.alarm(0)
    one_line(capsys)


def read_all(directory):
    checkpoint = HFCheckpoint(directory)
    assert checkpoint.report.tensors
    return {name: checkpoint.read(name) for name in checkpoint.shapes}


def in_a_subdirectory(directory):
    shard(directory, "weights/")


def in_a_hub_cache(directory):
    blobs = directory.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(directory.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(Path("../blobs") / str(number))


def a_foreign_file(directory):
    shard(directory)
    save_file({NORM: torch.zeros(64)}, directory / "adapter_model.safetensors")


@pytest.mark.parametrize("layout", [shard, in_a_subdirectory, in_a_hub_cache, a_foreign_file])
def test_other_layouts_hold_the_same_tensors(layout, good, copy):
    layout(copy)
    ours, plain = read_all(copy), read_all(good)
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


def test_a_file_stands_for_its_directory(good):
    assert CheckpointFiles(good / "config.json").shapes == CheckpointFiles(good).shapes


def test_a_hub_id_is_found_in_the_cache(good, tmp_path, monkeypatch):
    """Files in the cache are links to blobs, as huggingface_hub makes them."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--zai-org--GLM-tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "blobs").mkdir()
    commits = {"main": "a" * 40, "older": "b" * 40}
    for revision, commit in commits.items():
        (repository / "refs" / revision).write_text(commit)
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for path in good.iterdir():
            shutil.copy(path, repository / "blobs" / f"{commit}-{path.name}")
            (snapshot / path.name).symlink_to(f"../../blobs/{commit}-{path.name}")
    for hub_id, commit in (
        ("zai-org/GLM-tiny", "a" * 40),
        ("zai-org/GLM-tiny@older", "b" * 40),
        (f"zai-org/GLM-tiny@{'b' * 40}", "b" * 40),
    ):
        assert CheckpointFiles(hub_id).directory.name == commit
        assert read_all(hub_id).keys() == read_all(good).keys()
    blob = repository / "blobs" / f"{commits['main']}-{SINGLE}"
    blob.write_text(LFS)
    with pytest.raises(CheckpointError, match="model.safetensors: a Git LFS pointer"):
        CheckpointFiles("zai-org/GLM-tiny")
    blob.unlink()
    with pytest.raises(CheckpointError, match="it is a link to a file that is not there"):
        CheckpointFiles("zai-org/GLM-tiny")
    with pytest.raises(CheckpointError, match="run `hf download zai-org/other --revision v1`"):
        CheckpointFiles("zai-org/other@v1")


@pytest.mark.parametrize(
    "model_type, says",
    [("glm5_next", "GLM-5.3-Flash"), ("glm4_moe", "GLM-4.5"), ("deepseek_v32", "DeepSeek-V3.2")],
)
def test_other_models_are_refused_by_what_they_are(model_type, says, copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    with pytest.raises(CheckpointError, match=f"model_type is '{model_type}', {says}"):
        HFCheckpoint(copy)


def test_check_imports_no_torch(good):
    code = (
        "import sys; from glm5_patch.tools.cli import main; "
        f"code = main(['checkpoint', 'check', {str(good)!r}]); "
        "assert 'torch' not in sys.modules and 'safetensors' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "computing layers" in done.stdout


def test_check_finds_what_is_wrong_without_reading_a_tensor(good, tmp_path):
    """A sparse terabyte: a header, and a hole for the tensors."""
    shutil.copy(good / "config.json", tmp_path)
    content = (good / SINGLE).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    last = max(entry["data_offsets"][1] for n, entry in header.items() if n != "__metadata__")
    header["x"] = {"dtype": "BF16", "shape": [1 << 39], "data_offsets": [last, last + (1 << 40)]}
    text = json.dumps(header).encode()
    with open(tmp_path / SINGLE, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + last + (1 << 40))
    with pytest.raises(CheckpointError, match="x is no tensor of this model"):
        _ = CheckpointFiles(tmp_path).report


@pytest.mark.parametrize("seed", range(10))
def test_random_damage_is_refused_or_changes_nothing(seed, good, tmp_path):
    """Bytes of the headers and of the JSON files change; values of tensors do not count."""
    rng, plain = random.Random(seed), CheckpointFiles(good)
    for number in range(20):
        directory = tmp_path / str(number)
        shutil.copytree(good, directory)
        if rng.random() < 0.5:
            shard(directory)
        path = rng.choice(
            [
                p
                for p in directory.iterdir()
                if p.suffix == ".safetensors" or p.name in (INDEX, "config.json")
            ]
        )
        content = bytearray(path.read_bytes())
        end = len(content)
        if path.suffix == ".safetensors":
            end = 8 + int.from_bytes(content[:8], "little")
        kind = rng.random()
        if kind < 0.2:
            content = content[: rng.randrange(len(content))]
        elif kind < 0.4:
            place = rng.randrange(end)
            content[place:place] = rng.randbytes(rng.choice((1, 4, 64)))
        elif kind < 0.6:
            place = rng.randrange(end)
            del content[place : place + rng.choice((1, 4, 64))]
        else:
            for _ in range(rng.choice((1, 3, 10))):
                content[rng.randrange(end)] = rng.choice((rng.randrange(256), 48, 34, 44, 93))
        path.write_bytes(content)
        try:
            checkpoint = HFCheckpoint(directory)
            str(checkpoint.report)
        except CheckpointError as error:
            assert "\n" not in str(error)
            continue
        assert checkpoint.shapes == plain.shapes, number
        for name in (NORM, "model.layers.1.self_attn.indexer.wk.weight"):
            assert torch.equal(checkpoint.read(name), HFCheckpoint(good).read(name)), (number, name)
