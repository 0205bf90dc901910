"""Masks that say what is computed are taken, others are refused."""

import pytest
import torch

from glm5_patch.errors import GLM5PatchError
from glm5_patch.tools.verify import forward
from tests.tiny import loss_of, megatron_model, pack_forward, packed, saved, tokens

S = 24
CAUSAL = torch.ones(S, S, dtype=torch.bool).triu(1)


@pytest.fixture(scope="module")
def model(world, tmp_path_factory):
    return megatron_model(saved(tmp_path_factory.mktemp("mask") / "hf"))


def with_hidden_keys(hidden, rows_too=False):
    """Causal, and besides the keys of ``hidden``, bool [2, S]; their own rows hidden whole too."""
    mask = CAUSAL | hidden[:, None, None, :]
    return mask | hidden[:, None, :, None] if rows_too else mask


LEFT = torch.stack([torch.arange(S) < 5, torch.arange(S) < 0])
RIGHT = torch.stack([torch.arange(S) >= S - 5, torch.arange(S) >= S])
DOCUMENTS = torch.block_diag(torch.ones(10, 10), torch.ones(14, 14)).bool()


def run(model, mask, batch=2):
    ids = tokens(0, batch, S)
    with torch.no_grad():
        return model(ids, torch.arange(S).expand_as(ids), mask), forward(model, ids)


@pytest.mark.parametrize(
    "mask",
    [
        CAUSAL[None, None],
        CAUSAL.expand(2, 1, S, S),
        with_hidden_keys(RIGHT),
        with_hidden_keys(RIGHT, rows_too=True),
        RIGHT[:, None, None],
        ~RIGHT,
        torch.ones(2, S, dtype=torch.int64),
        torch.zeros(1, 1, 1, 1, dtype=torch.bool),
    ],
    ids=["causal", "a batch", "right", "right rows", "keys", "hugging face", "integers", "dummy"],
)
def test_causal_masks_and_padding_on_the_right_are_taken(model, mask):
    masked, plain = run(model, mask)
    assert torch.equal(masked, plain)


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (with_hidden_keys(LEFT), "hides keys before the query: padding on the left"),
        (with_hidden_keys(LEFT, rows_too=True), "hides keys before the query"),
        (LEFT[:, None, None], "padding on the left"),
        (~LEFT, "padding on the left"),
        (torch.zeros(1, 1, S, S, dtype=torch.bool), "shows keys after the query"),
        ((CAUSAL | ~DOCUMENTS)[None, None], "several documents"),
        (CAUSAL[None, None].float() * -1e9, "must be bool"),
        (CAUSAL[None], "must be one of"),
        (CAUSAL[None, None, :20], "does not fit 24 queries and 24 keys"),
    ],
    ids=["left", "left rows", "keys", "hugging face", "full", "documents", "numbers", "3d", "size"],
)
def test_other_masks_are_refused(model, mask, says):
    with pytest.raises(GLM5PatchError, match="attention_mask of shape .*" + says):
        run(model, mask)


def test_a_refusal_says_what_to_do(model):
    with pytest.raises(GLM5PatchError, match="pad on the right, or pack documents"):
        run(model, with_hidden_keys(LEFT))


def test_a_mask_that_changed_in_place_is_read_again(model):
    mask = CAUSAL[None, None].clone()
    run(model, mask)
    mask.zero_()
    with pytest.raises(GLM5PatchError, match="shows keys after the query"):
        run(model, mask)


@pytest.mark.parametrize("mask", [CAUSAL, CAUSAL | ~DOCUMENTS], ids=["causal", "documents"])
def test_a_pack_takes_the_mask_of_its_documents(model, mask):
    ids, pack = tokens(0, 1, S), packed([10, 14])
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    with torch.no_grad():
        masked = model(ids, positions, mask[None, None], packed_seq_params=pack)
        assert torch.equal(masked, pack_forward(model, ids, pack))


def test_each_mask_is_read_once(model, monkeypatch):
    from glm5_patch.attention import mask as module

    reads, check = [], module._check
    monkeypatch.setattr(module, "_check", lambda *args: reads.append(1) or check(*args))
    mask, ids = CAUSAL[None, None].clone(), tokens(0, 2, S)
    settings = dict(
        recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
    )
    for name, value in settings.items():
        monkeypatch.setattr(model.config, name, value)
    model.train()
    loss_of(model(ids, torch.arange(S).expand_as(ids), mask), ids).backward()
    model.eval()
    assert len(reads) == 1
