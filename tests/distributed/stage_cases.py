"""Pipeline splits whose stages start on any layer. Layers 1, 2, 3 and 7 of 8 compute their top-k,
so 4, 5 and 6 are one, two and three layers after the source of their group."""

from __future__ import annotations

import itertools
from dataclasses import replace

from tests.distributed.cases import ALONE, CONTIGUOUS, CP, MTP, RECOMPUTE, SP, Case

ON = dict(dsa_topk_across_stages=True)
FREED = dict(deallocate_pipeline_outputs=True)
"""As Megatron-LM trains: then no gradient of the extra columns is sent."""
# Two ranks are each other's neighbour on both sides; gloo tells only single messages apart.
OVERLAPPED = dict(overlap_p2p_comm=True, batch_p2p_comm=False)
IN_FLIGHT = dict(microbatch_group_size_per_vp_stage=8)
"""The first stage runs eight microbatches before it goes backward."""
EMPTY = {
    "an empty chunk passes the top-k on": "Et*4||t*2|t*2,L",
    "an empty first chunk": "E|t*4|t|t*3,L",
    "an empty last chunk": "Et*5|t*2|t|L",
}
TWO_CHUNKS = {
    4: "Et*3|t|t*2|t*2,L",  # starts on 4, 5 and 7: the second chunk passes the top-k on
    5: "Et*4|t*2|t|t,L",  # 5, 7 and 8
    6: "Et|t*2|t*2|t*3,L",  # 2, 4 and 6
}
FOUR_STAGES = {
    4: "Et*3|t|t|t*3,L",  # 4, 5 and 6: a group over four stages
    6: "Et*2|t*3|t*2|t,L",  # 3, 6 and 8
}
A_LAYER_EACH = "Et|t|t|t|t|t|t|t,L"
MTP_TOO = "Et*3|t|t*2|t*2,mL"
ENDS_COUNT = dict(
    account_for_embedding_in_pipeline_split=True, account_for_loss_in_pipeline_split=True
)


def first(layers: int) -> dict:
    """Two stages, the first of so many layers."""
    return dict(num_layers_in_first_pipeline_stage=layers, **ON)


def layout(text: str) -> dict:
    return dict(pipeline_model_parallel_layout=text, **ON)


MODES = ("none", "full", "core_attn")


def _stages_alone(packed: str):
    """Only the layers are split, so every bit is that of one process."""
    thd = dict(thd=bool(packed))
    for layer, mode in itertools.product((4, 5, 6), MODES):
        recompute = {**RECOMPUTE[mode], **(FREED if layer == 5 else {})}
        yield Case(
            f"PP 2 from layer {layer}, recompute {mode}{packed}",
            pp=2,
            **thd,
            settings={**first(layer - 1), **recompute},
        )
        yield Case(
            f"PP 2 x VPP 2 from layer {layer}, recompute {mode}{packed}",
            pp=2,
            vpp=2,
            **thd,
            settings={**layout(TWO_CHUNKS[layer]), **OVERLAPPED, **recompute},
        )
    for layer in (4, 5, 6):
        yield Case(
            f"PP 2 from layer {layer}, two microbatches{packed}",
            pp=2,
            **thd,
            microbatches=2,
            settings={**first(layer - 1), **FREED},
        )
    eight = dict(microbatches=8, **thd)
    for mode in MODES:
        for layer, text in FOUR_STAGES.items():
            yield Case(
                f"PP 4 from layer {layer}, recompute {mode}{packed}",
                pp=4,
                **eight,
                settings={**layout(text), **FREED, **RECOMPUTE[mode]},
            )
        yield Case(
            f"PP 4 x VPP 2, a layer each, eight in flight, recompute {mode}{packed}",
            pp=4,
            vpp=2,
            **eight,
            settings={**layout(A_LAYER_EACH), **RECOMPUTE[mode]},
        )
        yield Case(
            f"PP 2 x VPP 2, eight in flight, recompute {mode}{packed}",
            pp=2,
            vpp=2,
            **eight,
            settings={**layout(TWO_CHUNKS[4]), **OVERLAPPED, **IN_FLIGHT, **RECOMPUTE[mode]},
        )
    yield Case(
        f"PP 4 x VPP 2, a layer each, eight in flight, overlapped{packed}",
        pp=4,
        vpp=2,
        **eight,
        settings={**layout(A_LAYER_EACH), **OVERLAPPED, **FREED},
    )


def _kinds_of_steps(packed: str):
    """Lengths that vary, evaluation, frozen layers, the loss of indexers."""
    thd = dict(thd=bool(packed))
    for mode in MODES:
        yield Case(
            f"PP 2, variable lengths, recompute {mode}{packed}",
            pp=2,
            **thd,
            varies=True,
            settings={**first(4), **RECOMPUTE[mode]},
        )
        yield Case(
            f"PP 2 x VPP 2, after training and evaluation, recompute {mode}{packed}",
            pp=2,
            vpp=2,
            **thd,
            evaluates=True,
            indexer_loss=0.1,
            settings={**layout(TWO_CHUNKS[4]), **OVERLAPPED, **FREED, **RECOMPUTE[mode]},
        )
        for freed in ({}, FREED):
            yield Case(
                f"PP 2, trains from layer 5, recompute {mode}{', freed' * bool(freed)}{packed}",
                pp=2,
                **thd,
                trains_from=5,
                settings={**first(4), **RECOMPUTE[mode], **freed},
            )
    yield Case(
        f"PP 2 x VPP 2 x TP 2 + SP, variable lengths{packed}",
        pp=2,
        vpp=2,
        tp=2,
        **thd,
        varies=True,
        settings={**layout(TWO_CHUNKS[4]), **OVERLAPPED, **SP},
    )
    yield Case(
        f"PP 2, indexer loss, recompute full{packed}",
        pp=2,
        **thd,
        indexer_loss=0.1,
        settings={**first(7), **RECOMPUTE["full"]},  # no layer of the second stage computes
    )
    yield Case(
        f"PP 4, indexer loss of a source that serves four stages{packed}",
        pp=4,
        **thd,
        indexer_loss=0.1,
        settings=layout(FOUR_STAGES[4]),
    )
    evaluation = dict(forward_only=True, **thd)
    yield Case(f"PP 2, forward only{packed}", pp=2, **evaluation, settings=first(4))
    yield Case(
        f"PP 2 x VPP 2, forward only{packed}",
        pp=2,
        vpp=2,
        **evaluation,
        settings={**layout(TWO_CHUNKS[4]), **OVERLAPPED},
    )
    yield Case(f"PP 4, forward only{packed}", pp=4, **evaluation, settings=layout(FOUR_STAGES[4]))


def _with_other_splits(packed: str):
    """Stages whose ranks have a part of each sequence."""
    thd = bool(packed)
    for name, sizes, settings in (
        ("TP 2 + SP", dict(tp=2, thd=thd), SP),
        ("CP 2", dict(cp=2, thd=thd, even_packs=thd), CP),
    ):
        for layer, mode in itertools.product((4, 5, 6), MODES):
            freed = FREED if layer == 6 else {}
            yield Case(
                f"PP 2 x {name} from layer {layer}, recompute {mode}{packed}",
                pp=2,
                **sizes,
                settings={**first(layer - 1), **settings, **freed, **RECOMPUTE[mode]},
            )
        for mode in MODES:
            yield Case(
                f"PP 2 x VPP 2 x {name}, indexer loss, recompute {mode}{packed}",
                pp=2,
                vpp=2,
                **sizes,
                indexer_loss=0.1,
                settings={**layout(TWO_CHUNKS[4]), **OVERLAPPED, **settings, **RECOMPUTE[mode]},
            )
        yield Case(
            f"PP 4 x {name}, recompute full{packed}",
            pp=4,
            **sizes,
            microbatches=8,
            settings={**layout(FOUR_STAGES[4]), **settings, **RECOMPUTE["full"]},
        )
    yield Case(
        f"PP 2 x CP 2, contiguous, recompute full{packed}",
        pp=2,
        cp=2,
        thd=thd,
        settings={**first(4), **CP, **CONTIGUOUS, **RECOMPUTE["full"]},
    )


def _in_host_memory(packed: str):
    """Top-k that wait for their backward in host memory, also those that the next stage reads."""
    thd, on = dict(thd=bool(packed)), dict(dsa_topk_offload=True)
    offload = {**on, **RECOMPUTE["full"]}
    yield Case(
        f"PP 2 from layer 5, offload{packed}",
        pp=2,
        **thd,
        settings={**first(4), **FREED, **offload},
    )
    yield Case(
        f"PP 2 x VPP 2, eight in flight, offload{packed}",
        pp=2,
        vpp=2,
        **thd,
        microbatches=8,
        indexer_loss=0.1,
        settings={**layout(TWO_CHUNKS[4]), **OVERLAPPED, **IN_FLIGHT, **offload},
    )
    yield Case(
        f"PP 2, trains from layer 5, offload{packed}",
        pp=2,
        **thd,
        trains_from=5,
        varies=True,
        settings={**first(4), **offload},
    )
    yield Case(
        f"PP 4 from layer 6, offload{packed}",
        pp=4,
        **thd,
        settings={**layout(FOUR_STAGES[6]), **on, **RECOMPUTE["core_attn"]},
    )
    yield Case(
        f"PP 2 x TP 2 + SP from layer 6, offload{packed}",
        pp=2,
        tp=2,
        **thd,
        settings={**first(5), **SP, **offload},
    )


def _one_of_each():
    for mode in ("none", "full"):  # where tokens are shared out, each rank has its own top-k
        yield Case(
            f"PP 2 x TP 2 + SP, heads, recompute {mode}",
            pp=2,
            tp=2,
            shares="heads",
            settings={**first(5), **SP, **FREED, **RECOMPUTE[mode]},
        )
    yield Case("PP 2, indexer loss, no layers", pp=2, indexer_loss=0.1, settings=layout("Et*8|L"))
    yield Case("PP 2, equal", pp=2, settings=ON)
    yield Case("PP 4, equal", pp=4, settings=ON)
    yield Case(
        "PP 2 x VPP 2, equal",
        pp=2,
        vpp=2,
        settings={**ON, **OVERLAPPED},
    )
    yield Case("PP 2 x EP 2", pp=2, dp=2, ep=2, settings=ON)
    yield Case(
        "PP 2 x DP 2, distributed optimizer", pp=2, dp=2, distributed_optimizer=True, settings=ON
    )
    yield Case("PP 2, adapters", pp=2, adapters=True, settings={**ON, **RECOMPUTE["full"]})
    yield Case("PP 2, uneven", pp=2, settings={**first(5), "num_layers_in_last_pipeline_stage": 3})
    yield Case("PP 2, embedding and loss count as layers", pp=2, settings={**ON, **ENDS_COUNT})
    for name, text in EMPTY.items():
        yield Case(
            f"PP 2 x VPP 2, {name}",
            pp=2,
            vpp=2,
            settings={**layout(text), **OVERLAPPED, **FREED},
        )
    yield Case(
        "MTP, PP 2, recompute core_attn",
        pp=2,
        settings={**MTP, **first(5), **RECOMPUTE["core_attn"]},
    )
    yield Case("MTP alone on the last stage", pp=4, settings={**MTP, **layout("Et*3|t*2|t*3|mL")})
    yield Case(
        "MTP, PP 2 x VPP 2, recompute core_attn, thd",
        pp=2,
        vpp=2,
        thd=True,
        settings={**MTP, **layout(MTP_TOO), **OVERLAPPED, **RECOMPUTE["core_attn"]},
    )
    for layer in (4, 6):
        yield Case(f"PP 2 from layer {layer}, bf16", pp=2, bf16=True, settings=first(layer - 1))


def _cases():
    for packed in ("", ", thd"):
        yield from _stages_alone(packed)
        yield from _kinds_of_steps(packed)
        yield from _with_other_splits(packed)
        yield from _in_host_memory(packed)
    yield from _one_of_each()


CASES = tuple(_cases())
_SOME = """
PP 2 from layer 5, offload, thd
PP 4 x VPP 2, a layer each, eight in flight, overlapped
PP 2 x VPP 2, after training and evaluation, recompute none
PP 2 x TP 2 + SP from layer 6, recompute full
PP 2 x CP 2 from layer 4, recompute core_attn, thd
PP 2 x VPP 2, an empty chunk passes the top-k on
MTP alone on the last stage
"""
SOME = tuple(case for case in CASES if case.name in _SOME.splitlines())

_SOUND = next(case for case in CASES if case.name == "PP 2 from layer 5, recompute none")
STALE = replace(_SOUND, name="the top-k of the microbatch before", stale=True)

FILES = dict(
    checkpoints=(
        ALONE,
        Case("PP 2, 4 + 4", pp=2, settings=first(4)),
        Case("PP 2 x VPP 2", pp=2, vpp=2, settings=layout(TWO_CHUNKS[6])),
        Case("PP 4", pp=4, settings=layout(FOUR_STAGES[4])),
        Case("PP 2, 5 + 3, x TP 2", pp=2, tp=2, settings={**first(5), **SP}),
    ),
    readers=(),
    savers=(
        Case("PP 2, 4 + 4", pp=2, settings=first(4)),
        Case("MTP, PP 2 x VPP 2", pp=2, vpp=2, settings={**MTP, **layout(MTP_TOO)}),
        Case("PP 2, 5 + 3, x TP 2", pp=2, tp=2, settings={**first(5), **SP}),
    ),
)
"""As of ``tests.distributed.cases``."""
