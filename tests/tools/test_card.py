"""The card of a verification: what its file holds, and that it appears whole."""

import json
from pathlib import Path

import pytest
import yaml

from glm5_patch.tools import cli
from glm5_patch.tools.card import write_card
from glm5_patch.tools.report import Result

SCHEMA = {
    "command": str,
    "date": str,
    "verdict": str,
    "machine": {"platform": str, "processors": int, "devices": [str]},
    "versions": {str: str},
    "switches": {str: str},
    "patches": {str: str},
    "figures": dict,
}
MODEL = "transformers:GlmMoeDsaForCausalLM"


def check(value, schema, where="card"):
    """Raise unless a value has the types of a schema, and no other fields."""
    if isinstance(schema, type):
        assert isinstance(value, schema), f"{where}: {value!r} is no {schema.__name__}"
    elif isinstance(schema, list):
        assert isinstance(value, list), where
        for item in value:
            check(item, schema[0], f"{where}[]")
    elif str in schema:
        for name, item in value.items():
            check(item, schema[str], f"{where}.{name}")
    else:
        assert value.keys() == schema.keys(), where
        for name, item in value.items():
            check(item, schema[name], f"{where}.{name}")


def read(path):
    card = yaml.safe_load(path.read_text())
    check(card, SCHEMA)
    return card


CARDS = sorted((Path(__file__).parents[2] / "docs" / "cards").glob("*.yaml"))


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_the_cards_of_the_documents_have_the_schema_and_passed(path):
    card = read(path)
    assert card["verdict"] == "passed" and card["figures"]["passed"]
    assert path.stem.startswith(f"megatron-core-{card['versions']['megatron-core'].split(',')[0]}")


def test_a_card_says_what_ran_where_and_what_was_found(tmp_path, capsys):
    path = tmp_path / "card.yaml"
    path.write_text("an older card")
    arguments = ["verify", "--model", MODEL, "--json", "--card", str(path)]
    assert cli.main(arguments) == 0
    card = read(path)
    assert card["figures"] == json.loads(capsys.readouterr().out)
    assert card["command"] == " ".join(["glm5-patch", *arguments]) and card["verdict"] == "passed"
    assert {"python", "torch", "transformers", "glm5-patch"} <= card["versions"].keys()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "figures",
    [
        {},
        {
            "a": [],
            "b": {},
            "c": None,
            "d": True,
            "e": 1e-06,
            "g": -2e20,
            "h": 1.5e-9,
            "f": "x: 'y' # z\n- \u00e9",
        },
        {"lists": [["a", "b"], [], [{"c": [1, 2]}, {"d": "no"}]], "yes": "yes", "1": [0.1]},
    ],
)
def test_any_figures_are_read_back(tmp_path, figures):
    path = tmp_path / "card.yaml"
    write_card(path, ["verify", "--model", "a b.py:f"], Result(1, figures, print))
    card = read(path)
    assert card["figures"] == figures and card["verdict"] == "failed"
    assert card["command"] == "glm5-patch verify --model 'a b.py:f'"


def test_a_card_that_can_t_be_written_leaves_the_older_one(tmp_path):
    path = tmp_path / "card.yaml"
    path.write_text("an older card")
    with pytest.raises(TypeError):
        write_card(path, ["verify"], Result(0, {"figure": object()}, print))
    assert path.read_text() == "an older card" and list(tmp_path.iterdir()) == [path]
