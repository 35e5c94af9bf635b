"""Request settings from hostile clients: in range, or one error that names the field."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_deepprune.config import ConfigError, DeepPruneConfig, request_fields
from sglang_deepprune.patches import tokenizer_manager, wire
from sglang_deepprune.patches.server_args import ATTRIBUTE, Carrier
from tests.hostile import BUSY, FEW, QUICK, STEP_LIMIT_MS, cpu_ms, hostile_text, json_values, longer

CONFIG = DeepPruneConfig(enable=True)
NAMES = [*request_fields(), "enabled", "group", "size"]
MANAGER = SimpleNamespace(
    server_args=SimpleNamespace(**{ATTRIBUTE: Carrier(CONFIG, "token"), "dp_size": 1})
)


def read(asked: Any) -> wire.Ask | ConfigError:
    """By the parsing that the tokenizer's hook uses; any exception but a ConfigError fails."""
    try:
        return wire.read_ask(CONFIG, {"deepprune": asked})
    except ConfigError as error:
        return error


def check(asked: Any) -> None:
    found = read(asked)
    if isinstance(found, ConfigError):
        message = str(found)
        assert message.startswith(f"deepprune.{found.field}: ") and len(message) < 1000
        message.encode()  # it goes into a JSON reply
        assert message.isprintable()
        return
    merged = CONFIG.override(found.settings)
    for name, spec in request_fields().items():
        value, low = getattr(merged, spec.name), spec.metadata["low"]
        if value is None:
            assert spec.default is None
            continue
        assert type(value) is spec.metadata["kind"], name
        assert low is None or low <= value <= spec.metadata["high"], name
        assert not spec.metadata["choices"] or value in spec.metadata["choices"], name
    # What was accepted survives the way to the scheduler, and means the same there.
    tagged = wire.tag("g", 0, 2, found.settings, rid="r", token="token")
    assert all(isinstance(one, (str, int, float, type(None))) for one in tagged.values())
    assert CONFIG.override(wire.settings_of(tagged)) == merged
    json.dumps(tagged).encode()


def settings_of() -> st.SearchStrategy[Any]:
    """Any values under our names, and now and then under others."""
    names = st.one_of(st.sampled_from(NAMES), st.sampled_from(NAMES), hostile_text(40))
    return st.one_of(st.dictionaries(names, json_values(), max_size=4), json_values())


@QUICK
@given(settings_of())
def test_any_settings_are_in_range_or_one_error_that_names_the_field(asked: Any):
    check(asked)


@longer
@given(settings_of())
def test_any_settings_at_length(asked: Any):
    check(asked)


@pytest.mark.parametrize("name", NAMES)
def test_each_field_takes_any_value_or_names_itself(name: str):
    @FEW
    @given(json_values())
    def one(value: Any) -> None:
        found = read({name: value, **({"group": "g"} if name == "size" else {})})
        assert not isinstance(found, ConfigError) or found.field == name
        check({name: value})

    one()


@QUICK
@given(st.one_of(json_values(), st.sampled_from(["deepprune", ["deepprune"], "__deepprune"])))
def test_custom_params_that_are_no_object_are_nobodys(custom: Any):
    if isinstance(custom, dict):
        return
    assert wire.read_ask(CONFIG, custom).is_wanted
    assert not wire.is_ours(custom, "token") and not wire.is_named(custom)
    assert wire.with_tag(custom, None) is None
    single = SimpleNamespace(sampling_params=SimpleNamespace(custom_params=custom))
    assert tokenizer_manager._client_side_tag(MANAGER, single) is None


def test_no_text_of_a_request_is_in_an_error():
    for value in ("canary-1", "canary 2", ["canary"], {"canary": "canary"}):
        for name in (*NAMES, "canary prose\n in a name"):
            found = read({name: value})
            assert not isinstance(found, ConfigError) or "canary" not in str(found), name


@pytest.mark.parametrize(
    "asked",
    [
        {"answer_field": "x" * 1_000_000},
        {f"n{i}": 1 for i in range(100_000)},
        {"seed": 10**100_000},
        {"k": [[[["x" * 1000] * 1000] * 10]]},
        {"\u202e" * 1_000_000: 1},
    ],
    ids=["text", "names", "number", "lists", "name"],
)
def test_large_settings_are_refused_in_no_time(asked: Any):
    assert isinstance(read(asked), ConfigError)
    assert cpu_ms(lambda: read(asked)) < 5


def test_nesting_without_end_is_an_error():
    asked: Any = []
    for _ in range(100_000):
        asked = [asked]
    found = read({"tau": asked})
    assert isinstance(found, ConfigError) and found.field == "tau"
    while asked:
        (asked,) = asked  # freed one by one


def test_settings_of_a_thousand_prompts_are_read_in_one_short_go():
    asked = {"preset": "paper", "tau": 0.5, "k2": 3, "return": "vote"}
    own = [{"custom_params": {"deepprune": {**asked, "seed": i}}} for i in range(1000)]
    assert cpu_ms(lambda: tokenizer_manager._asks_of(CONFIG, own)) < BUSY * STEP_LIMIT_MS
    shared = [own[0]] * 10_000
    asks = tokenizer_manager._asks_of(CONFIG, shared)
    assert len(asks) == 10_000 and asks[0] is asks[-1]
    assert cpu_ms(lambda: tokenizer_manager._asks_of(CONFIG, shared)) < STEP_LIMIT_MS


def test_a_client_side_group_of_a_long_prompt_is_named_in_no_time():
    def single(ids: list[int]) -> Any:
        params = SimpleNamespace(custom_params={"deepprune": {"group": "g\ud7ff"}})
        return SimpleNamespace(sampling_params=params, input_ids=ids, mm_inputs=None,
                               input_embeds=None)  # fmt: skip

    ids = list(range(200_000)) * 5
    name = tokenizer_manager._client_side_tag(MANAGER, single(ids))["gid"]  # type: ignore[index]
    assert re.fullmatch("c[0-9a-f]{31}", name)
    assert name == tokenizer_manager._client_side_tag(MANAGER, single(list(ids)))["gid"]  # type: ignore[index]
    other = tokenizer_manager._client_side_tag(MANAGER, single([*ids[:-1], 0]))
    assert other is not None and other["gid"] != name
    assert cpu_ms(lambda: tokenizer_manager._client_side_tag(MANAGER, single(ids))) < STEP_LIMIT_MS


def test_a_size_may_be_a_whole_float_as_other_settings():
    ask = read({"group": "g", "size": 4.0})
    assert isinstance(ask, wire.Ask) and ask.size == 4
    assert isinstance(read({"group": "g", "size": 4.5}), ConfigError)
