"""Draw docs/images/screens/*.svg: what each command prints on a terminal of 80 columns.

    python docs/make_screens.py [NAME ...]

Run it in an environment in which a wheel of this package, megatron-core, transformers and rich are
installed. ``tests/test_site.py`` checks what the pictures show against the commands of today.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shutil
import struct
import sys
import tempfile
import termios
from pathlib import Path

FOLDER = Path(__file__).parent / "images" / "screens"
ROOT = Path(__file__).parents[1]
COLUMNS, LONGEST = 80, 90
"""Of a picture. The middle of a longer output is left out."""
SCREENS = {
    "status": "glm5-patch status",
    "status-import": "glm5-patch status --import",
    "doctor": "glm5-patch doctor",
    "explain": "glm5-patch explain index_share_carrier",
    "env": "glm5-patch env",
    "verify": "glm5-patch verify",
    "verify-model": "glm5-patch verify --model my_glm5.py:wrong",
    "demo": "glm5-patch demo --steps 5",
    "plan-pp": "glm5-patch plan --config GLM-5.2 --pp 8",
    "plan-gpus": "glm5-patch plan --config GLM-5.2 --gpus 256",
    "checkpoint": "glm5-patch checkpoint check my-checkpoint",
    "overlap": "glm5-patch overlap --checkpoint my-checkpoint --text prompts.txt",
}
"""Name -> command, which runs in a folder with these files."""
WRONG = """
def wrong(directory):
    import torch
    from transformers import GlmMoeDsaForCausalLM
    model = GlmMoeDsaForCausalLM.from_pretrained(directory)
    width = model.config.qk_rope_head_dim
    for layer in model.model.layers:  # rope on the last dimensions of each head of the indexer
        indexer = layer.self_attn.indexer
        if indexer is not None:
            for linear in (indexer.wq_b, indexer.wk):
                rows = linear.weight.data.unflatten(0, (-1, model.config.index_head_dim))
                linear.weight.data = rows.roll(width, 1).flatten(0, 1).contiguous()
            for vector in (indexer.k_norm.weight, indexer.k_norm.bias):
                vector.data = vector.data.roll(width)
    return model
"""


def prepare(folder: Path) -> None:
    """The files that the commands name."""
    (folder / "GLM-5.2").mkdir()
    published = ROOT / "tests" / "configs" / "glm-5.2.json"
    shutil.copy(published, folder / "GLM-5.2" / "config.json")
    (folder / "my_glm5.py").write_text(WRONG)
    (folder / "prompts.txt").write_text((ROOT / "LICENSE").read_text())
    os.system(f"cd {folder} && glm5-patch demo --steps 1 --output my-checkpoint >/dev/null 2>&1")


def run(command: str, folder: Path) -> str:
    """What a command writes to a terminal, with escape sequences."""
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(folder)
        os.environ.update(TERM="xterm-256color", COLUMNS=str(COLUMNS), PYTHONWARNINGS="ignore")
        words = command.split()
        os.execvp(words[0], words)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    written = b""
    while True:
        try:
            part = os.read(terminal, 1 << 16)
        except OSError:  # the child has closed its end
            break
        if not part:
            break
        written += part
    os.waitpid(child, 0)
    return written.decode()


def screen(written: str) -> str:
    """What stays on the screen: of a bar that was drawn several times, the last."""
    lines = []
    for line in written.replace("\r\n", "\n").split("\n"):
        line = re.split(r"\x1b\[2K|\r", line)[-1]
        lines.append(re.sub(r"\x1b\[\?25[lh]", "", line))
    while lines and not lines[-1].strip():
        lines.pop()
    if len(lines) > LONGEST:
        half = LONGEST // 2
        lines[half:-half] = ["", f"... {len(lines) - 2 * half} more lines ...", ""]
    return "\n".join(lines)


def picture(command: str, written: str) -> str:
    """SVG of a terminal, without the fonts that rich would take from the network."""
    from rich.console import Console
    from rich.terminal_theme import MONOKAI
    from rich.text import Text

    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"), force_terminal=True)
    console.print(Text.from_ansi(f"$ {command}\n{screen(written)}"), no_wrap=True, crop=True)
    svg = console.export_svg(title=command, theme=MONOKAI, unique_id="screen")
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    return re.sub(r"\n\s*\n+", "\n", svg.replace("Fira Code", "ui-monospace"))


def main(names: list[str]) -> int:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="glm5-") as scratch:
        prepare(Path(scratch))
        for name in names or SCREENS:
            written = run(SCREENS[name], Path(scratch)).replace(scratch, ".")
            (FOLDER / f"{name}.svg").write_text(picture(SCREENS[name], written))
            print(name, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
