"""A command that is killed at any point and started again ends as one that was not."""

import os
import random
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from glm5_patch.attention.build import gpt_model
from glm5_patch.checkpoint import writer
from glm5_patch.checkpoint.dequantize import write_dequantized
from glm5_patch.checkpoint.indexer_order import ROPE_FIRST, ROPE_LAST, convert, find_orders
from glm5_patch.checkpoint.reader import HFCheckpoint
from glm5_patch.errors import CheckpointError
from tests.checkpoint.fp8 import quantize
from tests.checkpoint.test_files import shard
from tests.tiny import megatron_config, saved

EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
SMALL = dict(
    num_hidden_layers=2,
    first_k_dense_replace=1,
    n_routed_experts=4,
    hidden_size=32,
    moe_intermediate_size=24,
)


class Command:
    """One that writes ``output``; ``change`` alters what it is made of, without changing sizes."""

    def __init__(self, kind: str, folder: Path):
        self.kind, self.source = kind, folder / "source"
        saved(self.source, **SMALL)
        (self.source / "tokenizer.json").write_text("{}")
        if kind == "dequantize":
            quantize(self.source)
        shard(self.source, "part/" if kind != "save" else "")
        if kind == "save":
            checkpoint = HFCheckpoint(self.source)
            self.model = gpt_model(checkpoint.config, megatron_config(checkpoint.config))
            checkpoint.load_into(self.model)

    def __call__(self, output: Path) -> None:
        source = HFCheckpoint(self.source)
        if self.kind == "dequantize":
            write_dequantized(source, output)
        elif self.kind == "convert":
            convert(source, output, ROPE_LAST, find_orders(source, given=ROPE_FIRST))
        else:
            writer.save(self.model, source.config, output, source)

    def change(self) -> None:
        if self.kind == "save":
            with torch.no_grad():
                self.model.output_layer.weight.add_(1)
            return
        path = sorted(self.source.glob("part/*.safetensors"))[0]
        status = path.stat()
        tensors = load_file(path)
        name = next(n for n in tensors if n.endswith("layernorm.weight"))
        tensors[name] += 1
        save_file(tensors, path, metadata={"format": "pt"})
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture(scope="module", params=["save", "convert", "dequantize"])
def command(request, tmp_path_factory, world):
    """With files of a few kilobytes, so that each command writes several."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(writer, "MAX_SHARD_BYTES", 1 << 16)
        yield Command(request.param, tmp_path_factory.mktemp("killed"))


def killed(action, output: Path, at: int) -> bool:
    """Run it in a process that is killed when it touches the output's folder for the nth time;
    whether it was."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        return os.WIFSIGNALED(status)
    left = at

    def hook(event, arguments):
        nonlocal left
        if event in EVENTS and str(output.parent) in str(arguments):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.addaudithook(hook)
        action(output)
    except BaseException:
        os._exit(1)
    os._exit(0)


def content(directory: Path) -> dict[str, bytes]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.fixture
def place(tmp_path):
    """Makes outputs in folders of their own, so that what is left beside one shows."""

    def make(name) -> Path:
        (tmp_path / str(name)).mkdir()
        return tmp_path / str(name) / "out"

    return make


def whole(command, output: Path) -> dict[str, bytes]:
    command(output)
    assert [path.name for path in output.parent.iterdir()] == ["out"]
    return content(output)


@pytest.mark.parametrize(
    "step", [5, pytest.param(1, marks=pytest.mark.nightly)], ids=["some points", "every point"]
)
def test_killed_at_a_point_and_started_again(command, step, place):
    expected = whole(command, place("whole"))
    assert sum(name.endswith(".safetensors") for name in expected) > 1
    at = 1
    while killed(command, output := place(at), at):
        if output.exists():  # nothing looks whole that is not
            assert content(output) == expected
        assert whole(command, output) == expected
        shutil.rmtree(output.parent)
        at += step
    assert at > 20


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.nightly) for n in (1, 2))])
def test_killed_again_and_again(command, seed, place):
    rng, expected, output = random.Random(seed), whole(command, place("whole")), place("out")
    for _ in range(6):
        if not killed(command, output, rng.randrange(1, 30)):
            shutil.rmtree(output)
    assert whole(command, output) == expected


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.nightly) for n in (1, 2))])
def test_a_source_that_changed_in_between_is_not_mixed_in(command, seed, place):
    rng = random.Random(seed)
    for number in range(4):
        output = place(number)
        assert killed(command, output, rng.randrange(3, 30))
        complete = output.exists()
        command.change()
        expected = whole(command, place(f"whole {number}"))
        try:
            command(output)
        except CheckpointError as error:
            assert complete or "the source has changed since; remove it" in str(error)
        else:
            assert content(output) == expected


def test_a_source_that_changes_while_it_is_read(command, place, monkeypatch):
    if command.kind == "save":
        pytest.skip("it is the model's own process that changes the model")
    output, rename = place("out"), Path.rename

    def changing(path, target):
        if str(target).endswith("config.json"):
            command.change()
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", changing)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        command(output)
    assert not output.exists()


def test_the_files_are_on_the_disk_before_they_have_their_names(command, place, monkeypatch):
    """Of every file and of the directory: flushed first, renamed then."""
    done, rename = [], Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(os.readlink(f"/proc/self/fd/{fd}")))
    monkeypatch.setattr(
        Path, "rename", lambda a, b: (done.append((str(a), str(b))), rename(a, b))[1]
    )
    command(output := place("out"))
    renamed = [pair for pair in done if isinstance(pair, tuple)]
    assert len(renamed) > 4 and renamed[-1][1] == str(output)
    for pair in renamed:
        assert pair[0] in done[: done.index(pair)], pair
    assert done.index(str(output.parent)) > done.index(renamed[-1])


def test_a_file_can_grow_no_further(command, place):
    """As a full disk or a quota: one line, and once there is room the command finishes."""
    import resource

    output = place("out")
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            command(output)
        except CheckpointError as error:
            os._exit(3 if "not written: " in str(error) and "\n" not in str(error) else 4)
        except BaseException:
            os._exit(5)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    assert not output.exists()
    assert whole(command, output) == whole(command, place("whole"))


def test_an_output_inside_its_source_is_refused(command):
    before = content(command.source)
    with pytest.raises(CheckpointError, match="lies in .*source, which is read"):
        command(command.source / "out")
    assert content(command.source) == before
