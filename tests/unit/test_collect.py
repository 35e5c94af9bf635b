"""`collect` against a small HTTP server: rows, going on, retries, errors."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_deepprune import collect, traces
from sglang_deepprune.cli import main
from tests.unit.fake_http import FakeHandler, FakeServer, running


class Fake(FakeServer):
    """Answers as an OpenAI-compatible server; `errors` come first."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, dict[str, Any], str | None]] = []
        self.errors: list[int] = []


class Handler(FakeHandler):
    server: Fake

    def do_POST(self) -> None:
        body = self.read_json()
        self.server.asked.append((self.path, body, self.headers.get("Authorization")))
        status = self.server.errors.pop(0) if self.server.errors else 200
        seed, is_chat = body["seed"], "chat" in self.path
        text = f"so x = {seed}. The answer is {seed}."
        choice: dict[str, Any] = {"finish_reason": "length" if seed == 2 else "stop"}
        choice |= (
            {"message": {"content": text, "reasoning_content": "hm"}} if is_chat else {"text": text}
        )
        if body.get("logprobs"):
            choice["logprobs"] = (
                {"content": [{"logprob": -0.5}]} if is_chat else {"token_logprobs": [-0.5]}
            )
        reply = {"choices": [choice], "usage": {"completion_tokens": 9}}
        self.send_json(status, reply if status == 200 else {"message": "no"})


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    server = Fake()
    with running(server):
        yield server


@pytest.fixture
def questions(tmp_path: Path) -> str:
    rows = [{"question_id": name, "prompt": f"ask {name}", "gold": 1} for name in "ab"]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_rows_are_a_recording_and_a_second_run_goes_on(
    fake: Fake, questions: str, tmp_path: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    output = tmp_path / "out.jsonl"
    argv = ["collect", "--questions", questions, "--url", fake.url, "--output", str(output),
            "--endpoint", endpoint, "--logprobs"]  # fmt: skip
    assert main([*argv, "--n", "2"]) == 0
    with output.open("a") as file:
        file.write('{"question_id": "a", "se')  # a run that was killed
    assert main([*argv, "--n", "3"]) == 0
    assert len(fake.asked) == 6  # none twice
    assert {key for _, _, key in fake.asked} == {"Bearer secret"}
    first, second = sorted(traces.load(output), key=lambda question: question.question_id)
    assert (first.prompt, first.gold) == ("ask a", "1")
    found = {trace.seed: trace.answer for trace in second.traces}
    assert found[0] == "0"
    assert found[1] == "1"
    assert set(found) == {0, 1, 2}
    row = json.loads(output.read_text().splitlines()[0])
    assert row["logprobs"] == [-0.5]
    assert row["num_tokens"] == 9
    assert row["text"].startswith("<think>\nhm\n</think>" if endpoint == "chat" else "so x")


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b"])
def test_a_texts_own_line_separators_are_no_ends_of_a_row(tmp_path: Path, mark: str):
    output = tmp_path / "out.jsonl"
    rows = [{"question_id": "q", "seed": seed, "text": f"so{mark}7 é"} for seed in (0, 1)]
    whole = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    for cut in range(len(whole) - 20, len(whole) + 1):  # killed in the middle of the last row
        output.write_bytes(whole[:cut])
        kept = 2 if cut >= len(whole) - 1 else 1
        assert collect.already_there(output) == {("q", seed) for seed in range(kept)}
        assert output.read_bytes().count(b"\n") == kept


def test_a_server_that_dies_in_its_reply_is_asked_again(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
):
    tries = []

    def broken(*_: Any, **__: Any) -> Any:
        tries.append(1)
        raise http.client.IncompleteRead(b"{")

    monkeypatch.setattr("urllib.request.urlopen", broken)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    argv = ["collect", "--reasoner", "1", "--url", "http://x", "--model", "m", "--n", "1"]
    assert main([*argv, "--output", str(tmp_path / "out.jsonl")]) == 2
    assert "IncompleteRead" in capsys.readouterr().err
    assert len(tries) > 1


def test_two_questions_of_one_name_are_refused(tmp_path: Path):
    path = tmp_path / "twice.jsonl"
    path.write_text('{"question_id": 1, "prompt": "a"}\n{"question_id": "1", "prompt": "b"}\n')
    with pytest.raises(collect.CollectError, match="two questions are called '1'"):
        collect.load_questions(str(path))


def test_a_busy_server_is_asked_again(fake: Fake, questions: str, tmp_path: Path):
    fake.errors = [503, 429]
    argv = ["--questions", questions, "--url", fake.url, "--output", str(tmp_path / "out.jsonl")]
    assert main(["collect", *argv, "--n", "1", "--concurrency", "1"]) == 0
    assert len(fake.asked) == 4


def test_a_refusal_is_one_sentence(fake: Fake, questions: str, tmp_path: Path, capsys: Any):
    fake.errors = [400] * 4
    argv = ["--questions", questions, "--url", fake.url, "--output", str(tmp_path / "out.jsonl")]
    assert main(["collect", *argv, "--n", "1"]) == 2
    assert "HTTP 400" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", ["", "{", '{"question_id": 1}', '{"question_id": 1, "prompt": 2}']
)
def test_bad_questions(tmp_path: Path, content: str, capsys: Any):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    argv = [
        "--questions",
        str(path),
        "--url",
        "http://127.0.0.1:9",
        "--output",
        str(tmp_path / "o"),
    ]
    assert main(["collect", *argv]) == 2
    assert "bad.jsonl" in capsys.readouterr().err


def test_the_reasoners_questions():
    asked = collect.reasoner_questions(4, seed=1)
    assert len({one.question_id for one in asked}) == 4
    assert all(one.prompt and one.gold for one in asked)


def test_the_reasoners_traces_fit_its_context(fake: Fake, tmp_path: Path):
    argv = ["collect", "--reasoner", "1", "--url", fake.url, "--n", "1"]
    assert main([*argv, "--output", str(tmp_path / "own.jsonl")]) == 0
    assert fake.asked[-1][1]["max_tokens"] == collect.REASONER_MAX_TOKENS
    assert main([*argv, "--max-tokens", "7", "--output", str(tmp_path / "other.jsonl")]) == 0
    assert fake.asked[-1][1]["max_tokens"] == 7
