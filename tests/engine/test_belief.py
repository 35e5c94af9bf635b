"""The belief judge that ships, in a real server: it scores, and prunes under `paper`."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from sglang_deepprune.reasoner import model_path, questions
from tests.engine.conftest import COMMON
from tests.engine.server import Server
from tests.engine.test_groups import group_of, states
from tests.engine.test_reasoner_server import CUT, N, sample


@pytest.fixture(scope="module")
def believer() -> Iterator[Server]:
    flags = (*COMMON, "--deepprune-judge", "belief")
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
