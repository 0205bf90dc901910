"""Ways to split a small GLM-5.2 between 2 and 4 ranks, and what one training step of each takes."""

from __future__ import annotations

import itertools
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
SERVED = dict(dsa_indexer_loss_layers="served", dsa_indexer_use_sparse_loss=True)
SERVED_ALL_KEYS = dict(SERVED, dsa_indexer_use_sparse_loss=False)


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
    padding: bool = False
    """Packs whose second half is padding."""
    indexer_loss: float | None = None
    loss: dict = field(default_factory=dict)
    """Further settings of the indexer's loss."""
    distributed_optimizer: bool = False
    forward_only: bool = False
    microbatches: int = 0
    """0: four where stages, replicas or more than two ranks share them out, else two."""
    bf16: bool = False
    stale: bool = False
    """Stages get the top-k of the microbatch before, so that the comparison can fail."""
    shares: str = "auto"
    """What tensor parallelism shares out: ``GLM5_PATCH_TP``."""
    heads: int = 6
    """Attention heads of the model."""
    deals: bool = False
    """Whether rows of index scores are dealt out, as they are in long sequences."""
    adapters: bool = False
    """On every projection of attention and indexer."""
    varies: bool = False
    """Microbatches of several lengths."""
    evaluates: bool = False
    """Another step of training and two of evaluation, of other tokens, come before."""
    trains_from: int = 1
    """The embedding and the layers before this one are frozen."""
    settings: dict = field(default_factory=dict)

    def __post_init__(self):
        several = self.pp * self.dp > 1 or self.world > 2
        self.microbatches = self.microbatches or (4 if several else 2)

    @property
    def shares_tokens(self) -> bool:
        """Whether each tensor-parallel rank selects for its own tokens alone."""
        return self.tp > 1 and self.shares != "heads" and "sequence_parallel" in self.settings

    @property
    def model(self) -> str:
        """Cases of the same model have the same weights."""
        mtp = "mtp" if "mtp_num_layers" in self.settings else "plain"
        return f"{mtp}-{self.heads}-heads{'-adapters' if self.adapters else ''}"

    @property
    def world(self) -> int:
        return max(self.tp * self.pp * self.dp * self.cp, self.ep)

    @property
    def batch(self) -> str:
        """Cases of the same batch and model have the same loss and gradients."""
        thd = ("even-thd" if self.even_packs else "thd") if self.thd else "bshd"
        padding = ("-padding" if self.padding else "") + ("-varies" if self.varies else "")
        padding += f"-from-{self.trains_from}" if self.trains_from > 1 else ""
        model = f"{self.model}{'-bf16' * self.bf16}"
        loss = "-".join(map(str, (self.indexer_loss or 0, *self.loss.values())))
        return f"{model}-{thd}{padding}-{loss}-{self.microbatches}"

    def alone(self) -> Case:
        """The same batch and model in one process, without recompute."""
        settings = MTP if "mtp_num_layers" in self.settings else {}
        return Case(
            self.batch,
            thd=self.thd,
            even_packs=self.even_packs,
            padding=self.padding,
            varies=self.varies,
            trains_from=self.trains_from,
            indexer_loss=self.indexer_loss,
            loss=self.loss,
            microbatches=self.microbatches,
            bf16=self.bf16,
            heads=self.heads,
            adapters=self.adapters,
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


def _shared_out_cases():
    """Tensor parallelism under sequence parallelism: tokens shared out, and heads."""
    for tp, layout in itertools.product((2, 4), ("", ", thd")):
        thd = bool(layout)
        heads = dict(heads=8) if tp == 4 else {}
        for mode, recompute in RECOMPUTE.items():
            settings = {**SP, **recompute}
            yield Case(
                f"TP {tp} + SP, indexer loss, recompute {mode}{layout}",
                tp=tp,
                thd=thd,
                indexer_loss=0.1,
                settings=settings,
                **heads,
            )
        for recompute in ("none", "full"):
            yield Case(
                f"TP {tp} + SP, heads, indexer loss, recompute {recompute}{layout}",
                tp=tp,
                thd=thd,
                indexer_loss=0.1,
                shares="heads",
                settings={**SP, **RECOMPUTE[recompute]},
                **heads,
            )
    for order, layout in itertools.product(("", ", contiguous"), ("", ", thd")):
        pack = dict(thd=bool(layout), even_packs=bool(layout) and not order)
        settings = {**CP, **SP, **(CONTIGUOUS if order else {})}
        for shares in ("auto", "heads"):
            yield Case(
                f"CP 2 x TP 2 + SP{order}, {shares}, indexer loss, recompute core_attn{layout}",
                cp=2,
                tp=2,
                **pack,
                indexer_loss=0.1,
                shares=shares,
                settings={**settings, **RECOMPUTE["core_attn"]},
            )
    for tp, layout in itertools.product((2, 4), ("", ", thd")):
        yield Case(
            f"TP {tp} + SP, dealt, indexer loss, recompute full{layout}",
            tp=tp,
            thd=bool(layout),
            indexer_loss=0.1,
            deals=True,
            settings={**SP, **FULL},
            **(dict(heads=8) if tp == 4 else {}),
        )
    yield Case(
        "CP 2 x TP 2 + SP, dealt, indexer loss",
        cp=2,
        tp=2,
        indexer_loss=0.1,
        deals=True,
        settings={**CP, **SP},
    )
    padded = dict(thd=True, even_packs=True, padding=True, indexer_loss=0.1)
    yield Case("TP 2 + SP, padding, indexer loss", tp=2, settings=SP, **padded)
    yield Case(
        "TP 2 + SP, heads, padding, indexer loss", tp=2, settings=SP, shares="heads", **padded
    )
    yield Case("CP 2, padding, indexer loss", cp=2, settings=CP, **padded)
    settings = {**CP, **CONTIGUOUS}
    yield Case("CP 2, contiguous, padding, indexer loss", cp=2, settings=settings, **padded)
    settings = {**CP, **SP, **FULL}
    yield Case(
        "CP 2 x TP 2 + SP, padding, indexer loss, recompute full",
        cp=2,
        tp=2,
        settings=settings,
        **padded,
    )
    for shares in ("auto", "heads"):
        yield Case(
            f"MTP, TP 2 + SP, {shares}, indexer loss",
            tp=2,
            indexer_loss=0.1,
            shares=shares,
            settings={**MTP, **SP},
        )
        for mode in ("none", "full", "core_attn", "mla_up_proj"):
            yield Case(
                f"TP 2 + SP, {shares}, adapters, indexer loss, recompute {mode}",
                tp=2,
                indexer_loss=0.1,
                shares=shares,
                adapters=True,
                settings={**SP, **RECOMPUTE[mode]},
            )


def _served_cases():
    """Indexers that learn from all layers that use their top-k, and dense warm-ups."""
    padded = dict(thd=True, even_packs=True, padding=True)
    for kind, loss in {"served": SERVED, "served, all keys": SERVED_ALL_KEYS}.items():
        learns = dict(indexer_loss=0.1, loss=loss)
        for shares, mode in itertools.product(("auto", "heads"), ("none", "full", "core_attn")):
            tokens = dict(tp=2, shares=shares, settings={**SP, **RECOMPUTE[mode]}, **learns)
            yield Case(f"TP 2 + SP, {shares}, {kind}, recompute {mode}, thd", thd=True, **tokens)
        settings = {**CP, **SP, **RECOMPUTE["core_attn"]}
        for shares in ("auto", "heads"):
            name = f"CP 2 x TP 2 + SP, {shares}, {kind}, recompute core_attn"
            yield Case(name, cp=2, tp=2, shares=shares, settings=settings, **learns)
        for mode in ("none", "full", "block"):
            settings = {**UNEVEN, **RECOMPUTE[mode]}
            yield Case(f"PP 2, {kind}, recompute {mode}", pp=2, settings=settings, **learns)
        for name, split, settings in (
            ("TP 2 + SP, padding", dict(tp=2, **padded), SP),
            ("CP 2, padding", dict(cp=2, **padded), CP),
            ("CP 2, contiguous, recompute full", dict(cp=2), {**CP, **CONTIGUOUS, **FULL}),
            ("PP 2 x VPP 2, recompute full", dict(pp=2, vpp=2), {**INTERLEAVED, **FULL}),
            ("DP 2", dict(dp=2), {}),
            ("MTP, TP 2 + SP", dict(tp=2), {**MTP, **SP}),
        ):
            yield Case(f"{name}, {kind}", **split, settings=settings, **learns)
    across = dict(num_layers_in_first_pipeline_stage=4, dsa_topk_across_stages=True)
    for name, split, settings, layers in (
        ("TP 2 + SP, recompute full", dict(tp=2), {**SP, **FULL}, SERVED),
        ("CP 2, thd", dict(cp=2, thd=True, even_packs=True), CP, SERVED),
        ("PP 2, recompute core_attn", dict(pp=2), {**UNEVEN, **RECOMPUTE["core_attn"]}, SERVED),
        ("PP 2 from layer 5", dict(pp=2), across, {}),
    ):
        loss = {**layers, "dsa_training_phase": "dense_warmup"}
        yield Case(
            f"{name}, dense warm-up", **split, settings=settings, indexer_loss=0.1, loss=loss
        )


CASES = (*_cases(), *_shared_out_cases(), *_served_cases())

_SOME = """
TP 2 + SP, heads, served, recompute none, thd
CP 2 x TP 2 + SP, auto, indexer loss, recompute core_attn, thd
TP 2 + SP, padding, served, all keys
TP 4 + SP, dealt, indexer loss, recompute full, thd
CP 2, contiguous, padding, indexer loss
MTP, TP 2 + SP, auto, indexer loss
TP 2 + SP, auto, adapters, indexer loss, recompute core_attn
PP 2, indexer loss, recompute full
PP 2 x VPP 2 x TP 2 + SP, recompute full
EP 2 x TP 2 + SP
DP 2, distributed optimizer
"""
SOME = tuple(case for case in CASES if case.name in _SOME.splitlines())
"""One of each kind; the others are more of the same."""

ALONE = Case("alone")
CHECKPOINT = Case("PP 2 x TP 2 + SP, distributed checkpoint", pp=2, tp=2, settings={**UNEVEN, **SP})
READERS = (CHECKPOINT, next(case for case in CASES if case.name == "EP 2 x TP 2 + SP"))
FILES = dict(
    checkpoints=(ALONE, CHECKPOINT),
    readers=READERS,
    savers=(
        *READERS,
        Case("PP 2 x VPP 2", pp=2, vpp=2, settings=INTERLEAVED),
        Case("MTP, EP 2", ep=2, settings=MTP),
        Case("MTP, TP 2 + SP", tp=2, settings={**MTP, **SP}),
        Case("MTP, PP 2 x DP 2", pp=2, dp=2, settings={**MTP, **UNEVEN}),
    ),
)
"""The splits of ``tests.distributed.files.Files``."""
SOME_FILES = {**FILES, "savers": (CHECKPOINT, FILES["savers"][-1])}
"""Of the writers one with TP and PP, and one with MTP, PP and DP."""


def source_of(case: Case) -> str:
    """The folder of the Hugging Face directory that one process has saved of this model."""
    return "hugging_face_mtp" if "mtp_num_layers" in case.settings else "hugging_face"


def worlds_of(cases: list[Case]) -> dict[int, list[dict]]:
    """World size -> cases as JSON; one process runs what each other world is compared with."""
    alone = {case.batch: case.alone() for case in cases}
    worlds: dict[int, list[dict]] = {1: [asdict(case) for case in alone.values()], 2: [], 4: []}
    for case in cases:
        worlds.setdefault(case.world, []).append(asdict(case))
    return worlds
