"""Our hooks beside those of other plugins, on a function made up here; no server."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from packaging.version import Version
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sglang_deepprune.patches import seams

SEAM = seams.Seam("made_up", "Thing.work", HookType.AROUND, "we need it", ("self", "x"), "x")
TARGET = SEAM.target


@pytest.fixture
def thing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An object of a class with the function that SEAM names; the registry is empty."""

    class Thing:
        def work(self, x: list[str]) -> list[str]:
            return [*x, "work"]

    module = ModuleType("made_up")
    module.Thing = Thing  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "made_up", module)
    monkeypatch.setattr(HookRegistry, "_hooks", defaultdict(list))
    monkeypatch.setattr(HookRegistry, "_patched", set())
    return Thing()


def ours(original: Callable[..., Any], self: Any, x: list[str]) -> Any:
    return original(self, [*x, "ours"])


def theirs(original: Callable[..., Any], self: Any, x: list[str]) -> Any:
    return original(self, [*x, "theirs"])


def after(result: list[str], self: Any, x: list[str]) -> list[str]:
    return [*result, "after"]


def other_plugin(*hooks: tuple[Callable[..., Any], HookType]) -> None:
    for hook, kind in hooks:
        HookRegistry.register(TARGET, hook, kind)
    HookRegistry.apply_hooks()


def install() -> None:
    seams.install([SEAM], {SEAM.name: ours})


def check() -> None:
    seams.check([SEAM], {SEAM.name: ours})


BOTH = ((theirs, HookType.AROUND), (after, HookType.AFTER))


def test_ours_is_around_what_came_before(thing: Any):
    other_plugin(*BOTH)
    install()
    check()
    assert thing.work([]) == ["ours", "theirs", "work", "after"]


def test_who_comes_later_is_around_ours(thing: Any):
    install()
    other_plugin(*BOTH)
    check()
    assert thing.work([]) == ["theirs", "ours", "work", "after"]


def test_a_third_plugin_finds_what_it_would_find_without_us(thing: Any):
    HookRegistry.register(TARGET, theirs, HookType.AROUND)  # to be applied once all are loaded
    install()
    other_plugin((after, HookType.AFTER))
    check()
    assert thing.work([]) == ["theirs", "ours", "work", "after"]


def test_what_is_there_already_is_not_wrapped_twice(thing: Any):
    install()
    other_plugin(*BOTH)
    install()
    assert thing.work([]) == ["theirs", "ours", "work", "after"]


def test_a_hook_that_somebody_has_taken_off_is_seen(thing: Any):
    def bare(self: Any, x: list[str]) -> list[str]:
        return x

    install()
    type(thing).work = bare
    with pytest.raises(seams.SeamError, match="made_up.Thing.work did not take our hook in SGLang"):
        check()


def test_a_parser_row_is_applied_by_sglang_with_those_of_the_others(thing: Any):
    seams.register([SEAM], {SEAM.name: ours})
    assert thing.work([]) == ["work"]
    other_plugin(*BOTH)
    assert thing.work([]) == ["theirs", "ours", "work", "after"]


def test_what_sglang_will_not_hook_is_refused_with_its_reason(thing: Any):
    row = seams.Seam("made_up", "Thing", HookType.AROUND, "we need it", (), "")
    with pytest.raises(seams.SeamError, match=r"did not take our hook \(.*is a class.*supported:"):
        seams.install([row], {"Thing": ours})


@pytest.mark.parametrize(
    ("version", "is_known"),
    [("0.5.14", False), ("0.5.15", True), ("0.5.15.post1", True), ("0.5.20", True),
     ("0.5.23.post2", True), ("0.5.24", False), ("0.6.0", False)],
)  # fmt: skip
def test_what_lies_in_the_window_is_known(version: str, is_known: bool):
    assert seams.is_known(Version(version)) is is_known


def test_every_version_of_the_window_has_one_row_for_each_reason():
    """A seam that moved has one row up to a version, and another from that very version on."""
    rows = seams.PARSER + seams.TOKENIZER + seams.SCHEDULER
    moved = {row.until for row in rows if row.until}
    assert moved <= {row.since for row in rows}
