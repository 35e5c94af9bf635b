"""What `doctor` found: one sentence each, as a table for people and as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

State = Literal["ok", "note", "warning", "fault"]
NO_FAULT, FAULT, WRONG_USAGE = 0, 1, 2  # exit codes


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes
    ----------
    check : str
        What: a short name that does not change between versions, for scripts.
    state : str
        "ok"; "note": worth knowing; "warning": works, but perhaps not as meant; "fault": the server
        does not start, or the plugin does nothing.
    sentence : str
        One sentence; of a fault, the remedy too.
    """

    check: str
    state: State
    sentence: str


def exit_code(findings: Sequence[Finding]) -> int:
    """1 where there is a fault, else 0."""
    return FAULT if any(one.state == "fault" for one in findings) else NO_FAULT


def as_text(findings: Sequence[Finding], title: str) -> str:
    """A line each, in the order of the checks, and a last one that counts."""
    width = max((len(one.check) for one in findings), default=0)
    lines = [
        f"{one.state.upper() if one.state == 'fault' else one.state:<7}  "
        f"{one.check:<{width}}  {one.sentence}"
        for one in findings
    ]
    return "\n".join([title, "", *lines, "", _count(findings)])


def as_json(findings: Sequence[Finding], **more: Any) -> str:
    """One object: `faults` and `warnings` counted, `findings` in order, and whatever is known
    beside."""
    body = {
        "faults": _number(findings, "fault"),
        "warnings": _number(findings, "warning"),
        "findings": [asdict(one) for one in findings],
        **more,
    }
    return json.dumps(body, indent=2, ensure_ascii=False)


def _number(findings: Sequence[Finding], state: State) -> int:
    return sum(one.state == state for one in findings)


def _count(findings: Sequence[Finding]) -> str:
    faults, warnings = _number(findings, "fault"), _number(findings, "warning")
    return f"{_plural(faults, 'fault')}, {_plural(warnings, 'warning')}."


def _plural(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"
