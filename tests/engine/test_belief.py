"""The belief judge that ships, in a real server: it scores, and prunes where it may."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from sglang_deepprune import card
from sglang_deepprune.reasoner import model_path, questions
from tests.engine.conftest import COMMON
from tests.engine.server import Server
from tests.engine.test_groups import group_of, states
from tests.engine.test_reasoner_server import CUT, N, sample

pytestmark = pytest.mark.modes
CARD_TOKENS = 40


@pytest.fixture(scope="module")
def believer(tmp_path_factory) -> Iterator[Server]:
    """Its card is made up: no judge has earned one that allows pruning."""
    name = f"tokens:{CARD_TOKENS}"
    path = tmp_path_factory.mktemp("card") / "card.json"
    figures = [{"cut": name, "gain_low": 0.01}]
    card.save(card.Card("belief", {}, figures, {name: 0.5}, True, "a test"), path)
    flags = (*COMMON, "--deepprune-judge", "belief", "--deepprune-judge-card", str(path))
    with Server(model_path(), *flags, max_total_tokens=40000) as server:
        yield server


def test_it_prunes_under_paper_and_scores_are_probabilities(believer: Server):
    for question in questions(seed=11, count=4):
        outputs = sample(believer, question.prompt, {"preset": "paper", "k2": 0, **CUT})
        group = group_of(outputs)
        assert group["judge_calls"] > 0
        assert "pruned" in states(outputs)
        choices = [output["meta_info"]["deepprune"]["choice"] for output in outputs]
        found = [one["similarity"] for one in choices if one.get("similarity") is not None]
        assert found
        assert all(0 <= value <= 1 and not math.isnan(value) for value in found)
        assert len(states(outputs)) == N
        believer.wait_idle()
    assert "gives no verdict" not in believer.log


def test_outside_paper_it_prunes_at_the_cut_of_its_card_and_at_no_other(believer: Server):
    found = {CARD_TOKENS: 0, CARD_TOKENS + 1: 0}
    for question in questions(seed=12, count=4):
        for cut in found:
            outputs = sample(believer, question.prompt, {"preset": "latency", "cut_tokens": cut})
            found[cut] += states(outputs).count("pruned")
            assert (group_of(outputs)["judge_calls"] > 0) == (cut == CARD_TOKENS)
            believer.wait_idle()
    assert found[CARD_TOKENS] > 0 == found[CARD_TOKENS + 1]


def test_the_start_up_line_says_what_the_card_allows(believer: Server):
    assert f"its card allows tokens:{CARD_TOKENS} above 0.5" in believer.log
