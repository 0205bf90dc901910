"""The card of a verification: what its file holds, that it appears whole, and which there are."""

import json
from datetime import date

import pytest
import yaml

from glm5_patch.errors import GLM5PatchError
from glm5_patch.patching.ledger import State
from glm5_patch.tools import cli, verify
from glm5_patch.tools.card import VERDICTS, write_card
from glm5_patch.tools.report import Result
from tests.hosts import tables

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
OF_OWN_MODELS = {
    "version": str,
    "model": str,
    "checkpoint": str,
    "kernels": str,
    "losses": list,
    "checks": [{"name": str, "measured": str, "wanted": str, "passed": bool}],
    "output": type(None),
    "seconds": float,
    "passed": bool,
}
OF_ANY_MODEL = {
    "version": str,
    "model": str,
    "oracle": str,
    "tokens": str,
    "within": float,
    "beyond": float,
    "passed": bool,
    "allowed": [str],
    "explanations": [list],
    "setting": dict,
    "says": [str],
    "seconds": float,
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
    assert card["verdict"] in VERDICTS.values()
    return card


HOSTS = ("megatron-core", "megatron-lm", "transformers", "megatron-bridge")
"""Whose releases the support tables have."""
WITHOUT_A_CARD: set[str] = set()
"""Of those releases; docs/cards.md names each."""


@pytest.fixture(scope="module")
def cards():
    return {path.stem: read(path) for path in tables.card_files()}


def test_the_cards_of_the_documents_have_the_schema(cards):
    for name, card in cards.items():
        figures, verdict = card["figures"], card["verdict"]
        date.fromisoformat(card["date"])
        assert card["command"].startswith("glm5-patch verify ")
        assert card["command"].endswith(f"--card docs/cards/{name}.yaml")
        assert set(card["patches"].values()) <= {state.value for state in State}
        if verdict == "unusable":
            check(figures, {"error": str}, name)
        else:
            check(figures, OF_OWN_MODELS if "checks" in figures else OF_ANY_MODEL, name)
            assert verdict == ("passed" if figures["passed"] else "failed")


def test_a_card_is_of_the_hosts_that_its_name_says(cards):
    for name, card in cards.items():
        for host in name.split("_"):
            package, release = host.rsplit("-", 1)
            # Megatron-LM has no distribution; its release is that of megatron-core beside it.
            found = card["versions"]["megatron-core" if package == "megatron-lm" else package]
            assert found.split(",")[0].split(".dev")[0] == release.split(".dev")[0], name


def test_each_release_of_the_support_tables_has_a_card(cards):
    record = tables.read()
    releases = {f"{host}-{release}" for host in HOSTS for release in record[host]}
    made = {name.split("_")[0] for name in cards}
    assert releases - made == WITHOUT_A_CARD
    page = (tables.ROOT / "docs" / "cards.md").read_text()
    assert all(f"`{name}`" in page for name in WITHOUT_A_CARD)


def test_a_core_with_deepseek_sparse_attention_passes(cards):
    """So do its launcher and the programs that build on it."""
    failed = {name for name, card in cards.items() if card["verdict"] != "passed"}
    assert all(name.startswith(("megatron-core-0.16.0rc", "transformers-5.")) for name in failed)
    computes_another_model = ("5.2.0", "5.3.0", "5.8.1", "5.11.0", "5.12.1")
    assert {name for name in failed if name.startswith("transformers")} == {
        f"transformers-{release}" for release in computes_another_model
    }


def test_a_card_and_the_support_table_agree(cards):
    record = tables.read()
    for name, card in cards.items():
        package, release = name.split("_")[0].rsplit("-", 1)
        states = record.get(package, {}).get(release, {}).get("states", {})
        own = {id: state for id, (state, _) in states.items() if id in card["patches"]}
        assert {id: tables.WORDS[card["patches"][id]] for id in own} == {
            id: tables.WORDS[state] for id, state in own.items()
        }, name


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


def test_a_card_says_why_nothing_was_compared(tmp_path, monkeypatch, capsys):
    def refuse(options):
        raise GLM5PatchError("this core has no sparse attention")

    monkeypatch.setattr(verify, "run", refuse)
    path = tmp_path / "card.yaml"
    assert cli.main(["verify", "--card", str(path)]) == 2
    card = read(path)
    assert card["verdict"] == "unusable"
    assert card["figures"] == {"error": "this core has no sparse attention"}
    assert "this core has no sparse attention" in capsys.readouterr().err


def test_a_card_that_can_t_be_written_leaves_the_older_one(tmp_path):
    path = tmp_path / "card.yaml"
    path.write_text("an older card")
    with pytest.raises(TypeError):
        write_card(path, ["verify"], Result(0, {"figure": object()}, print))
    assert path.read_text() == "an older card" and list(tmp_path.iterdir()) == [path]
