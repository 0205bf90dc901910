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

`glm5_patch.transformer_config` makes every setting from a published `config.json`
([API](api.md#transformer_config)). `TransformerConfig` accepts megatron-core 0.19's names on every
core: `dsa_indexer_topk_freq`, `dsa_indexer_skip_topk_offset`, `dsa_indexer_rope_interleaved`,
`dsa_indexer_rotate_activation` and `dsa_indexer_k_norm_epsilon`. A field that a core lacks gets
GLM-5's value as its default. `python docs/make_settings.py` makes this page.

Two settings cannot be guessed:

- The epsilon of the latent norms. Hugging Face uses 1e-6 and ignores `rms_norm_eps`. Trainers,
  serving engines and this package use `rms_norm_eps`.
  `glm5_patch.set_latent_norm_epsilon(model, 1e-6)` selects Hugging Face's.
- The default of `index_skip_topk_offset`. It is 2 in a `config.json` and 0 in a Megatron
  configuration.

## Environment variables

`glm5-patch doctor` names one that is wrong.

| switch | effect |
|---|---|
| `GLM5_PATCH=0` | arms nothing |
| `GLM5_PATCH_DISABLE=id,...` | leaves out these patches; a model that needs one is refused |
| `GLM5_PATCH_STRICT=1` | raises where a patch fails, instead of a warning and a refusal later |
| `GLM5_PATCH_LOG=debug` | logs what is armed and applied |
| `GLM5_PATCH_ATTENTION=auto` | selects the attention modules of a GLM-5: `plugin` the plugin's, \
`host` megatron-core's (0.19 and later; an error where they are wrong). `auto`, the default, takes \
the plugin's, and megatron-core's if `dsa_kernel_backend` asks for its kernels |
| `GLM5_PATCH_KERNELS=auto` | selects the backend of sparse attention: `auto`, `triton`, `gluon`, \
`cudnn`, `flash_mla`, `deep_gemm` or `torch` ([performance](performance.md)) |
| `GLM5_PATCH_TP=auto` | selects what the ranks of tensor parallelism share out in sparse \
attention: `tokens`, `heads`, or `auto`, the default: tokens under sequence parallelism, else \
heads ([parallel training](parallel.md)) |

`TORCH_DEVICE_BACKEND_AUTOLOAD=0` keeps torch from loading any plugin.

## Fields

The plugin adds these fields to `TransformerConfig` and its subclasses, and to Megatron-LM's command
line. A core that has a field keeps its own default. A switch takes `--x` and `--no-x` on every
release.

| field | flag | default | |
|---|---|---|---|
{fields}

## What a GLM-5.2 needs on Megatron-LM's command line

`--glm5-config DIR` stands for all of these flags
([Megatron-LM](megatron-lm.md)). They say what the published `config.json` of
GLM-5.2 says:

```text
{flags}
```

Flags of parallelism, precision, recompute, data and the optimizer are yours.

## Masks and padding

Sparse attention is causal. A mask that says anything else is refused:

| `attention_mask` | |
|---|---|
| `None` | accepted: causal |
| a causal mask, `[1 or b, 1, s, s]` | accepted |
| padding on the right: causal and hidden keys, `[b, 1, 1, s]`, or Hugging Face's `[b, s]` \\
| accepted |
| padding on the left, several documents, keys after the query, numbers instead of bool \\
| `GLM5PatchError` |

The mask of a padding query may hide every key. Pack several documents (`packed_seq_params` with
`qkv_format="thd"`). Padding tokens inside a pack add nothing to the indexer loss:
`cu_seqlens_q_padded` or `real_token_mask_q` says which tokens they are.
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
