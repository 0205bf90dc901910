"""The pictures of the site: current, readable without a network, and each of them shown."""

import importlib.util
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from xml.etree import ElementTree

import pytest

from glm5_patch.tools import cli
from tests.tools.test_report import lines, on_a_terminal

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SVG = "{http://www.w3.org/2000/svg}"


def load(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


DIAGRAMS = load("make_diagrams")
SCREENS = load("make_screens")
PICTURES = sorted((DOCS / "images").rglob("*.svg"))
HEADS = {
    "status": ["package version", "what seen", "patch state target attribute"],
    "status-import": ["patch state reason"],
    "doctor": ["what seen"],
    "env": ["package version"],
    "verify": ["check measured wanted"],
    "demo": ["check measured wanted"],
    "verify-model": ["logits largest difference wanted"],
    "overlap": ["keys of computing layer before most alike before pattern"],
}
"""Of the tables, which the commands that take long print."""


def shown(path: Path) -> list[str]:
    """The lines of a picture of a terminal."""
    rows: dict[float, list[tuple[float, str]]] = {}
    for text in ElementTree.parse(path).iter(f"{SVG}text"):
        if "clip-path" in text.attrib:  # the title has none
            place = float(text.attrib["x"]) / SCREENS_CHARACTER
            rows.setdefault(float(text.attrib["y"]), []).append((place, text.text or ""))
    found = []
    for _, parts in sorted(rows.items()):
        line = ""
        for place, text in parts:
            line = line.ljust(round(place)) + text.replace("\u00a0", " ")
        if not set(line.strip()) <= {"\u2500"}:
            found.append(line.rstrip())
    return found


SCREENS_CHARACTER = 12.2
"""Width of one, in rich's pictures."""


def test_the_diagrams_are_current():
    for name, draw in DIAGRAMS.DIAGRAMS.items():
        assert (DOCS / "images" / f"{name}.svg").read_text() == draw()


def test_each_command_has_a_picture():
    parser = cli._parser()
    (commands,) = (a.choices for a in parser._actions if hasattr(a.choices, "keys"))
    assert {command.split()[1] for command in SCREENS.SCREENS.values()} == commands.keys()
    for command in SCREENS.SCREENS.values():
        parser.parse_args(command.split()[1:])
    made = {path.stem for path in (DOCS / "images" / "screens").iterdir()}
    assert made == SCREENS.SCREENS.keys()


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.stem)
def test_a_picture_is_shown_and_needs_no_network(path):
    text = path.read_text()
    assert not re.search(r"url\(.?http|<image|href|@import", text)
    link = f"({path.relative_to(DOCS)})"
    assert any(link in page.read_text() for page in DOCS.glob("*.md"))


@pytest.mark.parametrize("name", SCREENS.SCREENS)
def test_a_picture_shows_what_the_command_prints(name, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm-256color")
    found = shown(DOCS / "images" / "screens" / f"{name}.svg")
    command = SCREENS.SCREENS[name]
    assert found[0] == f"$ {command}"
    assert max(map(len, found)) <= 80
    paths = re.findall(r"(?:^|\s)(/\S+)", "\n".join(found))
    assert all(path.startswith(("/opt/", "/tmp/")) for path in paths)  # nobody's own folder
    if name in HEADS:
        together = [" ".join(line.split()) for line in found]
        assert [head for head in HEADS[name] if head not in together] == []
        return
    if name == "checkpoint":
        assert any(line.startswith("order of the indexers: ") for line in found)
        return
    (tmp_path / "GLM-5.2").mkdir()
    config = ROOT / "tests" / "configs" / "glm-5.2.json"
    shutil.copy(config, tmp_path / "GLM-5.2" / "config.json")
    monkeypatch.chdir(tmp_path)
    printed = lines(on_a_terminal(cli.main, command.split()[1:]).out)
    assert [line[:80].rstrip() for line in printed if line] == found[1:]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The address of the built site, on this machine."""
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(site)]
    subprocess.run(command, cwd=ROOT, check=True)
    handler = partial(QuietHandler, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("no chromium is installed")
    with api.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


CUT = """() => [...document.querySelectorAll('.md-typeset table, .md-typeset img')].filter(
    shown => shown.getBoundingClientRect().right
        > document.querySelector('.md-content').getBoundingClientRect().right + 1
).map(shown => shown.textContent.slice(0, 60))"""
"""Tables and pictures that reach beyond the right edge of the text."""


@pytest.mark.nightly
def test_in_a_browser_nothing_is_cut_or_fetched_and_search_finds(served, browser):
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    asked = []
    tab.on("request", lambda request: asked.append(request.url))
    for page in DOCS.glob("*.md"):
        tab.goto(f"{served}/{page.stem}/" if page.stem != "index" else served)
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), page.name
        assert tab.evaluate(CUT) == [], page.name
    assert [url for url in asked if not url.startswith((served, "data:"))] == []
    tab.goto(served)
    tab.click("input.md-search__input")
    tab.keyboard.type("set_phase", delay=20)
    tab.wait_for_selector(".md-search-result__link")
    assert "indexer" in tab.locator(".md-search-result__list").inner_text().lower()
    tab.keyboard.press("Escape")
    schemes = set()
    for _ in range(2):
        schemes.add(tab.evaluate("document.body.dataset.mdColorScheme"))
        tab.locator("form[data-md-component=palette] label:not([hidden])").click()
    assert schemes == {"default", "slate"}
