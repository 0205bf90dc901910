"""Write docs/api.md from the docstrings of what ``glm5_patch`` exports.

``tests/test_docs.py`` fails if the page is not current.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import glm5_patch

PAGE = Path(__file__).parent / "api.md"
GROUPS = {
    "Activation": ("status", "require", "enable", "disable", "Status"),
    "Models": (
        "transformer_config",
        "gpt_model",
        "hybrid_model",
        "set_latent_norm_epsilon",
        "single_process",
    ),
    "Checkpoints": ("HFCheckpoint", "HFConfig", "save", "report"),
    "Training": ("set_phase", "audit", "recorded", "topk_overlap"),
    "Figures": ("indexer_losses", "SelectionProbe", "IndexerCallback", "write_figures"),
    "Replay": (
        "record_topk",
        "replay_topk",
        "TopkRecording",
        "topk_from_sglang",
        "topk_from_sglang_log",
        "topk_from_vllm",
        "topk_from_array",
    ),
    "Errors": (
        "GLM5PatchError",
        "ScheduleError",
        "PipelineSplitError",
        "MissingTopkError",
        "CheckpointError",
    ),
}
MEMBERS = {
    "TopkRecording": ("nbytes", "covers", "keys", "merge", "save", "load"),
    "SelectionProbe": ("measure",),
    "IndexerCallback": ("on_train_step_end",),
    "HFCheckpoint": ("report", "read", "load_into"),
    "HFConfig": ("from_directory", "from_file", "megatron_kwargs"),
}
"""Methods and properties that are public."""
INTRO = """\
# API

Import every name from `glm5_patch`. Importing `glm5_patch` loads only the standard library; each
name below loads its module on first use. Everything else in the package is private.

This page is made from the docstrings by `python docs/make_api.py`.
"""


def page() -> str:
    parts = [INTRO]
    for group, names in GROUPS.items():
        parts.append(f"## {group}\n")
        parts += [_entry(name) for name in names]
    return "\n".join(parts)


def _entry(name: str) -> str:
    value = getattr(glm5_patch, name)
    text = f"### `{name}`\n\n"
    if not (inspect.isclass(value) and issubclass(value, Exception)):
        text += f"```text\n{_signature(name, value)}\n```\n\n"
    text += _markdown(inspect.getdoc(value))
    for member_name in MEMBERS.get(name, ()):
        member = inspect.getattr_static(value, member_name)
        of_property = getattr(member, "func", getattr(member, "fget", None))  # cached, or plain
        function = of_property or getattr(member, "__func__", member)
        shown = f"{name}.{member_name}"
        if of_property is None:
            shown = _signature(shown, function)
        text += f"\n```text\n{shown}\n```\n\n{_markdown(inspect.getdoc(function))}"
    return text


def _signature(name: str, value) -> str:
    signature = str(inspect.signature(value)).replace("'", "")
    signature = re.sub(r"<function \S+ at \w+>", "...", signature)
    line = name + re.sub(r"\((self|cls)(, )?", "(", signature)
    if len(line) <= 90:
        return line
    start, _, rest = line.partition("(")
    arguments, arrow, returns = rest.rpartition(")")
    parts = re.split(r", (?![^\[]*\])", arguments)
    return f"{start}(\n" + "".join(f"    {part},\n" for part in parts) + f"){arrow[1:]}{returns}"


def _markdown(docstring: str) -> str:
    """A docstring with Google's sections as Markdown."""
    lines = []
    section = False
    for line in docstring.replace("``", "`").splitlines():
        heading = re.fullmatch(r"(Args|Returns|Raises|Yields|Warns):", line)
        if heading:
            section = True
            lines.append(f"**{heading[1]}**\n")
        elif section and (item := re.match(r"    (\w+(?:, \w+)*): (.*)", line)):
            lines.append(f"- `{item[1]}`: {item[2]}")
        elif section and line.startswith("    "):
            lines.append(
                f"  {line.strip()}" if lines[-1].startswith(("- ", "  ")) else line.strip()
            )
        else:
            section = section and not line
            lines.append(line)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
