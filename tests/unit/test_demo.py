"""The demo's pure parts: the rival's expectation, the live view's state, the table's rows."""

from __future__ import annotations

import socket
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sglang_deepprune import demo
from sglang_deepprune.demo_rows import PLAIN, Mode, Outcome, cut_share, modes, row_of
from sglang_deepprune.demo_view import Cell, Row, View, render, table_of
from sglang_deepprune.equal_tokens import Sampled, answer_classes, cons_accuracy, cons_at_tokens
from sglang_deepprune.local_server import ServerError
from sglang_deepprune.reasoner import Question
from sglang_deepprune.report import with_ratios

ANSWERS = ("7", "7", "8", None, "7", "9", "8", None)
QUESTION = Sampled(ANSWERS, (10, 20, 30, 40, 50, 60, 70, 80), "7")


def test_equal_answers_are_one_class_and_abstentions_none():
    assert answer_classes(["8", "7", "7.0", None]) == [("8", 1), ("7", 2)]
    assert answer_classes([None, None]) == []


def by_brute_force(answers: tuple[str | None, ...], gold: str, k: int) -> float:
    """All subsets; every order is as likely, so each of the tied answers wins equally often."""
    hits = 0.0
    subsets = list(combinations(answers, k))
    for subset in subsets:
        counts = {a: subset.count(a) for a in subset if a is not None}
        best = [a for a, count in counts.items() if count == max(counts.values())]
        hits += (gold in best) / len(best) if best else 0.0
    return hits / len(subsets)


@pytest.mark.parametrize("gold, k", list(product("7891", range(1, len(ANSWERS) + 1))))
def test_cons_at_k_is_the_mean_over_all_subsets(gold: str, k: int):
    question = Sampled(ANSWERS, QUESTION.tokens, gold)
    assert cons_accuracy(question, k) == pytest.approx(by_brute_force(ANSWERS, gold, k), abs=1e-12)


def test_sixty_four_different_answers_are_counted_at_once():
    answers = tuple(str(1000 + i) for i in range(64))
    question = Sampled(answers, (1,) * 64, "1000")
    # Nobody agrees, so every drawn answer wins equally often.
    assert cons_accuracy(question, 16) == pytest.approx(1 / 64)


def test_equal_tokens_interpolate_between_whole_k():
    low, high = (cons_accuracy(QUESTION, k) for k in (2, 3))
    rival = cons_at_tokens([QUESTION], 45 * 2.5)
    assert rival.k == pytest.approx(2.5)
    assert rival.accuracy == pytest.approx((low + high) / 2)
    assert cons_at_tokens([QUESTION], 1e9).k == 8 and cons_at_tokens([QUESTION], 1).k == 1


def chunk(index: int, tokens: int, **meta: object) -> dict[str, object]:
    return {"index": index, "text": "so 4", "meta_info": {"completion_tokens": tokens, **meta}}


def test_the_view_follows_a_stream():
    row = Row("2 + 2", "4", [Cell(), Cell()])
    row.take(chunk(0, 5, finish_reason=None))
    assert (row.cells[0].state, row.cells[0].tokens) == ("running", 5)
    ended = {"choice": {"state": "finished", "answer": "4"}}
    row.take(chunk(0, 9, finish_reason={"type": "stop"}, deepprune=ended))
    pruned = {"choice": {"state": "pruned", "answer": None}, "group": {"answer": "4"}}
    row.take(chunk(1, 7, finish_reason={"type": "length"}, deepprune=pruned))
    assert [cell.state for cell in row.cells] == ["finished", "pruned"]
    assert [cell.text for cell in row.cells] == ["so 4", "so 4"]
    assert row.group == {"answer": "4"}


def test_the_screen_shows_each_sibling_and_fits_eighty_columns():
    told: list[str] = []
    view = View("test", total=2, on_close=lambda view: told.append(view.progress))
    cells = [Cell("finished", 123, "12345678"), Cell("pruned", 50), *[Cell()] * 14]
    view.open(0, Row("What is 2 + 2 ?", "4", cells))
    console = Console(width=80, record=True, force_terminal=False)
    console.print(view)
    lines = console.export_text().splitlines()
    shown = [line for line in lines if "123" in line or "✂   50" in line]
    assert any("12345 123" in line and "✂  50" in line for line in shown)
    view.close(0, is_right=True)
    assert (view.done, view.rows) == (1, {})
    assert told == ["test: 1 of 2 questions, 1 votes right"]
    assert render(Cell("finished", 1, "4.0"), "4").spans[0].style == "green"
    assert render(Cell("finished", 1, None), "4").spans[0].style == "red"


def outcome(answer: str | None, tokens: int) -> Outcome:
    choices: list[dict[str, Any]] = [
        {"answer": "4", "tokens": tokens, "state": "finished"},
        {"answer": None, "tokens": 3, "state": "pruned"},
        {"answer": None, "tokens": 0, "state": "aborted"},
    ]
    group = {
        "answer": answer, "generated_tokens": tokens + 3, "judge_calls": 2, "judge_tokens": 9,
        "choices": choices,
    }  # fmt: skip
    return Outcome(Question("2 + 2", "4", "easy"), group, ("wait thus 4", "wait", ""))


def test_a_row_counts_states_and_compares_winners_with_plain():
    plain = [outcome("4", 20), outcome("5", 20)]
    row = row_of(Mode("m", {}), [outcome("4.0", 10), outcome(None, 10)], 1.5, plain)
    assert (row["vote_right"], row["same_winner"], row["single_right"]) == (0.5, 0.5, 1.0)
    assert (row["finished"], row["pruned"], row["tokens"], row["judge_calls"]) == (2, 2, 13, 4)
    assert row["other_ends"] == 2 and row["same_texts"] == 1
    assert (row["cut_words"], row["cut_share"]) == (None, None)  # `latency` lets no judge prune


def test_no_winner_twice_is_the_same_outcome():
    row = row_of(Mode("m", {}), [outcome(None, 10)], 1.0, [outcome(None, 10)])
    assert row["same_winner"] == 1 and row["vote_right"] == 0


def test_plain_is_the_first_mode_and_stops_nothing():
    plain, paper = modes(["paper"])
    assert (plain.name, plain.settings) == (PLAIN, {"preset": "collect"})
    row = row_of(paper, [outcome("4", 10)], 1.0, [outcome("4", 10)])
    assert (row["cut_words"], row["window"]) == (25, 32)  # the paper's own


@pytest.mark.parametrize(
    "text, words, share",
    [("wait a b c", 1, 0.4), ("wait a b c", 2, 1.0), ("", 2, 1.0), ("thus wait ab", 2, 0.75)],
)
def test_the_cut_is_a_share_of_the_trace(text: str, words: int, share: float):
    # The word that completes the count may be read with the blank that ends it.
    assert cut_share(text, words) == pytest.approx(share, abs=0.11)


def test_the_table_names_a_cut_that_is_not_the_papers():
    plain = [outcome("4", 20)]
    rows = [row_of(mode, plain, 2.0, plain) for mode in modes(["paper", "paper-scaled"])]
    table = table_of(with_ratios(rows, rows[0], ["tokens", "seconds"]), "title")
    console = Console(width=100, record=True, force_terminal=False)
    console.print(table)
    text = console.export_text()
    assert "4 words (paper: 25)" in text and "25 words " in text and "(x1.00)" in text


def test_a_reply_without_a_record_is_explained(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo, "post", lambda *_: [{"text": "4", "meta_info": {
        "completion_tokens": 1, "finish_reason": {"type": "stop"}}}])  # fmt: skip
    runner = demo.Runner("http://x", 2, seed=0, concurrency=1, console=Console(quiet=True))
    with pytest.raises(ServerError, match="--enable-deepprune"):
        runner.run(modes([])[0], [Question("2 + 2", "4", "easy")])


def test_a_port_in_use_is_refused_before_a_server_is_started(capsys: pytest.CaptureFixture[str]):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert demo.main(["--port", str(port)]) == 1
    assert f"--port {port}: Address already in use" in capsys.readouterr().out


def test_a_failure_names_the_log_of_the_server_and_keeps_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    class Dead:
        def __init__(self, *_: object, **__: object):
            self.log_file = (tmp_path / "server.log").open("w")

        def __enter__(self) -> None:
            raise ServerError("it ended at start")

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(demo, "LocalServer", Dead)
    with (
        pytest.raises(ServerError, match=r"it ended at start\n.*server\.log"),
        demo.own_server(Console(quiet=True), 0),
    ):
        pass
    assert (tmp_path / "server.log").exists()


@pytest.mark.parametrize("argv", [["--questions", "0"], ["--n", "1"], ["--presets", "collect"]])
def test_a_bad_argument_ends_the_demo_at_once(argv: list[str]):
    with pytest.raises(SystemExit):
        demo.parse(argv)
