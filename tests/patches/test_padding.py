"""What padding must not do: teach the indexer, load the experts."""

import pytest
import torch

from glm5_patch.errors import GLM5PatchError
from glm5_patch.patches import MACHINE
from tests.tiny import loss_of, megatron_model, packed, relative, saved, tokens

LENGTHS, PADDED = [5, 19, 30], [8, 20, 32]


@pytest.fixture(scope="module")
def checkpoint(world, tmp_path_factory):
    return saved(tmp_path_factory.mktemp("padding") / "hf")


def pack(**told):
    params = packed(PADDED)
    for name, value in told.items():
        setattr(params, name, value)
    return params


def by_lengths():
    lengths, padded = packed(LENGTHS).cu_seqlens_q, packed(PADDED).cu_seqlens_q
    return pack(
        cu_seqlens_q=lengths,
        cu_seqlens_kv=lengths,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
    )


def is_real():
    return torch.cat([torch.arange(p) < n for n, p in zip(LENGTHS, PADDED)])


def by_mask():
    return pack(real_token_mask_q=is_real())


def indexer_gradients(checkpoint, params, ids, sizes, **settings):
    """Of the indexer loss alone."""
    model = megatron_model(checkpoint, dsa_indexer_loss_coeff=0.1, **settings).train()
    positions = torch.cat([torch.arange(n) for n in sizes])[None]
    (model(ids, positions, None, packed_seq_params=params).sum() * 0).backward()
    return torch.cat([p.grad.flatten() for n, p in model.named_parameters() if ".indexer." in n])


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("told", [by_lengths, by_mask])
def test_padding_inside_a_pack_gives_no_indexer_loss(
    checkpoint, lower_position_first, told, per_token, sparse
):
    settings = dict(calculate_per_token_loss=per_token, dsa_indexer_use_sparse_loss=sparse)
    ids = tokens(4, 1, sum(PADDED))
    found = indexer_gradients(checkpoint, told(), ids, PADDED, **settings)
    alone = indexer_gradients(checkpoint, packed(LENGTHS), ids[:, is_real()], LENGTHS, **settings)
    assert alone.any()
    assert relative(found, alone) < 1e-5


@pytest.mark.parametrize("length", [24, 8])  # 8: as many tokens as experts
@pytest.mark.parametrize("recompute", [None, "full"])
def test_padding_is_no_load_of_the_experts(checkpoint, length, recompute):
    settings = dict(moe_router_enable_expert_bias=True, recompute_granularity=recompute)
    if recompute:
        settings.update(recompute_method="uniform", recompute_num_layers=1)
    model = megatron_model(checkpoint, **settings).train()
    ids, positions = tokens(0, 1, length), torch.arange(length)[None]
    padding_mask = positions >= length - 3
    logits = model(ids, positions, None, padding_mask=padding_mask)
    loss_of(logits, ids).backward()
    routers = [m for n, m in model.named_modules() if n.endswith("router")]
    assert routers
    for router in routers:
        load = router.local_tokens_per_expert.sum()
        assert load == (length - 3) * model.config.moe_router_topk


def test_other_models_keep_the_hosts_router(world):
    from types import SimpleNamespace

    from megatron.core.transformer.moe.router import TopKRouter

    router = SimpleNamespace(
        config=SimpleNamespace(experimental_attention_variant=None),
        enable_expert_bias=True,
        local_tokens_per_expert=torch.zeros(3),
    )
    routing_map, padding_mask = torch.ones(3, 3, dtype=torch.bool), torch.tensor([0, 0, 1]).bool()
    patched = TopKRouter._apply_expert_bias
    results = []
    for function in (patched, getattr(patched, "__wrapped__", patched)):
        router.local_tokens_per_expert.zero_()
        function(router, routing_map, padding_mask=padding_mask)
        results.append(router.local_tokens_per_expert.clone())
    assert torch.equal(*results)


@pytest.mark.parametrize("right", [True, False])
def test_a_router_that_a_client_replaced_is_judged_by_what_it_counts(
    checkpoint, monkeypatch, right
):
    """mcore-bridge lays the mask along the tokens itself."""
    from megatron.core.transformer.moe.router import TopKRouter

    if MACHINE.row("router_padding").state != "applied":
        pytest.skip("this host's router leaves padding out")
    before = TopKRouter._apply_expert_bias

    def laid_along_the_tokens(self, routing_map, padding_mask=None):
        return before(self, routing_map, None if padding_mask is None else padding_mask[:, None])

    def without_mask(self, routing_map, padding_mask=None):
        return before(self, routing_map)

    replaced = laid_along_the_tokens if right else without_mask
    monkeypatch.setattr(TopKRouter, "_apply_expert_bias", replaced)
    if right:
        megatron_model(checkpoint)
    else:
        with pytest.raises(GLM5PatchError, match="router_padding.*counts padded tokens"):
            megatron_model(checkpoint)
