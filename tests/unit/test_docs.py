"""The pages of docs/: their examples run, and what they name exists."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from sglang_deepprune import cli, evaluation, policy
from sglang_deepprune.actions import End, Stop
from sglang_deepprune.config import (
    PRESETS,
    DeepPruneConfig,
    flag_of,
    request_fields,
    setting_fields,
)
from sglang_deepprune.coordinator import Coordinator
from sglang_deepprune.group import State
from sglang_deepprune.judges import load_judge
from sglang_deepprune.judges.permission import with_card
from sglang_deepprune.judging import JudgeWorker
from sglang_deepprune.types import JudgeResult, JudgeTask, Pair, Trace

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = "benchmarks|deploy|docs|kernels|patches|scripts|sglang_deepprune|tests"


def code(page: str) -> str:
    """A page's one Python block."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    return str(block)


@pytest.fixture
def example(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """The folder of the page's module, importable here and in a judge's process."""
    name, page = request.param
    (tmp_path / f"{name}.py").write_text(code(page))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    yield tmp_path
    sys.modules.pop(name, None)


judge_page = pytest.mark.parametrize("example", [("my_judge", "writing-a-judge.md")], indirect=True)
policy_page = pytest.mark.parametrize(
    "example", [("my_policy", "writing-a-policy.md")], indirect=True
)


def trace(sibling: int, text: str) -> Trace:
    return Trace(sibling, text, len(text.split()), "tokens")


def answer_of(worker: JudgeWorker, task: JudgeTask) -> JudgeResult:
    worker.start()
    assert worker.wait_loaded()
    worker.submit(task)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if done := worker.poll():
            return done[0]
        time.sleep(0.01)
    raise AssertionError("the judge gave no result")


@judge_page
def test_the_judge_of_the_page_clusters_in_a_process_of_its_own(example: Path):
    texts = ["so 12", "hm", "3 + 9 = 12", "or 13", "it is 12"]
    traces = tuple(trace(index, text) for index, text in enumerate(texts))
    task = JudgeTask(
        group_id="g", epoch=1, traces=traces, members=(), clusters=(), tau=0.5, max_clusters=8,
        num_compared=4, seed=0,
    )  # fmt: skip
    worker = JudgeWorker("python:my_judge:make", 10)
    try:
        result = answer_of(worker, task)
    finally:
        worker.close()
    assert result.error is None
    placed: dict[int, set[int]] = {}
    for one in result.assignments:
        placed.setdefault(one.cluster, set()).add(one.sibling)
    assert {0, 2, 4} in placed.values() and {3} in placed.values()
    # No number: no verdict with anybody, which is no reason to call it the same.
    assert not any(1 in members and len(members) > 1 for members in placed.values())


@judge_page
def test_the_judge_of_the_page_keeps_what_the_page_demands(example: Path):
    judge = load_judge("python:my_judge:make")
    pairs = [Pair(trace(0, a), trace(1, b)) for a in ("1", "2.5", "-") for b in ("1", "x 2.5", "")]
    scores = judge.score(pairs)
    alone = [float(judge.score([pair])[0]) for pair in pairs]
    swapped = judge.score([Pair(pair.right, pair.left) for pair in pairs])
    assert scores.shape == (9,) and scores.dtype == "float32"
    assert [repr(float(s)) for s in scores] == [repr(s) for s in alone]
    assert [repr(float(s)) for s in scores] == [repr(float(s)) for s in swapped]


@judge_page
def test_a_judge_of_your_own_is_measured_and_its_card_is_read(example: Path, capsys):
    lines = [
        f'{{"question_id": "{q}", "prompt": "How many?", "text": "{"so " * (3 + t)}{value}", '
        f'"num_tokens": {4 + t}, "answer": "{value}"}}'
        for q in range(6)
        for t, value in enumerate([q, q, q + 1, q, q, q + 1, q, q])
    ]
    traces, card = example / "traces.jsonl", example / "card.json"
    traces.write_text("\n".join(lines) + "\n")
    # As the page has it, with one cut.
    arguments = ["--judge", "python:my_judge:make", "--traces", str(traces), "--card", str(card)]
    assert evaluation.main([*arguments, "--cut", "tokens:500"]) == 0
    assert "within_auroc" in capsys.readouterr().out
    server = DeepPruneConfig(judge="python:my_judge:make", judge_card=str(card))
    assert with_card(server).judge == "python:my_judge:make"  # another judge's would be refused


@policy_page
def test_the_policy_of_the_page_stops_a_unanimous_group(
    example: Path, monkeypatch: pytest.MonkeyPatch
):
    def stopped_at_the_third_vote(answers: list[str]) -> list[int]:
        """Whom the third vote of a group of 512 stops, while the preset stops nobody."""
        coordinator = Coordinator(DeepPruneConfig(preset="collect"), lambda ids: answers[ids[0]])
        for index in range(512):
            coordinator.admit("g", index, 512, {}, 100)
        coordinator.observe({"g": {index: [0] for index in range(512)}})
        actions = [coordinator.vote("g", [End(index, [index], False)]) for index in range(3)]
        assert not actions[0] and not actions[1]
        assert all(isinstance(a, Stop) and a.state is State.DECIDED for a in actions[2])
        return [action.index for action in actions[2]]

    agreed, split = ["\\boxed{7}"] * 3, ["\\boxed{7}", "\\boxed{7}", "\\boxed{8}"]
    assert stopped_at_the_third_vote(agreed) == []
    monkeypatch.setattr(policy, "plan", policy.plan)  # put back afterwards
    module: ModuleType = __import__("my_policy")
    module.register()
    assert stopped_at_the_third_vote(agreed) == list(range(3, 512))
    assert stopped_at_the_third_vote(split) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_flags_commands_and_files_that_exist(page: Path):
    text = page.read_text()
    flags = {flag_of(spec) for spec in setting_fields()}
    assert not set(re.findall(r"--(?:enable-deepprune|deepprune-[a-z0-9-]+)\b", text)) - flags
    commands = re.findall(r"(?:^|`|/|python )sglang-deepprune ([a-z][a-z-]+)", text, re.MULTILINE)
    assert not set(commands) - set(cli.COMMANDS)
    presets = re.findall(r'(?:"preset": "|--deepprune-preset )([a-z]+)', text)
    assert not set(presets) - set(PRESETS)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert not set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE)) - set(targets)
    modules = re.findall(r"python -m ((?:benchmarks|sglang_deepprune|tests)[\w.]*)", text)
    files = {f"{one.replace('.', '/')}.py" for one in modules}
    files |= set(re.findall(rf"`((?:{FOLDERS})/[\w./-]+\.\w+)`", text))
    files.discard("kernels/__init__.py")  # which must not be there
    assert not {name for name in files if not (ROOT / name).is_file()}


def test_the_request_settings_on_the_pages_can_be_set():
    text = "\n".join(page.read_text() for page in PAGES)
    named = set()
    for body in re.findall(r'"deepprune": \{([^}]*)\}', text):
        named |= set(re.findall(r'"([a-z_0-9]+)":', body))
    assert "return" in named and "group" in named
    # A record in a reply has the same key; it is no request.
    record = {"answer", "winner", "votes", "reason", "clusters", "choices"}
    assert named - record <= set(request_fields()) | {"enabled", "group", "size"}


def test_the_presets_page_has_every_preset():
    text = (ROOT / "docs" / "presets.md").read_text()
    assert set(re.findall(r"\| `([a-z]+)` \|", text)) == set(PRESETS)


def test_what_runs_it_says_is_true():
    """Figures in docs/running.md that are constants of the code."""
    from sglang_deepprune import coordinator, judging

    text = (ROOT / "docs" / "running.md").read_text()
    worker = JudgeWorker("none", 1)
    assert f"off for good after {worker.max_restarts} restarts" in text
    assert f"after {judging._FIRST_BACKOFF_S:g} s, 1 s, 2 s" in text
    assert f"it has {judging.LOAD_LIMIT_S:g} s and a second for each 50 MB" in text
    assert (judging.DISK_BYTES_PER_S, judging.JIT_LIMIT_S) == (50e6, 600)
    assert f"| {judging._MAX_WAITING} windows wait" in text
    assert f"waits {coordinator.HOLD_LIMIT_S:g} s for" in text
    default = DeepPruneConfig()
    assert f"`--deepprune-judge-deadline-ms` ({default.judge_deadline_ms / 1000:g} s)" in text
    assert f"`--deepprune-group-timeout-s` ({default.group_timeout_s:g} s)" in text
    assert f"every `window` ({default.window}) decode steps" in text
    assert f"`base` ({default.base}) siblings" in text
