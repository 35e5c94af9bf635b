"""One field is one flag, one setting, one error sentence."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from sglang_deepprune.config import (
    ConfigError,
    DeepPruneConfig,
    dest_of,
    flag_of,
    request_fields,
    settings_table,
)


def test_every_field_has_help_a_flag_and_a_scope():
    for spec in fields(DeepPruneConfig):
        assert spec.metadata["help"].endswith(".")
        assert spec.metadata["scope"] in ("server", "request")
        assert flag_of(spec)[2:].replace("-", "_") == dest_of(spec)
    assert len({flag_of(spec) for spec in fields(DeepPruneConfig)}) == len(fields(DeepPruneConfig))


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


def test_overrides_survive_the_wire():
    config = DeepPruneConfig().override({"preset": "paper", "k2": 0, "return": "vote", "tau": 1})
    assert DeepPruneConfig().override(config.request_values()) == config


def test_k2_zero_scales_with_the_group():
    config = DeepPruneConfig(k2=0)
    assert [config.kept_of_largest(n) for n in (1, 4, 10, 16, 64, 512)] == [1, 1, 3, 4, 16, 20]
    assert DeepPruneConfig().kept_of_largest(16) == 20
    assert DeepPruneConfig(k3=2).kept_of_singletons(16) == 2


def test_presets_decide_the_cut_only_where_nobody_else_did():
    assert DeepPruneConfig(preset="paper").cut_kind == "words"
    assert DeepPruneConfig(preset="latency").cut_kind == "tokens"
    assert DeepPruneConfig(preset="paper", cut="tokens").cut_kind == "tokens"


def test_the_docs_hold_the_settings_table():
    page = Path(__file__).resolve().parents[2] / "docs" / "settings.md"
    assert settings_table() in page.read_text()
