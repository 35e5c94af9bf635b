"""What a judge's card lets a server do."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_deepprune import card as cards
from sglang_deepprune.config import ConfigError, DeepPruneConfig
from sglang_deepprune.judges.belief import EMBEDDED
from sglang_deepprune.judges.permission import card_path, sentence, with_card


def make(path: Path, *, judge: str = "belief", may_prune: bool = True) -> Path:
    figures = [
        {"cut": "tokens:500", "gain_low": 0.01},
        {"cut": "tokens:1000", "gain_low": -0.02},
        {"cut": "words:25", "gain_low": 0.0},
        {"cut": "tokens:2000", "gain_low": 0.3},
        {"cut": "share:0.5", "gain_low": 0.2},
    ]
    taus = {"tokens:500": 0.8, "tokens:1000": 0.7, "words:25": 0.75, "share:0.5": 0.6}
    cards.save(cards.Card(judge, {}, figures, taus, may_prune, "because"), path)
    return path


def test_only_cuts_with_a_gain_and_a_tau_are_allowed(tmp_path: Path):
    config = with_card(DeepPruneConfig(judge="belief", judge_card=str(make(tmp_path / "c.json"))))
    assert config.card_taus == (("tokens:500", 0.8), ("words:25", 0.75))
    assert config.prunes_by_judge and config.merge_tau == 0.8
    assert "prunes; its card allows tokens:500 above 0.8" in sentence(config)


def test_a_card_that_forbids_allows_no_cut(tmp_path: Path):
    path = make(tmp_path / "c.json", may_prune=False)
    config = with_card(DeepPruneConfig(judge="belief", judge_card=str(path)))
    assert config.card_taus == () and not config.is_judged
    assert "under `paper` alone" in sentence(config)


def test_the_card_beside_the_weights_is_found(tmp_path: Path):
    weights = tmp_path / "mine.json"
    weights.write_text(EMBEDDED.read_text())
    without = with_card(DeepPruneConfig(judge=f"belief:{weights}"))
    assert without.card_taus == ()
    make(tmp_path / "mine.card.json", judge="belief:mine.json")
    assert with_card(DeepPruneConfig(judge=f"belief:{weights}")).card_taus
    assert card_path(f"encoder:{tmp_path}") == tmp_path / "card.json"
    assert card_path("similarity") is None


def test_what_ships_may_not_prune():
    assert with_card(DeepPruneConfig(judge="belief")).card_taus == ()


@pytest.mark.parametrize("content", [None, "{}", "no json"])
def test_a_card_that_is_none_stops_the_start(tmp_path: Path, content: str | None):
    path = tmp_path / "c.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match="judge_card"):
        with_card(DeepPruneConfig(judge="belief", judge_card=str(path)))


def test_another_judges_card_stops_the_start(tmp_path: Path):
    path = make(tmp_path / "c.json", judge="similarity")
    with pytest.raises(ConfigError, match="is the card of 'similarity'"):
        with_card(DeepPruneConfig(judge="belief", judge_card=str(path)))
