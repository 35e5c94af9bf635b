"""Files beside a judge that are hostile: its card, its weights, its settings, its recording."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_deepprune.card import Card, CardError
from sglang_deepprune.card import load as load_card
from sglang_deepprune.config import ConfigError, DeepPruneConfig
from sglang_deepprune.judges.belief import load_weights
from sglang_deepprune.judges.lm_prompt import PromptError, Settings, load_settings
from sglang_deepprune.judges.oracle import OracleJudge
from sglang_deepprune.judges.permission import allowed, with_card
from tests.hostile import QUICK, json_values


def card_body() -> dict[str, Any]:
    return {
        "format": "sglang-deepprune judge card 1", "judge": "similarity", "data": {},
        "figures": [{"cut": "tokens:500", "gain_low": 0.1}], "taus": {"tokens:500": 0.5},
        "may_prune": True, "reason": "good",
    }  # fmt: skip


def file_of(folder: Path, value: Any) -> Path:
    path = folder / "file.json"
    path.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
    return path


FILES = {
    "empty": b"", "nested": b"[" * 200_000, "a pickle": pickle.dumps({"a": 1}),
    "UTF-16": "{}".encode("utf-16"), "null": b"null", "a number": b"1" * 5000, "NUL": b"\x00" * 100,
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_none_is_one_sentence(tmp_path: Path, kind: str):
    path = file_of(tmp_path, FILES[kind])
    with pytest.raises(CardError):
        load_card(path)
    with pytest.raises(ValueError, match="file.json"):
        load_weights(path)
    with pytest.raises(ConfigError) as caught:
        with_card(DeepPruneConfig(judge_card=str(path)))
    assert caught.value.field == "judge_card"
    (tmp_path / "deepprune_judge.json").write_bytes(path.read_bytes())
    with pytest.raises(PromptError):
        load_settings(tmp_path)
    if kind != "empty":  # a recording of no rows
        with pytest.raises(ValueError):
            OracleJudge(str(path))


def test_any_card_is_taken_or_refused(tmp_path: Path):
    @QUICK
    @given(st.sampled_from([*card_body(), "more"]), json_values())
    def one(name: str, value: Any) -> None:
        try:
            body = json.dumps({**card_body(), name: value})
        except ValueError:  # a number of too many digits
            return
        path = tmp_path / "any.card.json"
        path.write_bytes(body.encode("utf-8", "surrogatepass"))
        try:
            found = load_card(path)
        except CardError as error:
            assert len(str(error)) < 500
            return
        assert isinstance(found, Card)
        for cut, tau in allowed(found):
            assert isinstance(cut, str) and 0 <= tau <= 1

    one()


def test_figures_of_any_shape_allow_nothing_by_accident(tmp_path: Path):
    @QUICK
    @given(st.lists(json_values(), max_size=3), st.sampled_from(["cut", "gain_low"]), json_values())
    def one(figures: list[Any], name: str, value: Any) -> None:
        body = {key: known for key, known in card_body().items() if key != "format"}
        good = {"cut": "tokens:500", "gain_low": 0.1, name: value}
        try:
            card = Card(**{**body, "figures": [*figures, good]})
        except CardError:
            return
        for cut, tau in allowed(card):
            assert (cut, tau) == ("tokens:500", 0.5)

    one()


def test_any_weights_are_taken_or_refused(tmp_path: Path):
    shipped = json.loads((Path(load_weights.__code__.co_filename).parent / "embedded" /
                          "belief.json").read_text())  # fmt: skip
    kind = next(name for name in ("results", "options") if shipped.get(name))

    @QUICK
    @given(st.sampled_from(["candidate", "other", "pair", kind]), json_values())
    def one(name: str, value: Any) -> None:
        body = {**shipped, kind: value if name == kind else {**shipped[kind], name: value}}
        path = tmp_path / "any.json"
        try:
            path.write_text(json.dumps(body))
        except (ValueError, UnicodeEncodeError):
            return
        try:
            found = load_weights(path)
        except ValueError as error:
            assert len(str(error)) < 500
            return
        for weights in found.values():
            assert all(map(math.isfinite, [*weights.candidate, *weights.other, *weights.pair]))

    one()


@pytest.mark.parametrize("prompt", ["", "{first}", "{second}{first}", "{problem}" * 9])
def test_a_prompt_without_its_fields_is_refused(prompt: str):
    with pytest.raises(PromptError):
        Settings(prompt)
