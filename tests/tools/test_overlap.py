"""``glm5-patch overlap`` on a small checkpoint."""

import json
import sys

import pytest
import torch

from glm5_patch.attention.build import gpt_model
from glm5_patch.config.huggingface import HFConfig
from glm5_patch.config.schedule import IndexSchedule
from glm5_patch.errors import CheckpointError
from glm5_patch.testing.parity import recorded
from glm5_patch.tools.cli import main
from glm5_patch.tools.overlap.layer_by_layer import LayerByLayer, WithoutMemory
from glm5_patch.tools.verify import forward, to_load_into
from tests.tiny import megatron_config, saved
from tests.tools.test_cli import command

LENGTH, TOPK = 40, 9


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("overlap") / "hf", flavour="5.1", num_hidden_layers=5)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("overlap") / "text"
    path.write_bytes(bytes((n * n + 7 * n) % 251 for n in range(2 * LENGTH + 5)))
    return path


def arguments(checkpoint, text, *more):
    given = ["overlap", "--checkpoint", checkpoint.directory, "--text", text]
    return [*map(str, given), "--seq-length", str(LENGTH), *more]


def by_definition(checkpoint, text):
    """[layers][layers], from sets of keys."""
    data = text.read_bytes()
    ids = torch.tensor([byte % 96 for byte in data[: 2 * LENGTH]]).view(2, LENGTH)
    model = gpt_model(checkpoint.config, megatron_config(checkpoint.config)).eval()
    checkpoint.load_into(model)
    with torch.no_grad(), recorded(model) as found:
        forward(model, ids)
    keys = {n: topk.tolist() for n, topk in found.topk_indices.items()}
    rows = [(b, row) for b in range(2) for row in range(TOPK, LENGTH)]

    def share(one, other):
        pairs = [(set(keys[one][b][r]), set(keys[other][b][r])) for b, r in rows]
        return sum(len(a & b) for a, b in pairs) / sum(len(a) for a, _ in pairs)

    return [[share(one, other) for other in sorted(keys)] for one in sorted(keys)]


def test_layers_are_compared_and_the_best_pattern_is_printed(world, checkpoint, text, tmp_path):
    found = command(*arguments(checkpoint, text, "--keep", "0.5", "--json"))
    assert found.returncode == 0, found.stderr
    assert "has no tokenizer: a token is a byte, modulo vocab_size=96" in found.stderr
    data = json.loads(found.stdout)
    expected = by_definition(checkpoint, text)
    for row, others in zip(data["overlap"], expected):
        assert row == pytest.approx(others, abs=1e-4)
    assert data["keep"] == 3 and data["pattern"].count("F") == 3
    schedule = IndexSchedule.from_types(data["pattern"], 5)
    shares = [expected[n][schedule.source(n + 1) - 1] for n in range(5)]
    assert data["mean_overlap"] == pytest.approx(sum(shares) / 5, abs=1e-4)
    # What is printed is what the configuration and `plan` take.
    raw = {**checkpoint.config.raw, "indexer_types": None, "index_topk_pattern": data["pattern"]}
    assert HFConfig(raw).schedule == schedule
    config = megatron_config(checkpoint.config, dsa_indexer_types=data["pattern"])
    assert IndexSchedule.from_megatron(config) == schedule
    plan = ["plan", "--config", str(checkpoint.directory), "--pp", "2", "--json"]
    planned = json.loads(command(*plan, "--indexer-types", data["pattern"]).stdout)
    assert planned["schedule"] == "3 of 5 layers compute their top-k"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--seq-length", "9"], "--seq-length 9 must be above index_topk=9"),
        (["--seq-length", "400"], "has 85 tokens, and one sequence takes 400"),
        (["--keep", "0"], "--keep 0.0 must be above 0 and at most 1"),
        (["--keep", "1.5"], "--keep 1.5 must be above 0 and at most 1"),
        (["--text", "/nowhere"], "/nowhere: No such file"),
        (["--heat-map", "a.png"], "pip install 'glm5-patch[plot]'"),
    ],
)
def test_what_can_not_be_compared_is_named(checkpoint, text, more, says, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(arguments(checkpoint, text, *more)) == 2
    assert says in capsys.readouterr().err


def test_a_heat_map_is_drawn(tmp_path, checkpoint):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from glm5_patch.tools.overlap import _draw

    _draw([[0.5] * 5] * 5, checkpoint.config, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_a_checkpoints_own_tokenizer_is_used(checkpoint, text, tmp_path):
    """Of the smallest kind that transformers loads."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    from glm5_patch.tools.overlap import _tokens

    words = Tokenizer(models.WordLevel({"a": 3, "b": 5, "[UNK]": 0}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"})
    )
    (tmp_path / "text").write_text("b a c")
    assert _tokens(tmp_path, tmp_path / "text", 96) == [5, 3, 0]
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="the tokenizer of .* does not load"):
        _tokens(tmp_path, tmp_path / "text", 96)


def test_one_layer_at_a_time_has_memory_and_selects_the_same(world, checkpoint):
    ids = torch.randint(96, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    whole = gpt_model(checkpoint.config, megatron_config(checkpoint.config)).eval()
    checkpoint.load_into(whole)
    with torch.no_grad(), recorded(whole) as expected:
        forward(whole, ids)
    model, there, done = LayerByLayer(checkpoint, "cpu", to_load_into("cpu", "fp32")), [], []

    def with_memory(layer, *_):
        names = (name for name, p in model.model.named_parameters() if p.device.type != "meta")
        there.append({name.split(".")[2] for name in names if name.startswith("decoder.layers.")})

    assert all(p.device.type == "meta" for p in model.model.parameters())
    with model.loaded(done.append) as running, torch.no_grad(), recorded(running) as found:
        for layer in running.decoder.layers:
            layer.self_attention.register_forward_hook(with_memory)
        forward(running, ids)
    assert there == [{str(number)} for number in range(5)]
    assert done == [f"layer {number}" for number in range(1, 6)]
    assert all(p.device.type == "meta" for p in model.model.parameters())
    assert found.topk_indices.keys() == expected.topk_indices.keys()
    for number, topk_indices in found.topk_indices.items():
        assert torch.equal(topk_indices, expected.topk_indices[number])


def test_a_model_without_memory_is_moved_to_no_gpu():
    with WithoutMemory():
        tensor = torch.empty(2, 3)
        assert tensor.cuda() is tensor
    assert tensor.is_meta
