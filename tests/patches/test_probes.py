"""What the probe of an indexer accepts, tried on stand-ins that are wrong in one thing each."""

import pytest
import torch

from glm5_patch.patches.probes.megatron_core import why_indexer_is_wrong


class Right:
    """Reads every setting, and turns the leading slice by interleaved pairs."""

    leading, interleaved = True, True

    def __init__(self):
        self.epsilon = self.config.dsa_indexer_k_norm_epsilon

    def forward_before_topk(self):
        return self.config.dsa_indexer_rotate_activation

    def _apply_rope(self, x, freqs, mscale, cu_seqlens=None):
        size = self.qk_pos_emb_head_dim
        rope, nope = (
            (x[..., :size], x[..., size:]) if Right.leading else (x[..., -size:], x[..., :-size])
        )
        a, b = (rope[..., ::2], rope[..., 1::2]) if Right.interleaved else rope.chunk(2, -1)
        angle = freqs[..., : size // 2]
        turned = [a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()]
        return torch.cat([*turned, nope], -1)


class IgnoresEpsilon(Right):
    def __init__(self):
        pass


class AlwaysRotates(Right):
    def forward_before_topk(self):
        pass


class KnowsNoPacks(Right):
    def _apply_rope(self, x, freqs, mscale):
        return Right._apply_rope(self, x, freqs, mscale)


def test_a_right_indexer_is_left_alone():
    assert why_indexer_is_wrong(Right) is None


@pytest.mark.parametrize("flag", ["leading", "interleaved"])
def test_another_rope_is_noticed(flag, monkeypatch):
    monkeypatch.setattr(Right, flag, False)
    assert "rope is not interleaved on the leading slice" in why_indexer_is_wrong(Right)


@pytest.mark.parametrize(
    ("indexer", "says"),
    [
        (IgnoresEpsilon, "dsa_indexer_k_norm_epsilon"),
        (AlwaysRotates, "dsa_indexer_rotate_activation"),
        (KnowsNoPacks, "does not restart at the documents"),
    ],
)
def test_a_setting_that_is_not_read_is_named(indexer, says):
    assert says in why_indexer_is_wrong(indexer)
