"""Megatron-LM's pretrain_gpt.py from Hugging Face weights, and back to Hugging Face's format.

    torchrun ... examples/megatron_lm_hf.py Megatron-LM/pretrain_gpt.py GLM-5.2 TRAINED ARGUMENTS

GLM-5.2 is a directory with config.json and safetensors files, and TRAINED the directory to write.
ARGUMENTS are those of pretrain_gpt.py; ``--glm5-config`` is added. Without a GPU it trains a toy
model in one process.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import torch  # loads the plugin
from megatron.core.models.gpt import GPTModel

from glm5_patch import HFCheckpoint, save


def main(script: str, source: str, output: str, *arguments: str) -> None:
    checkpoint, chunks = HFCheckpoint(source), []
    build = GPTModel.__init__

    def build_and_fill(model, *args, **kwargs):
        build(model, *args, **kwargs)
        print(checkpoint.load_into(model))  # each rank its part, before the optimizer copies it
        chunks.append(model)

    GPTModel.__init__ = build_and_fill
    arguments = ("--glm5-config", source, *arguments)
    if torch.cuda.is_available():
        sys.path.append(str(Path(script).parent))
        sys.argv = [script, *arguments]
        runpy.run_path(script, run_name="__main__")
    else:
        from glm5_patch.testing.cpu_launch import launch

        launch(script, list(arguments))
    save(chunks, checkpoint.config, output, checkpoint)


if __name__ == "__main__":
    main(*sys.argv[1:])
