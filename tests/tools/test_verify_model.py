"""``glm5-patch verify --model`` of models that are right and wrong: exit code, report, JSON."""

import json

import pytest
import torch

from glm5_patch.testing.oracle.faults import FAULTS
from glm5_patch.tools import cli

MODELS = """
import torch
from transformers import GlmMoeDsaForCausalLM

def right(directory):
    return GlmMoeDsaForCausalLM.from_pretrained(directory)

def without_bias(directory):
    model = right(directory)
    for layer in model.model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.e_score_correction_bias.zero_()
    return model

def without_bias_and_norm(directory):
    model = without_bias(directory)
    for layer in model.model.layers:
        if layer.self_attn.indexer is not None:
            layer.self_attn.indexer.k_norm = torch.nn.Identity()
    return model

def with_another_theta(directory):
    model = right(directory)
    model.model.rotary_emb.inv_freq = 5e5 ** -(torch.arange(0, 16, 2) / 16)
    return model

def with_another_theta_and_epsilon(directory):
    model = with_another_theta(directory)
    for layer in model.model.layers:
        layer.self_attn.q_a_layernorm.variance_epsilon = model.config.rms_norm_eps
        layer.self_attn.kv_a_layernorm.variance_epsilon = model.config.rms_norm_eps
    return model

def with_another_topk(directory):
    model = right(directory)
    for layer in model.model.layers:
        if layer.self_attn.indexer is not None:
            layer.self_attn.indexer.index_topk = 7
    return model

def damaged(directory):
    model = right(directory)
    model.model.layers[3].mlp.gate.weight.data[0] += 0.1
    return model

def overflowing(directory):
    model = right(directory)
    def logits(ids):
        found = model(ids).logits
        found[1, 5] = float("nan")
        return found
    return logits

def imprecise(directory):
    model = right(directory)
    return lambda ids: model(ids).logits * (1 + 1e-4)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "models.py"
    path.write_text(MODELS)
    return path


@pytest.fixture
def verify(models, capsys):
    def run(function, *options):
        code = cli.main(["verify", "--model", f"{models}:{function}", *options])
        out = capsys.readouterr().out
        return code, json.loads(out) if "--json" in options else out

    return run


def test_a_right_model_passes(verify, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out = verify("right")
    assert code == 0 and "The logits are Hugging Face's." in out and "passed in" in out
    assert max(map(len, out.splitlines())) <= 80


def test_mistakes_are_named_with_where_to_look(verify):
    code, out = verify("without_bias_and_norm")
    assert code == 1 and "FAILED in" in out
    said = " ".join(out.split())
    for fault in ("router_bias_unused", "indexer_k_norm_missing"):
        (row,) = (row for row in FAULTS if row.id == fault)
        assert f"{fault}: {row.means} Look at: {row.look_at}." in said


def test_json_has_the_names(verify):
    code, data = verify("without_bias", "--json", "--seed", "1", "--flavour", "5.1")
    assert code == 1 and not data["passed"]
    assert data["explanations"] == [["router_bias_unused"]]


def test_what_is_allowed_passes_and_is_shown(verify):
    options = ["--allow", "router_bias_unused", "--allow", "latent_norm_eps"]
    code, out = verify("without_bias", *options)
    assert code == 0 and "allowed: router_bias_unused, latent_norm_eps" in out


@pytest.mark.parametrize(
    "function, setting",
    [("with_another_topk", {"index_topk": 7})]
    + [pytest.param("with_another_theta", {"rope_theta": 5e5}, marks=pytest.mark.nightly)],
)
def test_a_setting_with_any_other_value_is_named(verify, function, setting):
    code, data = verify(function, "--json")
    assert code == 1 and data["setting"] == setting and data["explanations"] == [[]]


@pytest.mark.nightly
def test_and_with_a_fault_beside_it(verify):
    code, data = verify("with_another_theta_and_epsilon", "--json")
    assert code == 1 and data["setting"] == {"rope_theta": 5e5}
    assert data["explanations"] == [["latent_norm_eps"]]


@pytest.mark.nightly
def test_logits_that_are_not_finite_are_located(verify):
    code, data = verify("overflowing", "--json")
    assert code == 1 and data["within"] is None and data["beyond"] < 2e-5
    assert "not finite, first at token 5 of sequence 1" in " ".join(data["says"])


@pytest.mark.nightly
def test_what_nothing_explains_is_located(verify):
    code, data = verify("damaged", "--json")
    assert code == 1 and data["explanations"] == []
    said = " ".join(data["says"])
    assert "No known fault explains" in said and "The output of layer 4, a skip layer, is" in said


@pytest.mark.nightly
def test_a_model_of_lower_precision_is_told_so(verify):
    code, data = verify("imprecise", "--json")
    assert code == 1 and "look at the precision" in " ".join(data["says"])


def test_device_cuda_without_cuda_is_refused(models, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert cli.main(["verify", "--model", f"{models}:right", "--device", "cuda"]) == 2
    assert "this torch sees no CUDA device" in capsys.readouterr().err
