"""What positions turn: bit for bit what the host turns, in torch and in Triton."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from megatron.core.models.common.embeddings import apply_rotary_pos_emb

from glm5_patch.ops.rotation.operation import rotate
from glm5_patch.ops.rotation.reference import Rotation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
S, B, GROUPS, HEADS, ROPE = 5, 2, 2, 3, 8


def as_the_host(tensor, angles, mscale, interleaved):
    """[s, b, heads, rope]."""
    config = SimpleNamespace(
        apply_rope_fusion=False, rotary_interleaved=False, multi_latent_attention=interleaved
    )
    takes = inspect.signature(apply_rotary_pos_emb).parameters
    told = {"mla_rotary_interleaved": interleaved} if "mla_rotary_interleaved" in takes else {}
    group = SimpleNamespace(size=lambda: 1)
    return apply_rotary_pos_emb(tensor, angles, config, mscale=mscale, cp_group=group, **told)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("interleaved", [True, False], ids=["pairs", "halves"])
@pytest.mark.parametrize(("first", "last", "mscale"), [(12, 0, 1.0), (7, 3, 1.3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_bits_are_those_of_the_host(kernels, interleaved, first, last, mscale, dtype, monkeypatch):
    if kernels == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
        if dtype == (torch.float32 if DEVICE == "cuda" else torch.bfloat16):
            pytest.skip("a GPU gives fp32 to torch; Triton's interpreter cuts bf16 off")
    monkeypatch.setenv("GLM5_PATCH_KERNELS", kernels)
    generator = torch.Generator().manual_seed(first)
    angles = (20 * torch.randn(S, 1, 1, ROPE, generator=generator)).to(DEVICE)
    # As an exchange between ranks leaves them: groups of heads before the tokens.
    received = torch.randn(GROUPS, S, B, HEADS, first + ROPE + last, generator=generator)
    tensor = received.to(DEVICE, dtype).permute(1, 2, 0, 3, 4).requires_grad_()
    cos, sin = ((part.flatten(1) * mscale).to(dtype) for part in (angles.cos(), angles.sin()))
    found = rotate(tensor, Rotation(cos, sin, interleaved), first)

    parts = tensor.flatten(2, 3).split([first, ROPE, last], dim=-1)
    turned = as_the_host(parts[1], angles, mscale, interleaved)
    expected = torch.cat([parts[0], turned, parts[2]], dim=-1)
    assert torch.equal(found, expected)
    upstream = torch.randn(found.shape, generator=generator).to(DEVICE, dtype)
    ours, theirs = (torch.autograd.grad(one, tensor, upstream)[0] for one in (found, expected))
    assert torch.equal(ours, theirs)
