"""Logits of Hugging Face, in a process of its own: Bridge insists on other transformers releases.

python -m tests.hosts.bridge.oracle DTYPE IDS OUTPUT DIRECTORY[+ADAPTER] ...
"""

from __future__ import annotations

import sys

import torch
import transformers

from glm5_patch.testing.parity import LowerTies


def logits(where: str, ids: torch.Tensor, dtype: str) -> torch.Tensor:
    directory, _, adapter = where.partition("+")
    model = transformers.GlmMoeDsaForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype), attn_implementation="eager"
    ).to(ids.device)
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad(), LowerTies():
        return model.eval()(ids, use_cache=False).logits.float()


def main() -> None:
    release = tuple(map(int, transformers.__version__.split(".")[:2]))
    if release < (5, 13):
        sys.exit(f"transformers {transformers.__version__} ropes the indexer of GLM-5 wrongly")
    dtype, ids, output, *places = sys.argv[1:]
    torch.save({where: logits(where, torch.load(ids), dtype) for where in places}, output)


if __name__ == "__main__":
    main()
