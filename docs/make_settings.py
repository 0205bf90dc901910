"""Write docs/settings.md from the plugin's fields and a published config.json.

``tests/test_docs.py`` fails if the page is not current.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from glm5_patch.config.arguments import command_line
from glm5_patch.config.fields import GLM5Fields
from glm5_patch.config.huggingface import HFConfig

PAGE = Path(__file__).parent / "settings.md"
PUBLISHED = Path(__file__).parents[1] / "tests" / "configs" / "glm-5.2.json"
TEXT = """\
# Settings

`python docs/make_settings.py` makes this page. The environment variables are in README.md, and
`glm5-patch doctor` names one that is wrong.

## Fields

The plugin adds these fields to `TransformerConfig` and its subclasses, and to Megatron-LM's command
line. A core that has a field keeps its own default. A switch takes `--x` and `--no-x` on every
release.

| field | flag | default | |
|---|---|---|---|
{fields}

## What a GLM-5.2 needs on Megatron-LM's command line

`--glm5-config DIR` stands for all of these flags
([recipe](recipes.md#megatron-lms-pretrain_gptpy)). They say what the published `config.json` of
GLM-5.2 says:

```text
{flags}
```

Flags of parallelism, precision, recompute, data and the optimizer are yours.
"""


def page() -> str:
    flags = command_line(HFConfig.from_file(PUBLISHED))
    return TEXT.format(fields="\n".join(_rows()), flags="\n".join(flags))


def _rows():
    for field in dataclasses.fields(GLM5Fields):
        flag = "--" + field.name.replace("_", "-")
        text = field.metadata["argparse_meta"]["help"]
        yield f"| `{field.name}` | `{flag}` | `{field.default!r}` | {text} |"


if __name__ == "__main__":
    PAGE.write_text(page())
