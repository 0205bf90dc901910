"""The tables of docs/: of docs/hosts.json and docs/clients.json, and of the plans of
GLM-5.2."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from glm5_patch.patches.table import PATCHES
from glm5_patch.testing.oracle.faults import FAULTS
from tests.config import balance
from tests.distributed.cases import SOME

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "docs" / "hosts.json"
CLIENTS = ROOT / "docs" / "clients.json"
"""What ``tests.clients.record`` saw, the patches of Megatron-LM and a row for each client; and what
``tests.clients.judge`` was told of each."""
CARDS = ROOT / "docs" / "cards"
PACKAGED = ROOT / "glm5_patch" / "tools" / "hosts.json"
"""What ``glm5-patch explain`` says of hosts: patch -> release -> patched or native."""
CHECKS = ("top-k", "logits", "recompute", "gradients")
"""Words in the names of the checks of ``verify``; a recompute's are gradients too."""
WORDS = {"applied": "patched", "not_needed": "native", "armed": "native"}
"""Armed is what stays so: that release has no such module."""


def read() -> dict:
    return json.loads(RECORD.read_text()) | read_clients()


def read_clients() -> dict:
    return json.loads(CLIENTS.read_text())


def support(record: dict, host: str) -> str:
    """Patches of one host against its releases: patched, or native where it needs none."""
    releases = record[host]
    lines = [f"| {host} | " + " | ".join(releases) + " |", "|---" * (len(releases) + 1) + "|"]
    for patch in PATCHES:
        if patch.distribution == host:
            cells = [WORDS[release["states"][patch.id][0]] for release in releases.values()]
            lines.append(f"| `{patch.id}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def packaged(record: dict) -> dict[str, dict[str, str]]:
    return {
        patch.id: {
            release: WORDS[found["states"][patch.id][0]]
            for release, found in record[patch.distribution].items()
        }
        for patch in PATCHES
    }


def figures(record: dict) -> str:
    """Each core as released and patched, beside Hugging Face."""
    lines = [
        "| megatron-core | GLM | keys, same input | keys, end to end | logits | gradients "
        "| recompute |",
        "|---|---|---|---|---|---|---|",
    ]
    for release, found in record["megatron-core"].items():
        for kind, label in (("released", "as released"), ("figures", "**patched**")):
            for flavour, row in found[kind].items():
                cells = ["no index sharing"] + [""] * 4 if row is None else _cells(row)
                lines.append(f"| {release} {label} | {flavour} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parallel(record: dict) -> str:
    """A split of each kind on each core: how far its gradients are from one process's."""
    releases = {r: f["parallel"] for r, f in record["megatron-core"].items() if "parallel" in f}
    lines = ["| split | " + " | ".join(releases) + " |", "|---" * (len(releases) + 1) + "|"]
    for case in SOME:
        cells = []
        for found in releases.values():
            one = found[case.name]
            figure = one.get("loss" if case.forward_only else "gradients")
            cells.append("refused" if figure is None else f"{figure:.1e}")
        lines.append(f"| {case.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def clients(record: dict) -> str:
    """What each client's tests said, on each core."""
    lines = ["| client | megatron-core | command | seen | date |", "|---" * 5 + "|"]
    for row in record["clients"]:
        cells = (row["client"], row["core"], f"`{row['command']}`", row["seen"], row["date"])
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def judged(record: dict) -> str:
    """What ``verify --model`` said of each program's GLM-5."""
    lines = ["| program | hosts | GLM | `--model` | said | date |", "|---" * 6 + "|"]
    numbers = lambda text: [int(part) for part in re.findall(r"\d+", text)]
    key = lambda row: (row["program"].partition(" ")[0], numbers(row["hosts"]), row["program"])
    for row in sorted(record["judged"], key=key):
        cells = (row["program"], row["hosts"], row["flavour"], f"`{row['target']}`")
        lines.append("| " + " | ".join((*cells, row["said"], row["date"])) + " |")
    return "\n".join(lines)


def cards() -> str:
    """Each card of docs/cards: where it ran, and what it found."""
    lines = ["| card | beside | verdict | found | date |", "|---" * 5 + "|"]
    for path in card_files():
        card = yaml.safe_load(path.read_text())
        of = path.stem.partition("_")[0].rpartition("-")
        beside = ", ".join(
            f"{name} {card['versions'][name]}"
            for name in ("megatron-core", "transformers")
            if name != of[0] and card["versions"][name] != "not installed"
        )
        link = f"[{of[0]} {of[2]}](cards/{path.name})"
        cells = (link, beside, card["verdict"], _found(card["figures"]), card["date"])
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def card_files() -> list[Path]:
    """The hosts first, then the programs on top of them, each in the order of releases."""
    first = ("megatron-core", "transformers")

    def place(path: Path) -> tuple:
        package = path.stem.partition("_")[0].rpartition("-")[0]
        numbers = [int(part) for part in re.findall(r"\d+", path.stem)]
        return first.index(package) if package in first else len(first), package, numbers

    return sorted(CARDS.glob("*.yaml"), key=place)


def _found(figures: dict) -> str:
    """A card's figures in one cell."""
    if "error" in figures:
        return f"`{figures['error']}`"
    if "checks" not in figures:
        return said_of(figures)
    named = {}
    for one in figures["checks"]:
        kind = next((kind for kind in CHECKS if kind in one["name"]), None)
        if kind:
            named[kind] = f"{kind}: {one['measured'].partition(' relative')[0]}"
    return "; ".join(named.values())


def said_of(found: dict) -> str:
    """The names of the faults that ``verify --model`` found, in one line."""
    settings = [f"`{name}` = {value}" for name, value in found["setting"].items()]
    sets = [" and ".join([*settings, *(f"`{id}`" for id in one)]) for one in found["explanations"]]
    return "; or ".join(sets) or ("right" if found["passed"] else " ".join(found["says"]))


def faults() -> str:
    lines = ["| fault | what the implementation does | look at |", "|---|---|---|"]
    bar = lambda text: text.replace("|", "\\|")
    rows = (f"| `{f.id}` | {bar(f.means)} | {bar(f.look_at)} |" for f in FAULTS)
    return "\n".join([*lines, *rows])


def _cells(row: dict[str, float]) -> list[str]:
    shares = [f"{100 * row[name]:.4g} %" for name in ("same_input", "end_to_end")]
    return shares + [f"{row[name]:.1e}" for name in ("logits", "gradients", "recompute")]


def blocks(record: dict) -> dict[tuple[Path, str], str]:
    """What stands between the markers of each file."""
    return {
        (ROOT / "docs" / "patches.md", "cores"): support(record, "megatron-core"),
        (ROOT / "docs" / "patches.md", "transformers"): support(record, "transformers"),
        (ROOT / "docs" / "patches.md", "bridges"): support(record, "megatron-bridge"),
        (ROOT / "docs" / "patches.md", "launchers"): support(record, "megatron-lm"),
        (ROOT / "docs" / "clients.md", "clients"): clients(record),
        (ROOT / "docs" / "hosts.md", "figures"): figures(record),
        (ROOT / "docs" / "cards.md", "cards"): cards(),
        (ROOT / "docs" / "verify.md", "faults"): faults(),
        (ROOT / "docs" / "verify.md", "judged"): judged(record),
        (ROOT / "docs" / "parallel.md", "splits"): parallel(record),
        (ROOT / "docs" / "pipeline.md", "balance"): balance.table(),
    }


def _between(name: str) -> re.Pattern:
    return re.compile(f"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", re.DOTALL)


def shown(path: Path, name: str) -> str:
    """What a file shows between the markers of this name."""
    return _between(name).search(path.read_text())[0].partition("\n")[2].rpartition("\n")[0]


def write(record: dict) -> None:
    """Keep a record and put its tables into the documents."""
    tables = blocks(record)
    seen = {name: record[name] for name in read_clients()}
    hosts = {name: found for name, found in record.items() if name not in seen}
    replace(RECORD, json.dumps(hosts, indent=1) + "\n")
    replace(CLIENTS, json.dumps(seen, indent=1) + "\n")
    replace(PACKAGED, json.dumps(packaged(record), indent=1) + "\n")
    for (path, name), table in tables.items():
        fill = lambda match, table=table: match[1] + table + match[2]
        replace(path, _between(name).sub(fill, path.read_text()))


def replace(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.rename(path)
