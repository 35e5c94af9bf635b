"""The frontier study on recordings made here. No server, no model loading."""

import gzip
import json
from itertools import combinations

import numpy as np
import pytest

from benchmarks.frontier import (
    ProbeRule,
    adaptive,
    client_pool,
    cons,
    first_half,
    grouped,
    main,
    parallel_probe,
    serve,
    waves,
)
from benchmarks.frontier_data import BranchFileError, SimulatedJudge, draws_of, load, normalised
from benchmarks.frontier_report import Bench
from benchmarks.frontier_sim import Server, vote
from sglang_deepprune.config import DeepPruneConfig
from sglang_deepprune.group import State
from sglang_deepprune.types import Pair, Trace

COLLECT = DeepPruneConfig(preset="collect")
MIXED = ["7"] * 9 + ["8"] * 4 + [None, "ERR", ""]


class Yielding(Server):
    """Counts the extras that gave their slot back."""

    num_yielded = 0

    def _leave(self, number, index, state):
        self.num_yielded += state is State.HELD
        super()._leave(number, index, state)


def entry(answers, gold="7", lengths=None, probes=None):
    """One question as the recordings have it: every branch says its answer at each probe."""
    lengths = lengths or [1000 + 10 * index for index in range(len(answers))]
    branches = [
        [probes or [answer] * (length // 500), length, answer]
        for answer, length in zip(answers, lengths, strict=True)
    ]
    return {
        "question": "?",
        "gold_answer": gold,
        "probe_freq": 500,
        "each_branch": branches,
        "final_answers_trace": answers,
    }


def recording(folder, entries, name="one.json"):
    path = folder / name
    text = json.dumps(entries).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.fixture
def questions_of(tmp_path):
    return lambda *entries: load([recording(tmp_path, list(entries))])


@pytest.fixture
def draw_of(questions_of):
    """The whole recording in one order."""

    def make(*args, **more):
        question = questions_of(entry(*args, **more))
        return draws_of(question, len(question[0].branches), 1, seed=0)[0][0]

    return make


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("007", "7"), (7, "7"), (" 7.0 ", "7"), ("-03", "-3"), ("0", "0"), ("2.5", "2.5"),
        ("ERR", None), ("", None), (None, None), (r"\frac{1}{2}", r"\frac{1}{2}"),
    ],
)  # fmt: skip
def test_answers_are_compared_as_normalised_texts(raw, text):
    assert normalised(raw) == text


def test_plain_is_cons_at_n(draw_of):
    draw = draw_of(MIXED)
    assert grouped(draw, COLLECT) == cons(draw, draw.size)
    assert cons(draw, draw.size)[0].tokens == sum(one.length for one in draw.branches)


def test_cons_at_k_tries_every_block(draw_of):
    draw = draw_of(MIXED)
    tries = cons(draw, 4)
    assert len(tries) == 4
    assert sum(one.tokens for one in tries) == sum(one.length for one in draw.branches)


def test_a_unanimous_question_stops_after_a_few_votes(draw_of):
    draw = draw_of(["7"] * 16, lengths=[1000] * 16)
    [found] = grouped(draw, DeepPruneConfig(preset="balanced"))
    # Base 4, all as long: the third vote decides, in the step in which the fourth would end.
    assert found.answer == "7" and 3000 <= found.tokens <= 4000 and found.latency == 1000


def test_a_smaller_draw_is_the_beginning_of_a_larger_one(questions_of):
    questions = questions_of(entry(MIXED))
    [[small]], [[large]] = draws_of(questions, 4, 1, 3), draws_of(questions, 16, 1, 3)
    assert large.picked[:4] == small.picked and sorted(large.picked) == list(range(16))


def test_silent_branches_abstain_and_three_first_ones_release_the_group(draw_of):
    draw = draw_of([None, "ERR", "", None])
    [found] = grouped(draw, DeepPruneConfig(preset="balanced"))
    assert found.answer is None and found.tokens == sum(one.length for one in draw.branches)


def test_a_perfect_judge_prunes_to_k2_of_the_largest_cluster(questions_of, draw_of):
    draw = draw_of(["7"] * 12 + ["8"] * 4, lengths=[2000] * 16)
    judge = SimulatedJudge([draw.question], 1.0, seed=0)
    [found] = grouped(draw, DeepPruneConfig(preset="paper", cut="tokens", k2=4), judge)
    assert found.answer == "7"
    assert found.tokens == 4 * 2000 + 12 * 500


def test_a_judge_has_the_auroc_it_is_asked_for_and_is_symmetrical(questions_of):
    [question] = questions_of(entry(["7"] * 60 + ["8"] * 60))
    [[draw]] = draws_of([question], 120, 1, seed=0)
    score = SimulatedJudge([question], 0.75, seed=0).score_of(draw)
    traces = [Trace(index, "", 500, "tokens") for index in range(120)]
    pairs = [Pair(left, right) for left, right in combinations(traces, 2)]
    found = score(pairs)
    assert np.array_equal(found, score([Pair(pair.right, pair.left) for pair in pairs]))
    branches = draw.branches
    same = np.array(
        [branches[p.left.sibling].answer == branches[p.right.sibling].answer for p in pairs]
    )
    above = (found[same][:, None] > found[~same][None, ::7]).mean()
    assert above == pytest.approx(0.75, abs=0.02)
    assert found.mean() == pytest.approx(same.mean(), abs=0.02)  # calibrated


def test_adaptive_consistency_stops_at_its_confidence(draw_of):
    draw = draw_of(["7"] * 16, lengths=[100] * 16)
    [found] = adaptive(draw)
    assert found.tokens == found.latency == 400  # 4:0 has .969, 3:0 has .9375


def test_waves_stop_when_one_is_unanimous(draw_of):
    [found] = waves(draw_of(["7"] * 32, lengths=[100] * 32))
    assert (found.tokens, found.latency) == (800, 100)
    [found] = waves(draw_of(["7", "8"] * 16, lengths=[100] * 32), width=16)
    assert found.tokens == 3200


def test_the_first_half_votes_and_the_rest_stops(draw_of):
    [found] = first_half(draw_of(["7"] * 2 + ["8"] * 2, lengths=[100, 200, 900, 900]))
    assert (found.answer, found.tokens, found.latency) == ("7", 700, 200)


def test_probes_stop_on_a_stable_majority(draw_of):
    draw = draw_of(["7"] * 8, lengths=[5000] * 8)
    [found] = parallel_probe(draw, ProbeRule(patience=3, share=0.5))
    assert (found.answer, found.latency) == ("7", 1500)
    assert found.tokens == 8 * (1500 + 3 * 20)


def test_probes_prune_who_keeps_disagreeing(draw_of):
    draw = draw_of(["7"] * 6 + ["8"] * 2, lengths=[5000] * 8)
    [found] = parallel_probe(draw, ProbeRule(patience=99, share=0.5))
    assert found.tokens == 6 * 5000 + 2 * 1500 + 20 * (6 * 9 + 2 * 3)


def test_equal_votes_go_to_the_first_answer():
    assert vote([None, "8", "7", "7", "8"]) == "8"
    assert vote([None]) is None


def test_plain_fills_the_slots_first_come_first_served(questions_of):
    questions = questions_of(*[entry(["7"] * 4, lengths=[100] * 4)] * 3)
    column = [own[0] for own in draws_of(questions, 4, 1, 0)]
    found = Server(column, COLLECT, slots=4).play()
    assert [one.latency for one in found] == [100, 200, 300]
    found = Server(column, COLLECT, slots=6).play()
    assert [one.latency for one in found] == [100, 200, 200]


def test_free_slots_are_filled_and_a_client_pool_leaves_them_empty(questions_of):
    answers = [f"{number}" for number in range(16)]  # nobody agrees: nothing is decided early
    questions = questions_of(entry(answers, lengths=[100] * 16))
    column = [own[0] for own in draws_of(questions, 16, 1, 0)]
    [filled] = Server(column, DeepPruneConfig(), slots=16, fills=True).play()
    [pool] = Server(column, client_pool(4), slots=16, is_client=True).play()
    assert filled.latency == 100 and pool.latency == 400


def test_an_extra_yields_to_a_claim_and_keeps_its_tokens(questions_of):
    """Groups claim more as they grow older, and there are no more slots: extras make room."""
    apart = [f"{number}" for number in range(16)]
    questions = questions_of(
        entry(apart, lengths=[100] * 16), entry(apart, lengths=list(range(300, 1900, 100)))
    )
    column = [own[0] for own in draws_of(questions, 16, 1, 0)]
    server = Yielding(column, DeepPruneConfig(base=2, widen=1.0), slots=8, fills=True)
    found = server.play()
    assert server.num_yielded > 0
    assert [one.tokens for one in found] == [1600, sum(range(300, 1900, 100))]
    assert server.num_running == 0 and not server.extras


def test_rows_of_the_server_start_with_plain(questions_of):
    questions = questions_of(*[entry(["7"] * 16, lengths=[100] * 16)] * 4)
    rows = serve(questions, 16, [16], 1, 0)
    assert rows[0]["policy"] == "collect" and rows[0]["questions_per_s_ratio"] == 1.0
    balanced = next(row for row in rows if row["policy"] == "balanced, fill")
    # 3 votes of 16 decide: all four questions fit at once.
    assert balanced["questions_per_s_ratio"] == pytest.approx(4.0)
    assert balanced["same_winner"] == balanced["accuracy"] == 1.0


def test_cons_at_equal_tokens_is_the_mean_over_all_subsets(questions_of):
    answers = ["7", "8", None, "7", "9", "8", "8"]
    bench = Bench.of(draws_of(questions_of(entry(answers)), 7, 1, 0), seed=0)
    for k in (1, 3, 5, 7):
        hits = []
        for subset in combinations(answers, k):
            votes = [one for one in subset if one]
            most = max((votes.count(one) for one in votes), default=0)
            tied = {one for one in votes if votes.count(one) == most}
            hits.append(("7" in tied) / max(1, len(tied)))
        assert bench.cons_right[0, k - 1] == pytest.approx(np.mean(hits), abs=0.05)


def test_files_are_pooled_and_a_report_is_written(tmp_path, capsys):
    first = recording(tmp_path, [entry(MIXED), entry(["7"] * 16, gold=7)])
    second = recording(tmp_path, [entry(["007"] * 16)], name="two.json.gz")
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    main(
        ["--branches", str(first), str(second), "--sizes", "8", "16", "--slots", "16",
         "--draws", "2", "--json", str(out), "--plot", str(plot)]
    )  # fmt: skip
    report = json.loads(out.read_text())
    assert report["name"] == "frontier" and report["questions"] == 3
    plain = next(row for row in report["rows"] if row["policy"] == "collect" and row["n"] == 16)
    assert plain["tokens_ratio"] == plain["tokens_low"] == plain["same_winner"] == 1.0
    assert plain["accuracy"] == 1.0 and plain["loss"] == 0.0
    assert {row["n"] for row in report["server"]} == {16}
    assert plot.stat().st_size > 0
    assert "balanced, fill" in capsys.readouterr().out


def test_more_siblings_than_were_recorded_are_refused(tmp_path, capsys):
    path = recording(tmp_path, [entry(["7"] * 4)])
    with pytest.raises(SystemExit):
        main(["--branches", str(path), "--sizes", "8"])
    assert "1 to 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [("{", "Expecting"), ('{"a": 1}', "no list"), ("[]", "no questions"),
     ('[{"gold_answer": "1"}]', "question 0: no field 'each_branch'"),
     ('[{"gold_answer": "1", "each_branch": [[["1"], 5]]}]', "question 0: not enough")],
)  # fmt: skip
def test_a_file_of_another_kind_is_one_error(tmp_path, content: str, said: str):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(BranchFileError, match=said):
        load([path])
