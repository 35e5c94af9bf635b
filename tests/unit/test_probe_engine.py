"""The engine side of probes without a server: refusals, and faults of our own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_deepprune.actions import Fork
from sglang_deepprune.config import DeepPruneConfig
from sglang_deepprune.metrics import HOOK_ERRORS
from sglang_deepprune.patches import fork, probe, seams
from sglang_deepprune.patches.probe import Probes
from tests.unit.test_metrics import Tally


class FakeHandover:
    def __init__(self) -> None:
        self.told: list[tuple[int, str]] = []

    def probed(self, group_id: str, index: int, epoch: int, **more: Any) -> None:
        self.told.append((index, more["failure"]))


class FakeCoordinator:
    def __init__(self) -> None:
        self.handover = FakeHandover()
        self.runs: dict[str, Any] = {}


def make() -> Probes:
    engine = SimpleNamespace(
        scheduler=SimpleNamespace(), config=DeepPruneConfig(judge="none"),
        coordinator=FakeCoordinator(), is_idle=False, meter=Tally(),
    )  # fmt: skip
    return Probes(engine)  # type: ignore[arg-type]


def broken() -> None:
    raise ZeroDivisionError


def test_a_fault_of_ours_ends_all_probes_and_is_logged_once(caplog: pytest.LogCaptureFixture):
    probes = make()
    for index in range(2):
        probes.wish(Fork("g", index, 1))
    assert probes.is_busy
    for _ in range(3):
        assert probes.guard(broken) is None
    assert not probes.is_busy
    reason = "broken raised ZeroDivisionError"
    assert probes.engine.coordinator.handover.told == [(0, reason), (1, reason)]
    assert len(caplog.records) == 1
    assert probes.engine.meter.of(HOOK_ERRORS) == {"": 3}


def test_a_sibling_is_wished_for_once():
    probes = make()
    for _ in range(2):
        probes.wish(Fork("g", 0, 1))
    assert len(probes.wishes) == 1


@pytest.mark.parametrize(
    ("mode", "named"),
    [({"speculative_algorithm": "EAGLE"}, "speculative decoding"),
     ({"enable_hierarchical_cache": True}, "hierarchical cache"),
     ({"enable_dp_attention": True}, "DP attention"), ({"attn_dp_size": 2}, "DP attention"),
     ({"attn_dp_size": 1}, ""), ({}, "")],
)  # fmt: skip
def test_modes_in_which_a_fork_would_not_find_the_kv_are_refused(
    mode: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
):
    from packaging.version import Version

    if seams.sglang_version() < Version(fork.SINCE):
        pytest.skip("refused for its version")
    why = fork.refusal(SimpleNamespace(**mode))
    assert named in why and bool(why) is bool(named)
    monkeypatch.setattr(seams, "sglang_version", lambda: Version("0.5.21"))
    assert "needs SGLang 0.5.23" in fork.refusal(SimpleNamespace())


@pytest.mark.parametrize(
    ("scheduler", "named"),
    [({"is_hybrid_swa": True}, "hybrid caches"), ({"is_hybrid_ssm": True}, "hybrid caches"),
     ({"model_config": SimpleNamespace(is_encoder_decoder=True)}, "encoder-decoder"), ({}, "")],
)  # fmt: skip
def test_caches_and_models_that_a_fork_cannot_share_are_never_probed(
    scheduler: dict[str, Any], named: str
):
    plain = {"is_hybrid_swa": False, "is_hybrid_ssm": False,
             "tree_cache": SimpleNamespace(supports_mamba=lambda: False),
             "model_config": SimpleNamespace(is_encoder_decoder=False)}  # fmt: skip
    why = probe._runtime_refusal(SimpleNamespace(**{**plain, **scheduler}))
    assert named in why and bool(why) is bool(named)


@pytest.mark.parametrize(
    ("sibling", "shared"),
    [({}, 16), ({"multimodal_inputs": object()}, 0), ({"input_embeds": [[0.1]]}, 0),
     ({"is_retracted": True}, 0), ({"to_finish": object()}, 0), ({"output_ids": []}, 0)],
)  # fmt: skip
def test_a_sibling_of_images_or_embeddings_cannot_be_forked(sibling: dict[str, Any], shared: int):
    probes = make()
    probes.scheduler.token_to_kv_pool_allocator = SimpleNamespace(page_size=8)
    plain = {"finished": lambda: False, "to_finish": None, "is_retracted": False,
             "kv": SimpleNamespace(holds_kv=True, kv_committed_len=20),
             "origin_input_ids": [1] * 12, "output_ids": [2] * 9, "multimodal_inputs": None,
             "input_embeds": None}  # fmt: skip
    assert probes._num_shared(SimpleNamespace(**{**plain, **sibling})) == shared


def ids_of(text: str) -> list[int]:
    return [ord(character) for character in text]


@pytest.mark.parametrize(
    ("parser", "prompt", "output", "mark"),
    [
        (None, "Q", "<think>so", "</think>"),
        (None, "Q<think>\n", "so", "</think>"),
        (None, "Q", "[THINK]so", "[/THINK]"),
        (None, "Q", "<think>so</think> thus", ""),
        (None, "Q", "so", ""),
        (("<a>", "</a>", False), "Q", "<a>so", "</a>"),
        (("<a>", "</a>", False), "Q", "<think>so", ""),
        (("<a>", "</a>", True), "Q", "so", "</a>"),
        (("<a>", "</a>", True), "Q", "so</a> thus", ""),
        (("<a>", "</a>", True), "Q<a></a>", "so", ""),  # the template has switched thinking off
    ],
)
def test_an_open_thinking_block_is_closed_by_the_parsers_own_mark(
    parser: Any, prompt: str, output: str, mark: str
):
    probes = make()
    probes.engine.coordinator.decode = lambda ids: "".join(map(chr, ids))
    probes.scheduler.tokenizer = SimpleNamespace(encode=lambda text, **_: ids_of(text))
    probes._parser = parser
    sibling = SimpleNamespace(origin_input_ids=ids_of(prompt), output_ids=ids_of(output))
    assert probes._open_mark(sibling) == mark


def test_the_marks_are_those_of_sglangs_parser():
    assert probe._parser_marks(SimpleNamespace(reasoning_parser=None)) is None
    deepseek = probe._parser_marks(SimpleNamespace(reasoning_parser="deepseek-r1"))
    assert deepseek == ("<think>", "</think>", True)
    qwen = probe._parser_marks(SimpleNamespace(reasoning_parser="qwen3"))
    assert qwen is not None and qwen[:2] == ("<think>", "</think>")
