"""The faults move with the code: a text that is gone would catch nothing at night."""

from tests.mutation.__main__ import FAULTS, why_it_does_not_apply


def test_every_fault_still_applies():
    assert {fault.name: why_it_does_not_apply(fault) for fault in FAULTS} == dict.fromkeys(
        fault.name for fault in FAULTS
    )
