"""Checkpoints damaged at random: loaded bit for bit, or one line and exit code 2."""

import copy
import json
import os
import random
import shutil
import signal
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from glm5_patch.checkpoint.reader import HFCheckpoint
from glm5_patch.tools import cli
from tests.checkpoint.fp8 import quantize
from tests.checkpoint.test_files import INDEX, LFS, SINGLE, a_socket, shard
from tests.tiny import saved

DAMAGED = int(os.environ.get("GLM5_FUZZ_CHECKPOINTS", "50"))
"""For each of ten seeds."""
SMALL = dict(num_hidden_layers=2, first_k_dense_replace=1, n_routed_experts=4, hidden_size=32)
ODD = (None, True, 0, -1, 7, 2.5, 1e300, 10**30, "", "x", "../x", "a\nb", "\0", "\ud800", [], {})


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Each kind of checkpoint, and what it holds."""
    found = []
    for kind in ("single", "sharded", "folder", "fp8", "stacked"):
        directory = tmp_path_factory.mktemp("fuzz") / kind
        saved(directory, **SMALL)
        if kind == "fp8":
            quantize(directory)
        if kind == "stacked":
            stack(directory)
        if kind in ("sharded", "folder"):
            shard(directory, "part/" if kind == "folder" else "")
        found.append((directory, everything(directory)))
    return found


def stack(directory):
    tensors = load_file(directory / SINGLE)
    prefix = "model.layers.1.mlp.experts."
    part = {
        name: torch.stack([tensors.pop(f"{prefix}{n}.{name}.weight") for n in range(4)])
        for name in ("gate_proj", "up_proj", "down_proj")
    }
    tensors[f"{prefix}gate_up_proj"] = torch.cat([part["gate_proj"], part["up_proj"]], 1)
    tensors[f"{prefix}down_proj"] = part["down_proj"].contiguous()
    save_file(tensors, directory / SINGLE, metadata={"format": "pt"})


def everything(directory):
    checkpoint = HFCheckpoint(directory)
    return {name: checkpoint.read(name) for name in checkpoint.shapes}


def mutated(value, rng):
    """A JSON value with one place changed."""
    value = copy.deepcopy(value)
    place = value
    while isinstance(place, (dict, list)) and place:
        key = rng.choice(sorted(place) if isinstance(place, dict) else range(len(place)))
        inner = place[key]
        if not isinstance(inner, (dict, list)) or not inner or rng.random() < 0.3:
            kind = rng.random()
            if kind < 0.2:
                del place[key]
            elif kind < 0.4 and isinstance(place, dict):
                place[rng.choice((f"{key}x", f"{key}\nglm5-patch: fine", str(rng.random())))] = (
                    inner
                )
            elif kind < 0.6 and isinstance(place, dict):
                place[key] = place[rng.choice(sorted(place))]
            else:
                place[key] = rng.choice(ODD)
            break
        place = inner
    return value if rng.random() < 0.95 else rng.choice(ODD)


def json_file(directory, rng):
    path = rng.choice([p for p in directory.glob("*.json")])
    text = json.dumps(mutated(json.loads(path.read_text()), rng))
    path.write_text(text if rng.random() < 0.9 else "[" * rng.choice((10, 10**5)) + text)


def header(directory, rng):
    path = rng.choice(sorted(directory.rglob("*.safetensors")))
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    new = json.dumps(mutated(json.loads(content[8:end]), rng)).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + content[end:])


def some_bytes(directory, rng):
    """Of a header or a JSON file: those of tensors can't be told from right ones."""
    path = rng.choice(sorted(p for p in directory.rglob("*") if p.is_file()))
    content = bytearray(path.read_bytes())
    end = len(content)
    if path.suffix == ".safetensors":
        end = 8 + int.from_bytes(content[:8], "little")
    place, kind = rng.randrange(end), rng.random()
    if kind < 0.25:
        content = content[: rng.randrange(len(content))]
    elif kind < 0.5:
        content[place:place] = rng.randbytes(rng.choice((1, 4, 64)))
    elif kind < 0.75:
        del content[place : place + rng.choice((1, 4, 64))]
    else:
        for _ in range(rng.choice((1, 3, 10))):
            content[rng.randrange(end)] = rng.choice((rng.randrange(256), 48, 34, 44, 93))
    path.write_bytes(content)


def another_thing(directory, rng):
    """Something else in the place of a file, or no more than its name."""
    path = rng.choice(sorted(p for p in directory.rglob("*") if p.is_file()))
    kept = path.rename(directory.parent / f"{directory.name}-kept")
    make = {
        "nothing": lambda: None,
        "directory": path.mkdir,
        "FIFO": lambda: os.mkfifo(path),
        "socket": lambda: a_socket(path),
        "loop": lambda: path.symlink_to(path.name),
        "dead link": lambda: path.symlink_to("/gone"),
        "link": lambda: path.symlink_to(kept),
        "link to a directory": lambda: path.symlink_to(directory),
        "device": lambda: path.symlink_to("/dev/zero"),
        "pointer": lambda: path.write_text(LFS),
        "empty": path.touch,
        "page": lambda: path.write_text("<!DOCTYPE html><html></html>" * 20),
        "byte order mark": lambda: path.write_bytes(b"\xef\xbb\xbf" + kept.read_bytes()),
        "another name": lambda: shutil.copy(kept, path.with_name(f"copy-of-{path.name}")),
        "more": lambda: path.write_bytes(kept.read_bytes() + b"\0" * rng.choice((1, 8, 4096))),
    }
    make[rng.choice(sorted(make))]()


def more_files(directory, rng):
    """What was left beside a checkpoint."""
    weights = rng.choice(sorted(directory.rglob("*.safetensors")))
    name = rng.choice(
        (SINGLE, "model-2.safetensors", "adapter_model.safetensors", ".hidden", INDEX)
    )
    if not (directory / name).exists():
        shutil.copy(weights, directory / name)


def tensors_edited(directory, rng):
    path = rng.choice(sorted(directory.rglob("*.safetensors")))
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    others = sorted(directory.rglob("*.safetensors"))
    kind = rng.randrange(6)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        dtype = rng.choice((torch.int8, torch.uint8, torch.bool, torch.int64, torch.float8_e5m2))
        tensors[name] = tensors[name].float().to(dtype)
    elif kind == 2:  # one of two parts of a fused parameter, without scales
        tensors[name] = tensors[name].float().to(torch.float8_e4m3fn)
    elif kind == 3:
        tensors[name] = tensors[name][: max(1, len(tensors[name]) // 2)].clone()
    elif kind == 4:
        number = rng.choice((2, 3, 78, 10**8, 10**12))
        tensors[f"model.layers.{number}.{name.rpartition('.')[2]}"] = tensors[name].clone()
    else:
        other = load_file(rng.choice(others))
        tensors[rng.choice(sorted(other))] = next(iter(other.values())).clone()
    save_file(tensors, path, metadata={"format": "pt"})


DAMAGE = (json_file, header, some_bytes, another_thing, more_files, tensors_edited)


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(n, marks=pytest.mark.nightly) for n in range(1, 10))]
)
def test_a_damaged_checkpoint_is_loaded_right_or_refused_in_one_line(seed, bases, tmp_path, capsys):
    rng, refused = random.Random(seed), 0
    for number in range(DAMAGED):
        base, expected = rng.choice(bases)
        directory = tmp_path / str(number)
        shutil.copytree(base, directory)
        done = rng.sample(DAMAGE, rng.choice((1, 1, 2)))
        what = f"seed {seed}, number {number}: {base.name}, {[d.__name__ for d in done]}"
        for damage in done:
            try:
                damage(directory, rng)
            except Exception:  # the first damage leaves nothing for the second
                assert damage is not done[0], what
        signal.alarm(20)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                code = cli.main(["checkpoint", "check", str(directory)])
                lines = capsys.readouterr().err.splitlines()
                found = everything(directory) if code == 0 else None
        except BaseException as error:
            pytest.fail(f"{what}: {type(error).__name__}: {error}")
        finally:
            signal.alarm(0)
        if found is None:
            refused += 1
            assert code == 2 and len(lines) == 1, (what, code, lines)
            assert lines[0].startswith("glm5-patch: ") and "report it" not in lines[0], (
                what,
                lines,
            )
        else:
            kept = {n: t for n, t in found.items() if n in expected}
            assert kept.keys() == expected.keys(), what
            assert all(torch.equal(kept[n], expected[n]) for n in expected), what
        shutil.rmtree(directory)
    assert DAMAGED // 3 < refused < DAMAGED
