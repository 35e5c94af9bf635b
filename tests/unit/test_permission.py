"""What a judge's card lets a server do."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_deepprune import card as cards
from sglang_deepprune.config import ConfigError, DeepPruneConfig
from sglang_deepprune.judges.belief import EMBEDDED
from sglang_deepprune.judges.permission import card_path, sentence, weights_of, with_card


def make(path: Path, *, judge: str = "belief", may_prune: bool = True, weights: str = "") -> Path:
    figures = [
        {"cut": "tokens:500", "gain_low": 0.01},
        {"cut": "tokens:1000", "gain_low": -0.02},
        {"cut": "words:25", "gain_low": 0.0},
        {"cut": "tokens:2000", "gain_low": 0.3},
        {"cut": "share:0.5", "gain_low": 0.2},
    ]
    taus = {"tokens:500": 0.8, "tokens:1000": 0.7, "words:25": 0.75, "share:0.5": 0.6}
    cards.save(cards.Card(judge, {}, figures, taus, may_prune, "because", weights), path)
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


def test_a_card_of_other_weights_stops_the_start(tmp_path: Path):
    weights = tmp_path / "mine.json"
    weights.write_text(EMBEDDED.read_text())
    judge = f"belief:{weights}"
    make(tmp_path / "mine.card.json", weights=weights_of(judge))
    assert with_card(DeepPruneConfig(judge=judge)).card_taus
    weights.write_text(EMBEDDED.read_text() + "\n")  # fitted again, measured never
    with pytest.raises(ConfigError, match="was measured with other weights"):
        with_card(DeepPruneConfig(judge=judge))
    own = make(tmp_path / "own.json", weights=weights_of("belief"))
    assert with_card(DeepPruneConfig(judge="belief", judge_card=str(own))).card_taus
    others = make(tmp_path / "others.json", weights=weights_of(judge))
    with pytest.raises(ConfigError, match="was measured with other weights"):
        with_card(DeepPruneConfig(judge="belief", judge_card=str(others)))


def test_a_folders_fingerprint_is_that_of_all_its_files_but_the_card(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    large = tmp_path / "model.safetensors"
    large.write_bytes(bytes(3 << 20))
    before = cards.fingerprint(tmp_path)
    make(tmp_path / cards.CARD_NAME)
    assert cards.fingerprint(tmp_path) == before == weights_of(f"llm:{tmp_path}")
    for start in (0, (3 << 20) - 1):  # either end
        content = bytearray(3 << 20)
        content[start] = 1
        large.write_bytes(content)
        assert cards.fingerprint(tmp_path) != before
    large.rename(tmp_path / "other.safetensors")
    assert weights_of("similarity") == weights_of("llm:nobody/nothing") == ""
