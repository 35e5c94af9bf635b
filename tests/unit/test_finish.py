"""A record rides on a finish reason, and leaves with it."""

from __future__ import annotations

import gc
import json
import weakref
from typing import Any

import pytest

from sglang_deepprune.actions import Retired
from sglang_deepprune.group import State
from sglang_deepprune.patches import finish
from sglang_deepprune.types import ChoiceRecord, GroupRecord

RETIRED = Retired(ChoiceRecord(0, "finished", 5), GroupRecord("g", True, "x" * 3000))


@pytest.mark.parametrize("kind", ["token", "stopped", "abort"])
def test_a_reason_carries_its_record_and_is_gone_with_its_last_holder(kind: str):
    """By reference counts alone: what waits for the garbage collector waits for hours in a server
    with a large heap, and looks like a leak."""
    of_sglang: Any = finish  # its imports are SGLang's classes
    reason = {
        "token": lambda: of_sglang.FINISH_MATCHED_TOKEN(matched=7),
        "stopped": lambda: finish.FinishStopped(State.PRUNED, 5),
        "abort": lambda: of_sglang.FINISH_ABORT("gone"),
    }[kind]()
    plain = reason.to_json()
    gc.disable()
    try:
        finish.annotate(reason, RETIRED)
        told = reason.to_json()
        assert json.loads(told.pop("deepprune"))["choice"]["state"] == "finished"
        assert told == plain and reason.to_json() is not reason.to_json()
        is_there = weakref.ref(reason)
        del reason
        assert is_there() is None
    finally:
        gc.enable()
