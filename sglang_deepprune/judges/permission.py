"""At server start: what a judge's card says about it, and the sentence that tells the user.

A judge prunes under `paper`, which asks for it; elsewhere only at the cuts where its card, made by
`sglang-deepprune eval-judge --card`, shows that this costs no winner. Read once, in the main
process: the taus travel with the settings, so that every rank has the same ones.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from sglang_deepprune.card import CARD_NAME, Card, CardError, fingerprint, load
from sglang_deepprune.config import ConfigError, DeepPruneConfig
from sglang_deepprune.judges import OWN

_EMBEDDED = {"belief": Path(__file__).parent / "embedded" / "belief.json"}


def card_path(spec: str) -> Path | None:
    """Where the card of a judge lies if nobody says: `card.json` in a model's folder, else
    `NAME.card.json` beside `NAME.json`. None: nowhere."""
    place = _place(spec)
    if place is None:
        return None
    return place / CARD_NAME if place.is_dir() else place.with_suffix(".card.json")


def weights_of(spec: str) -> str:
    """The `fingerprint` of a judge's weights; empty where it has none on this machine."""
    place = _place(spec)
    try:
        return fingerprint(place) if place is not None and place.exists() else ""
    except OSError:
        return ""  # whoever loads them says it better


def _place(spec: str) -> Path | None:
    name, _, path = spec.partition(":")
    if name in (OWN, "probe"):
        return None
    return Path(path) if path else _EMBEDDED.get(name)


def with_card(config: DeepPruneConfig) -> DeepPruneConfig:
    """The config with what the judge's card allows. Raises ConfigError for a card that was named
    and is none, or is of another judge or other weights; one beside the weights is held to the
    same."""
    path = Path(config.judge_card) if config.judge_card else card_path(config.judge)
    if path is None or (not config.judge_card and not path.is_file()):
        return config
    if not path.is_file():
        raise ConfigError("judge_card", f"no file {str(path)!r}; make one by eval-judge --card")
    try:
        found = load(path)
    except CardError as error:
        raise ConfigError("judge_card", f"{error}; make one by eval-judge --card") from error
    name = config.judge.partition(":")[0]
    if found.judge.partition(":")[0] != name:
        raise ConfigError("judge_card", f"{path.name} is the card of {found.judge!r}, not {name!r}")
    if found.weights and found.weights != weights_of(config.judge):
        raise ConfigError(
            "judge_card",
            f"{path.name} was measured with other weights; make one by eval-judge --card",
        )
    return dataclasses.replace(config, card_taus=allowed(found))


def allowed(card: Card) -> tuple[tuple[str, float], ...]:
    """(cut, tau) where the rule of `evaluation.judge_rule` holds; none where it holds nowhere.

    Cuts by share are left out: the server does not know how long a trace will be.
    """
    if not card.may_prune:
        return ()
    found = []
    for row in card.figures:
        cut, gain = row.get("cut"), row.get("gain_low")
        if isinstance(gain, bool) or not isinstance(gain, (int, float)):
            continue
        if gain >= 0 and isinstance(cut, str) and cut in card.taus:
            found.append((cut, float(card.taus[cut])))
    return tuple(one for one in found if not one[0].startswith("share:"))


def sentence(config: DeepPruneConfig) -> str:
    """For the start-up line."""
    if config.judge == "none":
        return "no judge"
    cuts = ", ".join(f"{cut} above {tau:g}" for cut, tau in config.card_taus)
    if not cuts:
        return f"judge {config.judge} (prunes under `paper` alone: no card allows more)"
    here = "prunes" if config.prunes_by_judge else "does not prune at the cut in force"
    return f"judge {config.judge} ({here}; its card allows {cuts})"
