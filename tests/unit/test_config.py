"""One field is one flag, one setting, one error sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_deepprune.config import (
    ConfigError,
    DeepPruneConfig,
    dest_of,
    flag_of,
    request_fields,
    setting_fields,
    settings_table,
)


def test_every_field_has_help_a_flag_and_a_scope():
    for spec in setting_fields():
        assert spec.metadata["help"].endswith(".")
        assert spec.metadata["scope"] in ("server", "request")
        assert flag_of(spec)[2:].replace("-", "_") == dest_of(spec)
    assert len({flag_of(spec) for spec in setting_fields()}) == len(setting_fields())


def test_a_request_never_names_a_path_a_url_or_a_judge():
    assert "judge" not in request_fields() and "reasoning_words" not in request_fields()


@pytest.mark.parametrize(
    ("settings", "field"),
    [({"k1": 0}, "k1"), ({"tau": 1.5}, "tau"), ({"tau": float("nan")}, "tau"),
     ({"tau": True}, "tau"), ({"k": 2.5}, "k"), ({"preset": "fast"}, "preset"),
     ({"window": "8"}, "window"), ({"judge": "none"}, "judge"), ({"return": "some"}, "return"),
     ({"what": 1}, "what"), ({"enable": True}, "enable"), ({"seed": 2**40}, "seed")],
)  # fmt: skip
def test_a_bad_setting_names_its_field_and_what_is_allowed(settings, field: str):
    with pytest.raises(ConfigError) as caught:
        DeepPruneConfig().override(settings)
    assert caught.value.field == field and str(caught.value).startswith(f"deepprune.{field}: ")


def test_null_is_no_value_but_for_settings_that_the_preset_decides():
    assert DeepPruneConfig(base=None, judge_device=None) == DeepPruneConfig()  # type: ignore[arg-type]
    assert DeepPruneConfig(tau=0.5).override({"tau": None}).tau is None
    with pytest.raises(ConfigError) as caught:
        DeepPruneConfig().override({"base": None})
    assert caught.value.field == "base"


def test_overrides_survive_the_wire():
    config = DeepPruneConfig().override({"preset": "paper", "k2": 0, "return": "vote", "tau": 1})
    assert DeepPruneConfig().override(config.request_values()) == config


def test_k2_zero_scales_with_the_group():
    config = DeepPruneConfig(k2=0)
    assert [config.kept_of_largest(n) for n in (1, 4, 10, 16, 64, 512)] == [1, 1, 3, 4, 16, 20]
    assert DeepPruneConfig(preset="paper").kept_of_largest(16) == 20
    assert DeepPruneConfig().kept_of_largest(16) == 4
    assert DeepPruneConfig(k3=2).kept_of_singletons(16) == 2


def test_presets_decide_the_cut_only_where_nobody_else_did():
    assert DeepPruneConfig(preset="paper").cut_kind == "words"
    assert DeepPruneConfig(preset="latency").cut_kind == "tokens"
    assert DeepPruneConfig(preset="paper", cut="tokens").cut_kind == "tokens"


def test_outside_paper_a_judge_prunes_only_where_its_card_allows_it():
    taus = (("tokens:500", 0.8), ("words:25", 0.7))
    for preset, expected in (("balanced", True), ("latency", True), ("collect", False)):
        config = DeepPruneConfig(preset=preset, card_taus=taus)
        assert config.is_judged is config.prunes_by_judge is expected
        assert not DeepPruneConfig(preset=preset).prunes_by_judge
        assert not DeepPruneConfig(preset=preset, card_taus=taus, cut_tokens=400).prunes_by_judge
    balanced = DeepPruneConfig(card_taus=taus)
    assert balanced.merge_tau == 0.8
    assert balanced.override({"cut": "words"}).merge_tau == 0.7
    assert balanced.override({"tau": 0.3}).merge_tau == 0.3
    paper = balanced.override({"preset": "paper"})
    assert paper.prunes_by_judge and paper.merge_tau == 0.5


def test_no_request_can_bring_a_card():
    for name in ("card_taus", "judge_card"):
        with pytest.raises(ConfigError):
            DeepPruneConfig().override({name: [["tokens:500", 0.1]]})


def test_the_docs_hold_the_settings_table():
    page = Path(__file__).resolve().parents[2] / "docs" / "settings.md"
    assert settings_table() in page.read_text()
