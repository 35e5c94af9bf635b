"""How a stopped sibling ends, and how its record rides on any finish reason.

A stopped choice is OpenAI's "length": cut short, neither a complete answer nor an error. (An abort
with a status code would fail the whole n>1 call; "stop" would read as complete.)
"""

from __future__ import annotations

import json
from typing import Any

from sglang.srt.managers.schedule_batch import (
    FINISH_ABORT,
    FINISH_LENGTH,
    FINISH_MATCHED_TOKEN,
)

from sglang_deepprune.actions import Retired
from sglang_deepprune.group import State
from sglang_deepprune.patches import wire


class FinishStopped(FINISH_LENGTH):
    """A sibling that we ended. `state` is the name its choice will carry."""

    def __init__(self, state: State, length: int):
        super().__init__(length)
        self.state = state


def state_of(reason: Any) -> State:
    """The end state that a finish reason stands for."""
    if isinstance(reason, FinishStopped):
        return reason.state
    if isinstance(reason, FINISH_ABORT):
        return State.ABORTED if reason.status_code is None else State.FAILED
    return State.FINISHED


def is_cut(reason: Any) -> bool:
    """Ended by a length limit or a stop string rather than by the model's own end token."""
    return not isinstance(reason, FINISH_MATCHED_TOKEN)


def annotate(reason: Any, retired: Retired) -> None:
    """Let `reason.to_json()` carry the record; every other key stays as it is.

    The reason must not come to hold itself, as it would by its own `to_json`: a server's heap is so
    large that Python looks for such circles rarely, and a record is some kilobytes.
    """
    told = {**reason.to_json(), **payload(retired)}
    reason.to_json = lambda: dict(told)


def payload(retired: Retired) -> dict[str, str]:
    """One extra key of a finish reason's JSON."""
    body: dict[str, Any] = {"choice": retired.choice.to_json()}
    if retired.group is not None:
        body["group"] = retired.group.to_json()
    return {wire.KEY: json.dumps(body)}
