"""Making block FP8 of a saved checkpoint, as zai-org's releases have it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SINGLE = "model.safetensors"
BLOCK = 20
"""Divides none of the sizes: 64, 96, 48, ... have ragged edges."""


def quantize(directory: Path, block: int = BLOCK) -> dict[str, torch.Tensor]:
    """Make block FP8 of the projections, as zai-org's releases have them; what they mean, fp32."""
    tensors, meant = load_file(directory / SINGLE), {}
    for name in [n for n in tensors if n.endswith("_proj.weight") or n.endswith("wq_b.weight")]:
        matrix = tensors[name].float()
        rows, columns = matrix.shape
        scale = torch.rand(-(-rows // block), -(-columns // block)) * 3 + 0.5
        scale *= matrix.abs().max() / 300
        spread = scale.repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]
        tensors[name] = (matrix / spread).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
        meant[name] = tensors[name].float() * spread
    save_file(tensors, directory / SINGLE, metadata={"format": "pt"})
    edit_config(
        directory,
        quantization_config={
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [block, block],
        },
    )
    return meant


def edit_config(directory, **fields):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
