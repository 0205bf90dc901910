"""Splits that replay a recording made by one process: {TP, CP, PP, EP} x {no recompute, full}."""

from __future__ import annotations

import itertools

from tests.distributed.cases import CONTIGUOUS, CP, FULL, INTERLEAVED, MTP, SP, UNEVEN, Case
from tests.distributed.stage_cases import first


def _case(name: str, tp=1, cp=1, pp=1, ep=1, thd=False, shares="auto", settings=()) -> Case:
    """Expert parallelism goes over the ranks of CP where there are some."""
    return Case(
        name,
        tp=tp,
        cp=cp,
        pp=pp,
        ep=ep,
        dp=ep // cp or 1,
        thd=thd,
        even_packs=thd,
        microbatches=2 * (ep // cp or 1),
        shares=shares,
        settings=dict(settings),
    )


def _cases():
    for tp, cp, pp, ep in itertools.product((1, 2), repeat=4):
        for mode, recompute in (("none", {}), ("full", FULL)):
            settings = {**recompute}
            settings |= SP if tp == 2 else {}
            settings |= CP if cp == 2 else {}
            settings |= UNEVEN if pp == 2 else {}
            name = f"TP {tp}, CP {cp}, PP {pp}, EP {ep}, recompute {mode}"
            yield _case(name, tp, cp, pp, ep, settings=settings)
    pack = dict(thd=True)
    for name, mtp in (("", {}), (", MTP", MTP)):
        settings = {**SP, **CP, **FULL, **mtp}
        yield _case(f"TP 2, CP 2, recompute full, thd{name}", 2, 2, settings=settings, **pack)
        settings = {**first(4), **FULL, **mtp}
        yield _case(
            f"PP 2 from layer 5, recompute full, thd{name}", pp=2, settings=settings, **pack
        )
    settings = {**CP, **CONTIGUOUS, **FULL}
    yield _case("CP 2, contiguous, recompute full, thd", cp=2, settings=settings, **pack)
    for layout in ("", ", thd"):
        settings = {**SP, **CP, **FULL}
        name = f"TP 2, heads, CP 2, recompute full{layout}"
        yield _case(name, 2, 2, thd=bool(layout), shares="heads", settings=settings)
    case = _case("PP 2 x VPP 2, recompute full", pp=2, settings={**INTERLEAVED, **FULL})
    case.vpp = 2
    yield case


CASES = tuple(_cases())
_SOME = """
TP 2, CP 2, recompute full, thd, MTP
PP 2 from layer 5, recompute full, thd, MTP
"""
SOME = tuple(case for case in CASES if case.name in _SOME.splitlines())
