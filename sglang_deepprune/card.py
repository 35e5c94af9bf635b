"""A judge's card: what it was measured on, how good it was, and whether it may prune.

Written by `sglang-deepprune eval-judge --card`. JSON; `docs/judges.md` explains the figures.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FORMAT = "sglang-deepprune judge card 1"
CARD_NAME = "card.json"  # in a model's folder
_ENDS = 1 << 20


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
    weights : str
        `fingerprint` of the weights that were measured; empty: of none in particular (a judge
        without any, one of a hub, one that was fitted anew in each fold).
    """

    judge: str
    data: dict[str, Any]
    figures: list[dict[str, Any]]
    taus: dict[str, float]
    may_prune: bool
    reason: str
    weights: str = ""

    def __post_init__(self) -> None:
        kinds = {"judge": str, "data": dict, "figures": list, "taus": dict, "may_prune": bool,
                 "reason": str, "weights": str}  # fmt: skip
        for name, kind in kinds.items():
            if not isinstance(getattr(self, name), kind):
                raise CardError(f"{name} of a judge's card must be a {kind.__name__}")
        if not all(isinstance(row, dict) for row in self.figures):
            raise CardError("figures of a judge's card must be objects")
        for cut, tau in self.taus.items():
            if isinstance(tau, bool) or not isinstance(tau, (int, float)) or not 0 <= tau <= 1:
                raise CardError(f"tau of {cut[:40]!r} in a judge's card must be in [0, 1]")


def fingerprint(path: str | Path) -> str:
    """SHA-256, in hex, that tells these weights from others: a file's size, its first and last MiB
    (so all of a small one), or those of every file of a model's folder but its card.

    Raises OSError.
    """
    place = Path(path)
    files = [place]
    if place.is_dir():
        files = sorted(one for one in place.rglob("*") if one.is_file() and one.name != CARD_NAME)
    found = hashlib.sha256()
    for one in files:
        size = one.stat().st_size
        name = one.relative_to(place).as_posix() if place.is_dir() else ""
        found.update(f"{name} {size}\n".encode())
        with one.open("rb") as file:
            found.update(file.read(_ENDS))
            if size > 2 * _ENDS:
                file.seek(-_ENDS, os.SEEK_END)
            found.update(file.read(_ENDS))
    return found.hexdigest()


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
