"""Pipeline splits whose stages start on any layer. Layers 1, 2, 3 and 7 of 8 compute their top-k,
so 4, 5 and 6 are one, two and three layers after the source of their group."""

from __future__ import annotations

from dataclasses import replace

from tests.distributed.cases import CP, MTP, RECOMPUTE, SP, Case

ON = dict(dsa_topk_across_stages=True)
FREED = dict(deallocate_pipeline_outputs=True)
"""As Megatron-LM trains: then no gradient of the extra columns is sent."""
# Two ranks are each other's neighbour on both sides; gloo tells only single messages apart.
OVERLAPPED = dict(overlap_p2p_comm=True, batch_p2p_comm=False)
TWO_CHUNKS = {
    4: "Et*3|t|t*2|t*2,L",  # starts on 4, 5 and 7: the second chunk passes the top-k on
    5: "Et*4|t*2|t|t,L",  # 5, 7 and 8
    6: "Et|t*2|t*2|t*3,L",  # 2, 4 and 6
}
FOUR_STAGES = {
    4: "Et*3|t|t|t*3,L",  # 4, 5 and 6: a group over four stages
    6: "Et*2|t*3|t*2|t,L",  # 3, 6 and 8
}


def first(layers: int) -> dict:
    """Two stages, the first of so many layers."""
    return dict(num_layers_in_first_pipeline_stage=layers, **ON)


def layout(text: str) -> dict:
    return dict(pipeline_model_parallel_layout=text, **ON)


def _cases():
    for packed in ("", ", thd"):
        thd = bool(packed)
        pack = dict(thd=thd, even_packs=thd)
        for layer in (4, 5, 6):
            for mode in ("none", "full", "core_attn"):
                recompute = {**RECOMPUTE[mode], **(FREED if layer == 5 else {})}
                yield Case(
                    f"PP 2 from layer {layer}, recompute {mode}{packed}",
                    pp=2,
                    thd=thd,
                    settings={**first(layer - 1), **recompute},
                )
                yield Case(
                    f"PP 2 x VPP 2 from layer {layer}, recompute {mode}{packed}",
                    pp=2,
                    vpp=2,
                    thd=thd,
                    settings={**layout(TWO_CHUNKS[layer]), **OVERLAPPED, **recompute},
                )
            yield Case(
                f"PP 2 from layer {layer}, two microbatches{packed}",
                pp=2,
                thd=thd,
                microbatches=2,
                settings={**first(layer - 1), **FREED},
            )
        for layer, text in FOUR_STAGES.items():
            for mode in ("none", "full", "core_attn"):
                yield Case(
                    f"PP 4 from layer {layer}, recompute {mode}{packed}",
                    pp=4,
                    thd=thd,
                    microbatches=8,
                    settings={**layout(text), **FREED, **RECOMPUTE[mode]},
                )
        eight = "Et|t|t|t|t|t|t|t,L"
        for mode in ("none", "full"):
            yield Case(
                f"PP 4 x VPP 2, a layer each, eight in flight, recompute {mode}{packed}",
                pp=4,
                vpp=2,
                thd=thd,
                microbatches=8,
                settings={**layout(eight), **RECOMPUTE[mode]},
            )
        yield Case(
            f"PP 4 x VPP 2, a layer each, eight in flight, overlapped{packed}",
            pp=4,
            vpp=2,
            thd=thd,
            microbatches=8,
            settings={**layout(eight), **OVERLAPPED, **FREED},
        )
        yield Case(
            f"PP 2, indexer loss, recompute full{packed}",
            pp=2,
            thd=thd,
            indexer_loss=0.1,
            settings={**first(4), **RECOMPUTE["full"]},
        )
        yield Case(
            f"PP 2, forward only{packed}", pp=2, thd=thd, forward_only=True, settings=first(4)
        )
        for mode in ("none", "full", "core_attn"):
            yield Case(
                f"PP 2 x TP 2 + SP, recompute {mode}{packed}",
                pp=2,
                tp=2,
                thd=thd,
                settings={**first(5), **SP, **FREED, **RECOMPUTE[mode]},
            )
            yield Case(
                f"PP 2 x CP 2, recompute {mode}{packed}",
                pp=2,
                cp=2,
                **pack,
                settings={**first(3), **CP, **RECOMPUTE[mode]},
            )
    for mode in ("none", "full"):  # where tokens are shared out, each rank has its own top-k
        yield Case(
            f"PP 2 x TP 2 + SP, heads, recompute {mode}",
            pp=2,
            tp=2,
            shares="heads",
            settings={**first(5), **SP, **FREED, **RECOMPUTE[mode]},
        )
    yield Case(
        "PP 2 x VPP 2 x TP 2 + SP",
        pp=2,
        vpp=2,
        tp=2,
        settings={**layout(TWO_CHUNKS[4]), **OVERLAPPED, **SP},
    )
    yield Case("PP 2, variable lengths", pp=2, settings={**first(4), **VARIABLE})
    yield Case("PP 2, uneven", pp=2, settings={**first(5), "num_layers_in_last_pipeline_stage": 3})
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
    for layer in (4, 6):
        yield Case(f"PP 2 from layer {layer}, bf16", pp=2, bf16=True, settings=first(layer - 1))


VARIABLE = dict(variable_seq_lengths=True, moe_token_dispatcher_type="alltoall")
EMPTY = {
    "an empty chunk passes the top-k on": "Et*4||t*2|t*2,L",
    "an empty first chunk": "E|t*4|t|t*3,L",
    "an empty last chunk": "Et*5|t*2|t|L",
}

CASES = tuple(_cases())
_SOME = """
PP 2 from layer 4, recompute core_attn
PP 2 from layer 5, recompute full, thd
PP 2 x VPP 2 from layer 6, recompute full
PP 4 from layer 4, recompute core_attn, thd
PP 4 x VPP 2, a layer each, eight in flight, overlapped
PP 2, indexer loss, recompute full
PP 2 x TP 2 + SP, recompute full
PP 2 x TP 2 + SP, heads, recompute none
PP 2 x CP 2, recompute core_attn, thd
PP 2 x VPP 2, an empty chunk passes the top-k on
MTP alone on the last stage
PP 2 from layer 6, bf16
"""
SOME = tuple(case for case in CASES if case.name in _SOME.splitlines())

_SOUND = next(case for case in CASES if case.name == "PP 2 from layer 5, recompute none")
STALE = replace(_SOUND, name="the top-k of the microbatch before", stale=True)
