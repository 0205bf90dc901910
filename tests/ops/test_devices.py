"""The kernels fit the shared memory of GPUs that are not here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from glm5_patch.ops import tiles
from glm5_patch.ops.index_loss import reference, triton
from glm5_patch.ops.sparse_attention.inputs import AbsorbedInputs
from tests.ops.test_sparse_attention import random_topk
from tests.tiny import relative

SHARED_MEMORY = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Bytes that a program may take, by compute capability (CUDA's programming guide)."""


@pytest.mark.nightly
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_every_kernel_compiles_and_fits(capability):
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {name: os.environ[name] for name in os.environ if name != "TRITON_INTERPRET"}
    compiled = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "-m", "tests.ops.compiled"),
            *(str(capability), str(SHARED_MEMORY[capability])),
        ],
        cwd=Path(__file__).parents[2],
        env={**environment, "GLM5_PATCH_KERNELS": "triton"},
        capture_output=True,
        text=True,
    )
    assert compiled.returncode == 0, compiled.stderr[-4000:]
    kernels = [json.loads(line) for line in compiled.stdout.splitlines() if line.startswith("{")]
    names = {kernel["kernel"].split("-")[0] for kernel in kernels}
    assert {"forward", "backward", "project", "head_sums", "loss", "scores", "topk"} <= names
    assert {"ranks", "resolve", "expand", "bounds", "quantize"} <= names
    if capability == 90:
        assert {"gluon_forward", "gluon_backward", "gluon_bounds", "gluon_head_sums"} <= names
        assert {"gluon_scores", "gluon_candidates", "bars"} <= names
        assert {"topk_of_misled", "scores_and_topk_of_misled"} <= names
        assert {"mark", "unite", "gluon_union_backward", "gluon_union_bounds"} <= names
    too_much = [one for one in kernels if one["shared"] > SHARED_MEMORY[capability]]
    assert not too_much


@pytest.mark.parametrize(
    ("capability", "chosen"),
    [
        (80, tiles.AMPERE),
        (89, tiles.SMALL),
        (90, tiles.HOPPER),
        (100, tiles.BLACKWELL),
        (120, tiles.SMALL),
    ],
)
def test_tiles_are_chosen_by_what_the_device_has(capability, chosen):
    assert tiles.choose(divmod(capability, 10), SHARED_MEMORY[capability]) == chosen


def test_a_target_of_more_heads_than_a_program_takes(interpreted, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr(tiles, "of_device", lambda device: tiles.SMALL)
    generator = torch.Generator().manual_seed(0)
    s, heads, latent, rope = 12, 2 * tiles.SMALL.target_heads + 3, 64, 16
    starts = torch.zeros(s, dtype=torch.int64)
    absorbed = AbsorbedInputs(
        torch.randn(s, 1, heads, latent + rope, generator=generator),
        torch.randn(s, 1, latent + rope, generator=generator),
        random_topk(s, 1, 7, starts, generator),
        starts.int(),
        torch.arange(s, dtype=torch.int32),
        latent,
        0.2,
    )
    found, expected = (module.head_sums(absorbed, None) for module in (triton, reference))
    assert relative(found, expected) < 1e-5
