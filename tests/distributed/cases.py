"""Ways to split a small GLM-5.2 between 2 and 4 ranks, and what one training step of each takes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

FULL = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
RECOMPUTE = {
    "none": {},
    "full": FULL,
    "block": {**FULL, "recompute_method": "block", "recompute_num_layers": 3},
    "core_attn": dict(recompute_granularity="selective", recompute_modules=["core_attn"]),
    "mla_up_proj": dict(recompute_granularity="selective", recompute_modules=["mla_up_proj"]),
    "layernorm": dict(recompute_granularity="selective", recompute_modules=["layernorm"]),
}
SP = dict(sequence_parallel=True)
UNEVEN = dict(num_layers_in_first_pipeline_stage=6, num_layers_in_last_pipeline_stage=2)
# Two ranks are each other's neighbour on both sides; gloo tells only single messages apart.
INTERLEAVED = dict(
    pipeline_model_parallel_layout="Et|t|t*4|t*2,L", overlap_p2p_comm=True, batch_p2p_comm=False
)
CP = dict(cp_comm_type="allgather")
CONTIGUOUS = dict(dsa_context_parallel_order="contiguous")
MTP = dict(mtp_num_layers=1)


@dataclass
class Case:
    """One split. Layers 1, 2, 3 and 7 of 8 compute their top-k."""

    name: str
    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    ep: int = 1
    dp: int = 1
    cp: int = 1
    thd: bool = False
    even_packs: bool = False
    """Documents that context parallelism can cut into equal chunks."""
    indexer_loss: float | None = None
    distributed_optimizer: bool = False
    forward_only: bool = False
    settings: dict = field(default_factory=dict)

    @property
    def world(self) -> int:
        return max(self.tp * self.pp * self.dp * self.cp, self.ep)

    @property
    def batch(self) -> str:
        """Cases of the same batch and model have the same loss and gradients."""
        mtp = "mtp" if "mtp_num_layers" in self.settings else "plain"
        thd = ("even-thd" if self.even_packs else "thd") if self.thd else "bshd"
        return f"{mtp}-{thd}-{self.indexer_loss or 0}"

    def alone(self) -> Case:
        """The same batch and model in one process, without recompute."""
        settings = MTP if "mtp_num_layers" in self.settings else {}
        return Case(
            self.batch,
            thd=self.thd,
            even_packs=self.even_packs,
            indexer_loss=self.indexer_loss,
            settings=settings,
        )


def _cases():
    yield Case("TP 2, forward", tp=2, forward_only=True)
    yield Case("TP 2, forward, thd", tp=2, thd=True, forward_only=True)
    for layout in ("", ", thd"):
        thd = bool(layout)
        yield Case(f"TP 2 + SP{layout}", tp=2, thd=thd, settings=SP)
        yield Case(f"TP 2 + SP, indexer loss{layout}", tp=2, thd=thd, indexer_loss=0.1, settings=SP)
        for mode, recompute in RECOMPUTE.items():
            settings = {**UNEVEN, **recompute}
            yield Case(f"PP 2, recompute {mode}{layout}", pp=2, thd=thd, settings=settings)
            settings = {**INTERLEAVED, **recompute}
            yield Case(
                f"PP 2 x VPP 2, recompute {mode}{layout}", pp=2, vpp=2, thd=thd, settings=settings
            )
        yield Case(
            f"PP 2, indexer loss, recompute full{layout}",
            pp=2,
            thd=thd,
            indexer_loss=0.1,
            settings={**UNEVEN, **FULL},
        )
        yield Case(
            f"PP 2 x TP 2 + SP, recompute full{layout}",
            pp=2,
            tp=2,
            thd=thd,
            settings={**UNEVEN, **SP, **FULL},
        )
        pack = dict(thd=thd, even_packs=thd)
        yield Case(f"CP 2{layout}", cp=2, **pack, settings=CP)
        yield Case(f"CP 2, recompute full{layout}", cp=2, **pack, settings={**CP, **FULL})
        yield Case(
            f"CP 2, indexer loss, recompute core_attn{layout}",
            cp=2,
            **pack,
            indexer_loss=0.1,
            settings={**CP, **RECOMPUTE["core_attn"]},
        )
        yield Case(f"CP 2 x TP 2 + SP{layout}", cp=2, tp=2, **pack, settings={**CP, **SP})
        yield Case(
            f"CP 2 x PP 2, recompute full{layout}",
            cp=2,
            pp=2,
            **pack,
            settings={**CP, **UNEVEN, **FULL},
        )
        whole = dict(thd=thd)  # documents of any length may cross ranks
        settings = {**CP, **CONTIGUOUS}
        yield Case(f"CP 2, contiguous{layout}", cp=2, **whole, settings=settings)
        yield Case(
            f"CP 2, contiguous, indexer loss, recompute mla_up_proj{layout}",
            cp=2,
            **whole,
            indexer_loss=0.1,
            settings={**settings, **RECOMPUTE["mla_up_proj"]},
        )
        yield Case(
            f"CP 2 x TP 2 + SP, contiguous, recompute full{layout}",
            cp=2,
            tp=2,
            **whole,
            settings={**settings, **SP, **FULL},
        )
    yield Case("EP 2", ep=2)
    yield Case("EP 2 x TP 2 + SP", tp=2, ep=2, dp=2, settings=SP)
    yield Case("EP 2 x PP 2, recompute full", pp=2, dp=2, ep=2, settings={**UNEVEN, **FULL})
    yield Case("DP 2", dp=2)
    yield Case("DP 2, distributed optimizer", dp=2, distributed_optimizer=True)
    yield Case(
        "DP 2 x TP 2 + SP, distributed optimizer",
        dp=2,
        tp=2,
        distributed_optimizer=True,
        settings=SP,
    )
    yield Case(
        "PP 2 x VPP 2 x TP 2 + SP, recompute full",
        pp=2,
        vpp=2,
        tp=2,
        settings={**INTERLEAVED, **SP, **FULL},
    )
    yield Case(
        "MTP, PP 2, recompute core_attn",
        pp=2,
        settings={**MTP, **UNEVEN, **RECOMPUTE["core_attn"]},
    )
    yield Case(
        "MTP alone on the last stage",
        pp=2,
        settings={**MTP, "pipeline_model_parallel_layout": "Et*8|mL"},
    )


CASES = tuple(_cases())

_SOME = """
TP 2, forward, thd
TP 2 + SP, thd
TP 2 + SP, indexer loss
PP 2, recompute full, thd
PP 2, recompute block
PP 2, recompute core_attn
PP 2, recompute layernorm
PP 2, indexer loss, recompute full
PP 2 x VPP 2, recompute full
PP 2 x VPP 2, recompute mla_up_proj, thd
PP 2 x VPP 2 x TP 2 + SP, recompute full
CP 2, recompute full, thd
CP 2, indexer loss, recompute core_attn
CP 2 x TP 2 + SP
CP 2, contiguous, indexer loss, recompute mla_up_proj, thd
CP 2 x TP 2 + SP, contiguous, recompute full
EP 2 x TP 2 + SP
DP 2, distributed optimizer
MTP, PP 2, recompute core_attn
MTP alone on the last stage
"""
SOME = tuple(case for case in CASES if case.name in _SOME.splitlines())
"""One of each kind; the others are more of the same."""

CHECKPOINT = Case("PP 2 x TP 2 + SP, distributed checkpoint", pp=2, tp=2, settings={**UNEVEN, **SP})
"""Saved so and loaded into one process, and the other way round."""
READERS = (CHECKPOINT, next(case for case in CASES if case.name == "EP 2 x TP 2 + SP"))
"""Splits that load a Hugging Face directory, each rank its part."""
SAVERS = (
    *READERS,
    Case("PP 2 x VPP 2", pp=2, vpp=2, settings=INTERLEAVED),
    Case("MTP, EP 2", ep=2, settings=MTP),
    Case("MTP, TP 2 + SP", tp=2, settings={**MTP, **SP}),
    Case("MTP, PP 2 x DP 2", pp=2, dp=2, settings={**MTP, **UNEVEN}),
)
"""Splits that write a Hugging Face directory, each rank files of its own."""


def source_of(case: Case) -> str:
    """The folder of the Hugging Face directory that one process has saved of this model."""
    return "hugging_face_mtp" if "mtp_num_layers" in case.settings else "hugging_face"


def worlds_of(cases: list[Case]) -> dict[int, list[dict]]:
    """World size -> cases as JSON; one process runs what each other world is compared with."""
    alone = {case.batch: case.alone() for case in cases}
    worlds: dict[int, list[dict]] = {1: [asdict(case) for case in alone.values()], 2: [], 4: []}
    for case in cases:
        worlds[case.world].append(asdict(case))
    return worlds
