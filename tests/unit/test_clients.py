"""The serving benchmark's pure parts: the rivals' rules on a fake source, ratios, loads."""

import asyncio
import json
from dataclasses import replace

import pytest

from benchmarks import serving
from benchmarks.bench_plugin import Totals, _arrival, difference, plugin_env
from benchmarks.clients import (
    DECLINED,
    Sampled,
    Trace,
    doubling,
    equal_waves,
    is_agreed,
    is_confident,
    is_decided,
    is_rival,
    is_unanimous,
    rival,
    settings_of,
    top_two,
)
from benchmarks.serving import Results, main, results_folder
from benchmarks.serving_cells import (
    BY_NAME,
    CAPACITY,
    CELLS,
    DECLINED_AGAIN,
    LEVEL_SHARES,
    PLAIN_AGAIN,
    arrivals,
    is_of_plugin,
    passes_of,
    question_set,
)
from benchmarks.serving_report import Pass, cell_rows, percentile, save_plot


class FakeSource:
    """Traces that run side by side, one token a turn of the event loop."""

    def __init__(self, answers, lengths=None):
        self.answers = answers
        self.lengths = lengths or [10 * (i + 1) for i in range(len(answers))]
        self.aborted = set()
        self.running = 0
        self.most_running = 0

    async def draw(self, index):
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        tokens = 0
        while tokens < self.lengths[index] and index not in self.aborted:
            tokens += 1
            await asyncio.sleep(0)
        self.running -= 1
        return Trace(index, None if index in self.aborted else self.answers[index], tokens)

    async def abort(self, index):
        self.aborted.add(index)


def draw(name, source) -> Sampled:
    async def run():
        return await rival(name)(source, len(source.answers))

    return asyncio.run(run())


def play(name, answers, lengths=None):
    source = FakeSource(answers, lengths)
    sampled = draw(name, source)
    return source, sampled, sampled.outcome(sampled.decided_at - 1.0)


def indices(traces):
    return sorted(trace.index for trace in traces)


def test_a_pool_stops_at_a_decided_vote_and_counts_what_it_aborts():
    source, sampled, outcome = play("pool4", ["A"] * 16)
    assert outcome.answer == "A" and outcome.votes == {"A": len(sampled.finished)}
    assert 3 <= len(sampled.finished) < 16
    assert source.most_running == 4
    assert source.aborted == set(indices(sampled.dropped))
    assert outcome.started == len(sampled.finished) + len(sampled.dropped)
    assert all(0 < trace.tokens < source.lengths[trace.index] for trace in sampled.dropped)
    assert outcome.tokens == sum(t.tokens for t in [*sampled.finished, *sampled.dropped])
    assert outcome.latency_s == pytest.approx(1.0)


def test_a_pool_without_agreement_draws_everything():
    source, sampled, outcome = play("pool4", [str(i) for i in range(12)])
    assert indices(sampled.finished) == list(range(12)) and not sampled.dropped
    assert outcome.answer == "0"  # a tie goes to the lowest index
    assert source.most_running == 4


def test_a_tie_goes_to_the_lowest_index_whoever_came_first():
    finished = [Trace(2, "B", 5), Trace(0, "A", 7)]
    outcome = Sampled(finished, [Trace(1, None, 2)], decided_at=3.0).outcome(start=1.0)
    assert outcome.answer == "A" and outcome.votes == {"A": 1, "B": 1}
    assert (outcome.tokens, outcome.started, outcome.latency_s) == (14, 3, 2.0)


def test_a_pool_wider_than_n_starts_n():
    source, sampled, _ = play("pool16", [None] * 8)
    assert source.most_running == 8 and len(sampled.finished) == 8


def test_waves_double_until_enough_agree():
    assert list(doubling(16)) == [2, 4, 8, 2] and list(doubling(2)) == [2]
    _, sampled, _ = play("waves", ["A"] * 16)
    assert indices(sampled.finished) == list(range(6))  # two are too few to trust
    _, sampled, _ = play("waves", ["A", "B"] * 8)
    assert len(sampled.finished) == 16


def test_adaptive_draws_one_by_one():
    source, sampled, _ = play("adaptive", ["A"] * 16)
    assert source.most_running == 1 and len(sampled.finished) == 4


def test_esc_stops_at_a_wave_that_says_one_thing():
    assert list(equal_waves(20, 8)) == [8, 8, 4]
    _, sampled, _ = play("esc", ["B"] + ["A"] * 31)
    assert len(sampled.finished) == 16
    _, sampled, _ = play("esc", [None] * 24)
    assert len(sampled.finished) == 24


def test_first_m_takes_the_half_that_finishes_first():
    lengths = [80, 10, 70, 20, 60, 30, 50]
    source, sampled, outcome = play("first_m", list("BABABAB"), lengths)
    assert indices(sampled.finished) == [1, 3, 5, 6] and outcome.answer == "A"
    assert source.aborted == {0, 2, 4} and outcome.started == 7


def test_an_abort_that_comes_too_early_is_sent_again():
    class Deaf(FakeSource):
        asked = 0

        async def abort(self, index):
            self.asked += 1
            if self.asked > 2:
                await super().abort(index)

    source = Deaf(["A", "A", "A", "B"], [1, 1, 1, 10**7])
    sampled = draw("pool4", source)
    assert source.asked == 3 and indices(sampled.dropped) == [3]


@pytest.mark.parametrize(
    ("rule", "answers", "enough"),
    [
        (lambda a: is_decided(a, 16), ["A", "A"], False),
        (lambda a: is_decided(a, 16), ["A"] * 8, True),
        (lambda a: is_decided(a, 16), ["A", "B"] * 4, False),
        (is_agreed, ["A", "A", "A", "B"], True),
        (is_agreed, ["A", "A", None], False),
        (is_confident, ["A"] * 3, False),
        (is_confident, ["A"] * 4, True),
        (is_confident, [None] * 9, False),
        (is_confident, ["A"] * 5 + ["B"], False),
        (is_confident, ["A"] * 6 + ["B"], True),
        (lambda a: is_unanimous(a, 3), ["B", "A", "A", "A"], True),
        (lambda a: is_unanimous(a, 3), ["A", "A"], False),
    ],
)
def test_rules(rule, answers, enough):
    assert rule(answers) is enough


def test_names():
    assert is_rival("pool8") and is_rival("esc") and not is_rival("latency")
    with pytest.raises(KeyError):
        rival("plain")
    assert top_two([]) == (0, 0) and top_two(["A", None, "B", "A"]) == (2, 1)


def test_nothing_sampled_has_no_answer():
    assert Sampled().outcome(0.0).answer is None


# -- cells ---------------------------------------------------------------------------------------


def test_there_are_twelve_cells_and_plain_is_first_and_last():
    assert len(CELLS) == 12 and len(BY_NAME) == 13
    for cell in CELLS:
        off, on = passes_of(cell)
        assert off[0] == "plain" and off[-1] == PLAIN_AGAIN and not any(map(is_of_plugin, off))
        assert on[0] == DECLINED and on[1] == "balanced" and on[-1] == DECLINED_AGAIN
        assert all(map(is_of_plugin, on))
    off, on = passes_of(CELLS[0], ["plain", "latency"])
    assert (off, on) == (["plain", PLAIN_AGAIN], [DECLINED, "latency", DECLINED_AGAIN])
    assert passes_of(CELLS[0], ["pool4"]) == (["plain", "pool4", PLAIN_AGAIN], [])


@pytest.mark.parametrize("count", [1, 4, 7, 60, 100])
def test_the_question_set_holds_its_levels(count):
    asked = question_set(count)
    assert asked == question_set(count) and len(asked) == count
    for level, share in LEVEL_SHARES.items():
        assert abs(sum(one.difficulty == level for one in asked) - share * count) < 1


def test_arrivals_have_their_rate_and_scale_with_it():
    times = arrivals(500, 2.0)
    assert times == sorted(times) and times[-1] == pytest.approx(250, rel=0.15)
    assert arrivals(500, 4.0) == pytest.approx([one / 2 for one in times])


# -- results and report --------------------------------------------------------------------------

ASKED = question_set(2)
GOLD = [one.answer for one in ASKED]


def a_pass(policy, wall_s, *, answers=GOLD, tokens=(100, 300), **steps):
    totals = {"decode_steps": 100, "decode_rows": 1000, "decode_s": 2.0, "kv_tokens": 50_000}
    return Pass(
        "all8-real", policy, wall_s, list(answers), list(tokens), [8, 8], [1.0, wall_s],
        {**difference(Totals(), Totals()), **totals, **steps},
    )  # fmt: skip


def test_whoever_declines_is_a_plain_pass_too():
    passes = [a_pass("plain", 4.0), a_pass("balanced", 1.0), a_pass(DECLINED, 2.0)]
    plain, ours, declined = cell_rows(BY_NAME["all8-real"], passes, ASKED)
    assert plain["plain_questions_per_s"] == ours["plain_questions_per_s"] == 0.75
    assert declined["plain_spread"] == pytest.approx(0.5 / 0.75)
    assert ours["questions_per_s_ratio"] == pytest.approx(2.0 / 0.75)


def test_ordinary_requests_are_part_of_a_poisson_load(tmp_path):
    cell, results = BY_NAME["poisson80-real"], Results(tmp_path)
    results.add(replace(a_pass(CAPACITY, 2.0), cell=cell.name))  # two questions: one a second
    assert serving._rate(cell, results) == pytest.approx(0.8 - 1 / 16)
    assert serving._rate(BY_NAME["all8-real"], results) == 0


def test_ratios_are_to_the_mean_of_both_plain_passes():
    passes = [
        a_pass("plain", 4.0),
        a_pass("latency", 2.0, answers=[GOLD[0], "no"], tokens=(50, 150), decode_s=1.0),
        a_pass(PLAIN_AGAIN, 4.0 / 1.2),
    ]
    plain, ours, again = cell_rows(BY_NAME["all8-real"], passes, ASKED)
    assert plain["questions_per_s"] == 0.5 and again["questions_per_s"] == pytest.approx(0.6)
    assert plain["plain_questions_per_s"] == pytest.approx(0.55)
    assert plain["plain_spread"] == pytest.approx(0.1 / 0.55)
    assert ours["questions_per_s_ratio"] == pytest.approx(1 / 0.55)
    assert ours["tokens_ratio"] == 0.5 and ours["step_ms"] == 10.0
    assert ours["product"] == pytest.approx(1 / 0.55 * 0.5 * 0.5)
    assert ours["same_winner"] == 0.5 and ours["accuracy"] == 0.5 and ours["plain_accuracy"] == 1
    assert ours["rows_busy"] == 10.0 and ours["kv_time_ratio"] == 1.0
    assert ours["n1_p99_ratio"] is None and plain["same_winner"] == 1
    assert set(plain) == set(ours)


def test_a_missing_answer_is_the_same_as_a_missing_answer_and_never_right():
    passes = [a_pass("plain", 1.0, answers=[None, GOLD[1]]), a_pass("esc", 1.0, answers=[None] * 2)]
    rows = cell_rows(BY_NAME["all8-real"], passes, ASKED)
    assert rows[1]["same_winner"] == 0.5 and rows[1]["accuracy"] == 0.0


def test_no_rows_before_plain_was_played():
    assert cell_rows(BY_NAME["all8-real"], [a_pass("pool4", 1.0)], ASKED) == []


def test_percentiles_are_nearest_ranks():
    assert percentile([], 0.5) is None
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([float(i) for i in range(1, 201)], 0.99) == 198.0


def test_results_survive_a_cut_and_forget_what_is_played_again(tmp_path):
    results = Results(tmp_path)
    results.add(a_pass("plain", 1.0))
    results.add(replace(a_pass("plain", 1.0), cell="two16-real"))
    results.add(a_pass("latency", 2.0))
    with results.path.open("a") as out:
        out.write('{"cell": "all8')
    cell = BY_NAME["all8-real"]
    results = Results(tmp_path)
    assert results.missing(cell, ["plain", "pool4", "latency"]) == ["pool4"]
    assert results.of(cell, ["latency", "plain"])[0].wall_s == 2.0
    results.forget([cell], ["latency"])
    assert Results(tmp_path).missing(cell, ["plain", "latency"]) == ["latency"]
    results.forget([cell])
    assert list(Results(tmp_path).passes) == [("two16-real", "plain")]


def test_a_length_of_flat_steps_has_passes_and_a_report_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = question_set(2)
    kept = Results(results_folder(2, 10.0))
    for policy in ("plain", "balanced", PLAIN_AGAIN, DECLINED, DECLINED_AGAIN):
        one = a_pass(policy, 2.0, answers=[question.answer for question in asked])
        kept.add(replace(one, cell="two16-flat"))
    assert kept.path.parent != results_folder(2) == results_folder(2, 25.0)
    out = tmp_path / "serving.json"
    # Every pass of 10 ms steps is there, so no server is needed for the report.
    monkeypatch.setattr(
        "sys.argv",
        ["serving", "--cells", "two16-flat", "--policies", "balanced", "--questions", "2",
         "--flat-step-ms", "10", "--json", str(out)],
    )  # fmt: skip
    main()
    report = json.loads(out.read_text())
    assert report["flat_step_ms"] == 10
    assert [row["policy"] for row in report["rows"]] == [
        "plain",
        DECLINED,
        "balanced",
        DECLINED_AGAIN,
        PLAIN_AGAIN,
    ]


@pytest.mark.parametrize("text", ["0", "-5", "nan", "inf"])
def test_steps_of_no_length_are_refused(text, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["serving", f"--flat-step-ms={text}"])
    with pytest.raises(SystemExit):
        main()
    assert "--flat-step-ms" in capsys.readouterr().err


def test_a_plot_is_written(tmp_path):
    rows = cell_rows(BY_NAME["all8-real"], [a_pass("plain", 2.0), a_pass("esc", 1.0)], ASKED)
    save_plot(rows, tmp_path / "serving.png")
    assert (tmp_path / "serving.png").stat().st_size > 0


# -- the plugin ----------------------------------------------------------------------------------


def test_siblings_are_numbered_a_key():
    assert [_arrival("a"), _arrival("b"), _arrival("a"), _arrival("a")] == [0, 0, 1, 2]


def test_the_plugin_is_found_by_its_metadata(tmp_path):
    env = plugin_env(tmp_path, flat_ms=25.0, is_deepprune_on=True)
    assert env["DEEPPRUNE_FLAT_STEP_MS"] == "25.0" and env["DEEPPRUNE_BENCH_NOISE"] == "0"
    assert (tmp_path / "deepprune_bench-0.0.1.dist-info" / "entry_points.txt").is_file()
    assert env["PYTHONPATH"].startswith(str(tmp_path))


def test_a_preset_may_come_with_settings():
    assert settings_of("economy") == {"preset": "economy"}
    wanted = {"preset": "balanced", "base": 8, "widen": 0.5}
    assert settings_of("balanced,base=8,widen=0.5") == wanted
