"""Probes without an engine: what an answer is worth, who is asked again, and what is left out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from sglang_deepprune.actions import End, Fork, Stop
from sglang_deepprune.clustering import place
from sglang_deepprune.config import ConfigError, DeepPruneConfig
from sglang_deepprune.coordinator import Coordinator
from sglang_deepprune.group import State
from sglang_deepprune.judges import check_judge, check_offline, load_judge
from sglang_deepprune.judges.permission import card_path
from sglang_deepprune.judges.probe import ProbeJudge
from sglang_deepprune.probing import CLOSING, ProbeDesk, box_end, closing_of, read
from sglang_deepprune.types import ABSENT, JudgeResult, JudgeTask, Pair, Probe, Reading, Trace

# The ids of these tests are characters.
WINDOW = 4


def decode(ids: Any) -> str:
    return "".join(map(chr, ids))


def ids_of(text: str) -> list[int]:
    return [ord(character) for character in text]


class InlineWorker:
    """A JudgeWorker whose child is this process."""

    def __init__(self) -> None:
        self.tasks: list[JudgeTask] = []
        self.dropped: list[str] = []
        self.is_failing = False

    def submit(self, task: JudgeTask) -> None:
        self.tasks.append(task)

    def poll(self) -> list[JudgeResult]:
        tasks, self.tasks = self.tasks, []
        if self.is_failing:
            return [JudgeResult(t.group_id, t.epoch, error="down", window=t.window) for t in tasks]
        score = ProbeJudge().score
        return [JudgeResult(t.group_id, t.epoch, *place(t, score), window=t.window) for t in tasks]

    def drop(self, group_id: str) -> None:
        self.dropped.append(group_id)


def make(is_leader: bool = True, **settings: Any) -> Coordinator:
    config = DeepPruneConfig(
        judge="probe", preset="paper", cut="tokens", cut_tokens=4, window=WINDOW, k2=1, **settings
    )
    desk = ProbeDesk(InlineWorker()) if is_leader else None  # type: ignore[arg-type]
    return Coordinator(config, decode, judge=desk)


def run(c: Coordinator, steps: int, size: int, start: int = 0) -> None:
    for step in range(start + 1, start + steps + 1):
        c.observe({"g": {i: ids_of(f"{i} some words"[:step]) for i in range(size)}})


def opened(c: Coordinator, size: int) -> None:
    for index in range(size):
        c.admit("g", index, size, {}, 100)


def step(c: Coordinator) -> tuple[list[Fork], list[Stop]]:
    """One pass of the loop: what the leader says is applied at once."""
    forks: list[Fork] = []
    stops: list[Stop] = []
    for command in c.poll():
        for action in c.apply(command):
            if isinstance(action, Fork):
                forks.append(action)
            elif isinstance(action, Stop):
                stops.append(action)
    return forks, stops


def tell(c: Coordinator, fork: Fork, answer: str, probability: float = 1.0) -> None:
    ids = ids_of(f"{answer}}}")
    values = [probability] + [1.0] * (len(ids) - 1)
    c.handover.probed(fork.group_id, fork.index, fork.epoch, ids, values, num_tokens=10)


@pytest.mark.parametrize(
    ("text", "end"),
    [("15}", 2), ("\\frac{1}{2}} so", 11), ("\\}x}", 3), ("15", None), ("{1}", None), ("}", 0)],
)
def test_a_box_ends_at_its_own_brace(text: str, end: int | None):
    assert box_end(text) == end


def test_an_answer_is_worth_the_product_of_the_tokens_that_fill_its_box():
    ids = ids_of("15} and more")
    values = [0.9, 0.8, 0.5, *[0.1] * 9]
    found = read(ids, values, decode)
    assert found is not None and found.answer == "15"
    assert found.probability == pytest.approx(0.9 * 0.8 * 0.5)


@pytest.mark.parametrize("text", ["15", "", "}", "??}"])
def test_no_closed_box_or_nothing_in_it_is_no_reading(text: str):
    assert read(ids_of(text), [1.0] * len(text), decode) is None


def test_agreement_is_weighted_by_both_probabilities_and_an_answer_is_certain():
    def trace(answer: str, probability: float, final: str | None = None) -> Trace:
        return Trace(0, "text", 4, "tokens", final, reading=Reading(answer, probability))

    bare = Trace(1, "text", 4, "tokens")
    pairs = [
        Pair(trace("15", 0.99), trace("15.0", 0.995)),
        Pair(trace("15", 0.99), trace("9", 1.0)),
        Pair(trace("15", 0.99), bare),
        Pair(trace("9", 0.99, final="15"), trace("15", 0.99)),
    ]
    scores = ProbeJudge().score(pairs)
    assert scores.dtype == np.float32
    assert scores[:2].tolist() == pytest.approx([0.99 * 0.995, 0.0])
    assert math.isnan(scores[2]) and scores[3] == pytest.approx(0.99)
    assert ProbeJudge().score([]).shape == (0,)


def test_sure_readings_are_clustered_and_prune():
    c = make()
    opened(c, 3)
    run(c, 4, 3)
    forks, _ = step(c)
    assert [fork.index for fork in forks] == [0, 1, 2]
    for fork, answer in zip(forks, ("7", "7", "8"), strict=True):
        tell(c, fork, answer)
    _, stops = step(c)
    group = c.runs["g"].group
    assert group.clusters == [[0, 1], [2]]
    assert {stop.index for stop in stops} == {1, 2}
    assert {stop.state for stop in stops} == {State.PRUNED}
    assert group.judge_tokens == 30  # what the probes cost; the pairs themselves cost nothing


def test_a_doubtful_reading_is_asked_once_more_at_the_next_window():
    c = make()
    opened(c, 2)
    run(c, 4, 2)
    (first, second), _ = step(c)
    tell(c, first, "7")
    tell(c, second, "7", 0.98)
    assert step(c) == ([], [])
    run(c, 3, 2, start=4)
    assert step(c) == ([], [])
    run(c, 1, 2, start=7)
    (again,), _ = step(c)
    assert again.index == 1
    tell(c, again, "7", 0.995)
    _, stops = step(c)
    assert c.runs["g"].group.clusters == [[0, 1]] and [stop.index for stop in stops] == [1]


def test_doubt_at_two_windows_running_is_no_evidence_against_a_branch():
    c = make()
    opened(c, 3)
    run(c, 4, 3)
    forks, _ = step(c)
    for fork, p in zip(forks, (0.5, 1.0, 1.0), strict=True):
        tell(c, fork, "7", p)
    run(c, 4, 3, start=4)
    (again,), _ = step(c)
    assert again.index == 0
    tell(c, again, "7", 0.5)
    _, stops = step(c)
    group = c.runs["g"].group
    assert group.clusters == [[1, 2]]  # the one in doubt opens no cluster, though it is the first
    assert group.siblings[0].cluster == ABSENT and not group.siblings[0].has_verdict
    assert [stop.index for stop in stops] == [2]
    run(c, 8, 3, start=8)
    assert step(c) == ([], [])  # and it is not asked again


def test_where_nobody_is_sure_nobody_is_judged():
    c = make()
    opened(c, 2)
    run(c, 4, 2)
    for _ in range(2):
        for fork in step(c)[0]:
            tell(c, fork, "7", 0.2)
        run(c, 4, 2, start=4)
    assert step(c) == ([], [])
    group = c.runs["g"].group
    assert group.clusters == [] and c.runs["g"].in_flight == frozenset()
    assert all(sibling.is_live for sibling in group.siblings.values())


def test_a_sibling_that_ends_speaks_for_its_probe():
    c = make()
    opened(c, 2)
    run(c, 4, 2)
    forks, _ = step(c)
    c.vote("g", [End(1, ids_of("1 so \\boxed{7}"), False)])
    tell(c, forks[0], "7")
    tell(c, forks[1], "8", 0.1)  # too late, and of no use
    _, stops = step(c)
    assert c.runs["g"].group.clusters == [[0, 1]]
    assert stops == [] or [stop.index for stop in stops] == [0]


def test_a_probe_that_fails_prunes_nobody_and_is_logged_once(caplog):
    c = make()
    opened(c, 2)
    run(c, 4, 2)
    for turn in range(2):
        for fork in step(c)[0]:
            c.handover.probed("g", fork.index, fork.epoch, failure="its row was needed")
        run(c, 4, 2, start=4 * (turn + 1))
    assert step(c) == ([], [])
    assert c.runs["g"].group.clusters == []
    assert [r.getMessage() for r in caplog.records] == [
        "judge probe gives no verdict: its row was needed"
    ]


def test_a_worker_that_fails_prunes_nobody():
    c = make()
    opened(c, 2)
    assert c.handover.desk is not None
    c.handover.desk.worker.is_failing = True  # type: ignore[attr-defined]
    run(c, 4, 2)
    for fork in step(c)[0]:
        tell(c, fork, "7")
    assert step(c) == ([], [])
    assert c.runs["g"].group.clusters == [] and c.runs["g"].in_flight == frozenset()


def test_whoever_does_not_run_is_not_forked():
    c = make()
    opened(c, 3)
    run(c, 4, 2)  # the third has no token yet
    epoch = c.runs["g"].group.epoch
    assert c.apply(Probe("g", epoch, (0, 2))) == [Fork("g", 0, epoch)]
    assert c.apply(Probe("g", epoch + 1, (0,))) == []
    assert c.apply(Probe("other", epoch, (0,))) == []


def test_a_follower_forks_and_counts_but_reads_nothing():
    c = make(is_leader=False)
    opened(c, 2)
    run(c, 4, 2)
    epoch = c.runs["g"].group.epoch
    (fork, _) = c.apply(Probe("g", epoch, (0, 1)))
    assert isinstance(fork, Fork)
    tell(c, fork, "7")
    assert c.runs["g"].group.judge_tokens == 10 and c.poll() == []


def test_a_group_that_is_gone_is_asked_nothing_more():
    c = make()
    opened(c, 2)
    run(c, 4, 2)
    forks, _ = step(c)
    c.forget("g")
    tell(c, forks[0], "7")
    assert c.poll() == []
    assert c.handover.desk is not None and c.handover.desk.num_pending == 0


def test_the_box_may_be_opened_by_a_text_of_your_own():
    check_judge("probe")
    check_judge("probe: so \\boxed{")
    assert closing_of("probe") == CLOSING and closing_of("probe: so \\boxed{") == " so \\boxed{"
    assert load_judge("probe: so \\boxed{").name == "probe"
    with pytest.raises(ConfigError, match="must end in an open box"):
        check_judge("probe:answer")
    with pytest.raises(ConfigError, match="use probe-server:URL"):
        check_offline("probe")
    assert card_path("probe: so \\boxed{") is None
