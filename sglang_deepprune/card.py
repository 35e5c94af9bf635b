"""A judge's card: what it was measured on, how good it was, and whether it may prune.

Written by `sglang-deepprune eval-judge --card`. JSON; `docs/judges.md` explains the figures.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FORMAT = "sglang-deepprune judge card 1"


class CardError(ValueError):
    """No card, or one that cannot be believed; one sentence."""


@dataclass(frozen=True, slots=True)
class Card:
    """
    Attributes
    ----------
    judge : str
        As named on the command line, without folders.
    data : dict
        file, sha256, questions, traces, seed, folds.
    figures : list[dict]
        One row a cut, as in the command's JSON.
    taus : dict[str, float]
        Calibrated tau by cut; a cut at which no tau holds the wanted false-merge rate is missing.
    may_prune : bool
        The rule of `evaluation.judge_rule`, at the best cut.
    reason : str
        One sentence.
    """

    judge: str
    data: dict[str, Any]
    figures: list[dict[str, Any]]
    taus: dict[str, float]
    may_prune: bool
    reason: str

    def __post_init__(self) -> None:
        kinds = {"judge": str, "data": dict, "figures": list, "taus": dict, "may_prune": bool,
                 "reason": str}  # fmt: skip
        for name, kind in kinds.items():
            if not isinstance(getattr(self, name), kind):
                raise CardError(f"{name} of a judge's card must be a {kind.__name__}")
        if not all(isinstance(row, dict) for row in self.figures):
            raise CardError("figures of a judge's card must be objects")
        for cut, tau in self.taus.items():
            if isinstance(tau, bool) or not isinstance(tau, (int, float)) or not 0 <= tau <= 1:
                raise CardError(f"tau of {cut[:40]!r} in a judge's card must be in [0, 1]")


def save(card: Card, path: str | Path) -> None:
    Path(path).write_text(json.dumps({"format": FORMAT, **asdict(card)}, indent=2) + "\n")


def load(path: str | Path) -> Card:
    """Raises `CardError` with one sentence on anything that is no card."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
            raise CardError(f"not of format {FORMAT!r}")
        return Card(**found)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        reason = str(error)[:200]  # it may quote the file
        raise CardError(f"{Path(path).name} is no judge's card: {reason}") from error
