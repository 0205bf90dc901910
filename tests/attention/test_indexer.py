"""The indexer against Hugging Face's formulas, written out from the tensors of a checkpoint."""

import pytest
import torch
from megatron.core.transformer.experimental_attention_variant.dsa import DSAIndexerLossLoggingHelper
from torch.nn.functional import layer_norm, rms_norm

from glm5_patch.attention.build import gpt_model
from glm5_patch.checkpoint.reader import HFCheckpoint
from glm5_patch.config.huggingface import HFConfig
from glm5_patch.testing.parity import recorded, recorded_hf
from glm5_patch.tools.verify import forward, randomize
from tests.tiny import (
    RMS_NORM_EPS,
    hf_config,
    hf_model,
    megatron_config,
    megatron_model,
    saved,
    tokens,
)

LENGTH, BATCH, COEFFICIENT = 40, 2, 0.3
ONE_LAYER = dict(num_hidden_layers=1, index_topk_freq=1)
PREFIX = "model.layers.0.self_attn."
INDEXER = {
    "wq_b.weight": "linear_wq_b.weight",
    "wk.weight": "linear_wk.weight",
    "k_norm.weight": "k_norm.weight",
    "k_norm.bias": "k_norm.bias",
    "weights_proj.weight": "linear_weights_proj.weight",
}


def rotated(x, theta):
    """Pairs (0, 1), (2, 3), ... of [b, s, n, d] turned by their position."""
    d = x.shape[-1]
    angles = torch.outer(torch.arange(x.shape[1]), theta ** (-torch.arange(0, d, 2) / d))
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


class Layer:
    """The first layer of a checkpoint: scores of its indexer, and what its heads attend to."""

    def __init__(self, checkpoint, ids):
        self.config, self.theta = checkpoint.config, checkpoint.config.rope_theta
        read = lambda name: checkpoint.read(PREFIX + name)
        self.indexer = {name: read(f"indexer.{name}").requires_grad_() for name in INDEXER}
        embedded = checkpoint.read("model.embed_tokens.weight")[ids]
        norm = checkpoint.read("model.layers.0.input_layernorm.weight")
        self.x = rms_norm(embedded, norm.shape, norm, RMS_NORM_EPS)
        norm = read("q_a_layernorm.weight")
        self.q_latent = rms_norm(self.x @ read("q_a_proj.weight").T, norm.shape, norm, 1e-6)
        self.read = read
        self.causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()

    def scores(self):
        """[b, s, t], not masked."""
        heads, dim = self.config.index_n_heads, self.config.index_head_dim
        rope, w = self.config.qk_rope_head_dim, self.indexer
        q = (self.q_latent @ w["wq_b.weight"].T).unflatten(-1, (heads, dim))
        k = self.x @ w["wk.weight"].T
        k = layer_norm(k, k.shape[-1:], w["k_norm.weight"], w["k_norm.bias"], 1e-6)[:, :, None]
        q, k = (torch.cat([rotated(t[..., :rope], self.theta), t[..., rope:]], -1) for t in (q, k))
        per_head = torch.einsum("bshd,btd->bsht", q, k[:, :, 0]).mul(dim**-0.5).relu()
        weights = self.x @ w["weights_proj.weight"].T * heads**-0.5
        return torch.einsum("bsht,bsh->bst", per_head, weights)

    def attention(self, mask):
        """Probabilities averaged over the heads, [b, s, t]."""
        c, read = self.config, self.read
        nope, rope, heads = c.qk_nope_head_dim, c.qk_rope_head_dim, c.num_attention_heads
        q = (self.q_latent @ read("q_b_proj.weight").T).unflatten(-1, (heads, nope + rope))
        latent, k_rope = (self.x @ read("kv_a_proj_with_mqa.weight").T).split(
            [c.kv_lora_rank, rope], -1
        )
        norm = read("kv_a_layernorm.weight")
        latent = rms_norm(latent, norm.shape, norm, 1e-6)
        k = (latent @ read("kv_b_proj.weight").T).unflatten(-1, (heads, -1))[..., :nope]
        logits = torch.einsum("bsnd,btnd->bnst", q[..., :nope], k)
        q_rope, k_rope = rotated(q[..., nope:], self.theta), rotated(k_rope[:, :, None], self.theta)
        logits += torch.einsum("bsnd,btd->bnst", q_rope, k_rope[:, :, 0])
        logits *= (nope + rope) ** -0.5
        return logits.masked_fill(~mask[:, None], float("-inf")).softmax(-1).mean(1)


@pytest.mark.parametrize("sparse", [False, True], ids=["all keys", "selected keys"])
def test_the_logged_loss_and_its_gradients_are_those_of_the_definition(world, sparse, tmp_path):
    """KL(attention || indexer), DeepSeek-V3.2-Exp, section 2.1, as the mean over the queries."""
    checkpoint = saved(tmp_path, **ONE_LAYER)
    ids = tokens(0, BATCH, LENGTH)
    model = megatron_model(
        checkpoint, dsa_indexer_loss_coeff=COEFFICIENT, dsa_indexer_use_sparse_loss=sparse
    ).train()
    DSAIndexerLossLoggingHelper.clean_loss_in_tracker()
    DSAIndexerLossLoggingHelper.tracker.pop("values", None)  # of a model with other layers
    (forward(model, ids).sum() * 0).backward()  # through the loss alone, whose gradient is 1
    logged = DSAIndexerLossLoggingHelper.tracker.pop("values")

    layer = Layer(checkpoint, ids)
    mask = layer.causal.expand(BATCH, LENGTH, LENGTH)
    scores = layer.scores()
    if sparse:
        order = scores.masked_fill(~mask, float("-inf")).sort(dim=-1, descending=True, stable=True)[
            1
        ]
        best = order[..., : layer.config.index_topk]
        mask = mask & torch.zeros_like(mask).scatter(-1, best, True)
    predicted = scores.masked_fill(~mask, float("-inf")).log_softmax(-1).masked_fill(~mask, 0)
    target = layer.attention(mask)
    terms = torch.where(target > 0, target * (target.clamp_min(1e-30).log() - predicted), 0)
    loss = COEFFICIENT * terms.sum(-1).mean()
    loss.backward()
    assert logged.tolist() == pytest.approx([loss.item()], rel=1e-5)
    ours = dict(model.decoder.layers[0].self_attention.core_attention.indexer.named_parameters())
    for name, expected in layer.indexer.items():
        gradient = ours[INDEXER[name]].grad
        assert (gradient - expected.grad).norm() < 1e-5 * expected.grad.norm(), name


def test_with_one_key_more_than_the_top_k_one_is_left_out(world, tmp_path):
    """The shortest sequence on which a selection shows."""
    theirs = hf_model(hf_config(**ONE_LAYER))
    theirs.save_pretrained(tmp_path)
    model = megatron_model(HFCheckpoint(tmp_path))
    index_topk = theirs.config.index_topk
    for length in (index_topk, index_topk + 1):
        ids = tokens(0, 8, length)
        with torch.no_grad(), recorded(model) as found, recorded_hf(theirs) as expected:
            logits, reference = forward(model, ids), theirs(ids, use_cache=False).logits
        last = found.topk_indices[1][:, -1]
        assert torch.equal(last.sort(-1)[0], expected[1][:, -1].sort(-1)[0])
        assert (last >= 0).sum(-1).tolist() == [index_topk] * 8
        assert (logits - reference).abs().max() < 2e-5


def test_equal_scores_fall_to_the_first_keys(our_core, tmp_path):
    """Unlike in Hugging Face, where ``torch.topk`` chooses by the length of the row."""
    theirs = hf_model(hf_config(**ONE_LAYER))
    with torch.no_grad():
        theirs.model.layers[0].self_attn.indexer.weights_proj.weight.zero_()
    theirs.save_pretrained(tmp_path)
    model = megatron_model(HFCheckpoint(tmp_path))
    ids, index_topk = tokens(0, 2, 300), theirs.config.index_topk
    with torch.no_grad(), recorded(model) as found, recorded_hf(theirs) as expected:
        forward(model, ids), theirs(ids, use_cache=False)
    assert (found.topk_indices[1][:, index_topk:] == torch.arange(index_topk)).all()
    ours = found.topk_indices[1].sort(-1)[0]
    assert torch.equal(ours, expected[1].to(ours).sort(-1)[0])


def logged(*, layers: int, depths: int, mtp_trains: bool = True) -> torch.Tensor:
    """What the host's tracker holds after one step."""
    hf = HFConfig(hf_config(num_hidden_layers=layers, index_topk_freq=1).to_dict())
    config = megatron_config(hf, mtp_num_layers=depths or None, dsa_indexer_loss_coeff=COEFFICIENT)
    model = gpt_model(hf, config).train()
    torch.manual_seed(0)
    randomize(model)
    if depths:
        model.mtp.train(mtp_trains)
    ids = tokens(0, BATCH, LENGTH)
    positions = torch.arange(LENGTH).expand(BATCH, LENGTH)
    DSAIndexerLossLoggingHelper.clean_loss_in_tracker()
    model(ids, positions, None, labels=ids)
    return DSAIndexerLossLoggingHelper.tracker["values"].clone()


def test_each_depth_of_mtp_logs_in_a_slot_of_its_own(world):
    """Also in a tracker that a smaller model has left."""
    DSAIndexerLossLoggingHelper.tracker.clear()
    assert logged(layers=1, depths=0).shape == (1,)
    values = logged(layers=2, depths=2)
    assert values.shape == (4,) and (values > 0).all()
    decoder_alone = logged(layers=2, depths=2, mtp_trains=False)
    torch.testing.assert_close(values[:2], decoder_alone[:2])
    assert decoder_alone[2:].tolist() == [0, 0]
    DSAIndexerLossLoggingHelper.tracker.clear()
