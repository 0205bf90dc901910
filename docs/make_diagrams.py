"""Draw docs/images/activation.svg and forward.svg: the two ways through the plugin.

``tests/test_site.py`` fails if they are not current. They have a background of their own, so that
they are readable in a dark theme, and ask for no font of the network.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent / "images"
LINE, PAD = 18, 12
COLOURS = {"host": "#e8eaf6", "plugin": "#d7f0dd", "end": "#fff3cd", "error": "#f8d7da"}
"""Of boxes: what the host does, what the plugin does, and how it ends."""


class Box(NamedTuple):
    x: int
    y: int
    width: int
    kind: str
    text: str

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @property
    def height(self) -> int:
        return LINE * len(self.lines) + 2 * PAD - 6

    @property
    def middle(self) -> tuple[int, int]:
        return self.x + self.width // 2, self.y + self.height // 2


class Arrow(NamedTuple):
    start: Box
    end: Box
    label: str = ""


def drawing(width: int, height: int, title: str, boxes: list[Box], arrows: list[Arrow]) -> str:
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" '
        'font-family="ui-sans-serif, Helvetica, Arial, sans-serif" font-size="13">',
        f"<title>{escape(title)}</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" '
        'markerHeight="8" orient="auto"><path d="M0 0L8 4L0 8z" fill="#455a64"/></marker></defs>',
        f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>',
    ]
    parts += [_box(box) for box in boxes]
    parts += [_arrow(arrow) for arrow in arrows]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _box(box: Box) -> str:
    x = box.x + box.width // 2
    lines = "".join(
        f'<tspan x="{x}" y="{box.y + PAD + LINE * number + 9}"'
        f"{_weight(number, box)}>{escape(line)}</tspan>"
        for number, line in enumerate(box.lines)
    )
    return (
        f'<rect x="{box.x}" y="{box.y}" width="{box.width}" height="{box.height}" rx="6" '
        f'fill="{COLOURS[box.kind]}" stroke="#607d8b"/>'
        f'<text text-anchor="middle" fill="#1b1f23">{lines}</text>'
    )


def _weight(number: int, box: Box) -> str:
    return ' font-weight="bold"' if number == 0 and len(box.lines) > 1 else ""


def _arrow(arrow: Arrow) -> str:
    """Straight down or up if the boxes are above each other, else straight to the side."""
    (x1, y1), (x2, y2) = arrow.start.middle, arrow.end.middle
    if abs(x1 - x2) < (arrow.start.width + arrow.end.width) / 2 and x1 != x2:
        x1 = x2 = min(arrow.start, arrow.end, key=lambda box: box.width).middle[0]
    if x1 == x2:
        down = y2 > y1
        y1 = arrow.start.y + (arrow.start.height if down else 0)
        y2 = arrow.end.y + (0 if down else arrow.end.height)
        label = (x1 + 8, (y1 + y2) // 2 + 4, "start")
    else:
        right = x2 > x1
        y1 = y2 = max(arrow.start.y, arrow.end.y) + min(arrow.start.height, arrow.end.height) // 2
        x1 = arrow.start.x + (arrow.start.width if right else 0)
        x2 = arrow.end.x + (0 if right else arrow.end.width)
        label = ((x1 + x2) // 2, y1 - 6, "middle")
    text = ""
    if arrow.label:
        text = (
            f'<text x="{label[0]}" y="{label[1]}" text-anchor="{label[2]}" fill="#455a64" '
            f'font-size="12">{escape(arrow.label)}</text>'
        )
    return (
        f'<path d="M{x1} {y1}L{x2} {y2}" stroke="#455a64" stroke-width="1.5" fill="none" '
        f'marker-end="url(#tip)"/>{text}'
    )


def activation() -> str:
    torch = Box(20, 20, 300, "host", "import torch\nentry points of the group torch.backends")
    armed = Box(20, 110, 300, "plugin", "The plugin is armed\na finder, first in sys.meta_path")
    host = Box(20, 200, 300, "host", "import megatron.core...\nthe module has been executed")
    probe = Box(20, 290, 300, "plugin", "patch.needed(module)\ntests what this host can do")
    change = Box(20, 380, 300, "plugin", "patch.apply(module, seams)\na failure is undone")
    built = Box(20, 470, 300, "host", "TransformerBlock(config of a GLM-5)\nbuilding the model")
    gate = Box(20, 560, 300, "plugin", "gate\nis every needed patch in place?")
    model = Box(20, 650, 300, "end", "The model is built")
    off = Box(430, 110, 270, "end", "disabled\nby an environment variable")
    waits = Box(430, 200, 270, "end", "armed\nuntil the module is imported")
    native = Box(430, 290, 270, "end", "not_needed\nnothing is changed")
    applied = Box(430, 380, 270, "end", "applied, or failed with a warning")
    error = Box(430, 560, 270, "error", "GLM5PatchError\nnames the patch, the seam, the cause")
    down = [torch, armed, host, probe, change, built, gate, model]
    labels = ["", "", "", "needed", "", "", "yes"]
    arrows = [Arrow(*pair, label) for pair, label in zip(zip(down, down[1:]), labels)]
    arrows += [
        Arrow(armed, off, "switched off"),
        Arrow(host, waits, "not yet"),
        Arrow(probe, native, "no"),
        Arrow(change, applied),
        Arrow(gate, error, "no"),
    ]
    boxes = [*down, off, waits, native, applied, error]
    return drawing(720, 710, "From import torch to a model that is built", boxes, arrows)


def forward() -> str:
    block = Box(20, 20, 680, "plugin", "TransformerBlock.__call__\nopens a store for this forward")
    computing = Box(20, 120, 300, "host", "Computing layer (F)\nhidden states, q latent")
    indexer = Box(
        20, 210, 300, "plugin", "Lightning indexer\ntop-k of its scores, or the keys to replay"
    )
    skip = Box(400, 120, 300, "host", "Skip layer (s)\nhidden states, no indexer")
    store = Box(400, 210, 300, "plugin", "Store of this forward\ntop-k of the last computing layer")
    one = Box(20, 310, 300, "plugin", "Sparse attention\non the latent, over the selected keys")
    two = Box(400, 310, 300, "plugin", "Sparse attention\non the latent, over the selected keys")
    checkpoint = Box(20, 410, 680, "host", "Activation checkpoint\nkeeps its input")
    again = Box(
        20, 510, 680, "plugin", "Recompute in the backward\nwith the store of its own forward"
    )
    arrows = [
        Arrow(block, computing),
        Arrow(block, skip),
        Arrow(computing, indexer),
        Arrow(skip, store, "reads"),
        Arrow(indexer, store, "writes"),
        Arrow(indexer, one),
        Arrow(store, two),
        Arrow(one, checkpoint),
        Arrow(two, checkpoint),
        Arrow(checkpoint, again, "takes the store along"),
    ]
    boxes = [block, computing, indexer, skip, store, one, two, checkpoint, again]
    return drawing(720, 584, "One forward of a GLM-5", boxes, arrows)


DIAGRAMS = {"activation": activation, "forward": forward}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, draw in DIAGRAMS.items():
        (FOLDER / f"{name}.svg").write_text(draw())
