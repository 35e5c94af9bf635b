"""What is counted, once: names, meanings and closed sets of label values. Knows no Prometheus.

A group is counted when it ends, from the record that its client reads, so that sums over replies
and counters are equal by construction, and generated and saved tokens are always of the same
groups. Everything else is counted where it happens. `Meter` counts nothing; the one that SGLang's
/metrics shows is in `patches/metrics.py`. No label ever holds a text of a request: each has an Enum
of its values here.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import Enum

from sglang_deepprune.types import GroupRecord

PREFIX = "sglang:deepprune_"


class Kind(str, Enum):
    """Prometheus' own types."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Reason(str, Enum):
    """Why a group ended: the head of its record's `reason`, up to the colon."""

    FINISHED = "finished"  # all siblings finished
    ABORTED = "aborted"  # some of its siblings, by a client, a time-out or an error of their own
    DECIDED = "decided"
    GAVE_UP = "gave_up"
    PRUNED = "pruned"  # by a judge's verdict; "redundant: ..." too
    OPEN_ENDED = "open_ended"
    WEIGHTS_CHANGED = "weights_changed"
    ABANDONED = "abandoned"  # a fault of ours: it went on as plain sampling, without a record
    OTHER = "other"

    @classmethod
    def of(cls, text: str) -> Reason:
        """The one that a record's `reason` stands for."""
        return _HEADS.get(text.partition(":")[0], cls.OTHER)


_HEADS = {
    "all siblings finished": Reason.FINISHED,
    "aborted": Reason.ABORTED,
    "decided": Reason.DECIDED,
    "gave up": Reason.GAVE_UP,
    "pruned": Reason.PRUNED,
    "redundant": Reason.PRUNED,
    "open-ended": Reason.OPEN_ENDED,
    "the weights changed": Reason.WEIGHTS_CHANGED,
}


class End(str, Enum):
    """The end states of a sibling, as `group.State` and a record's choices call them."""

    FINISHED = "finished"
    PRUNED = "pruned"
    DECIDED = "decided"
    NOT_STARTED = "not_started"
    ABORTED = "aborted"
    FAILED = "failed"


class Stopped(str, Enum):
    """Those of a sibling that was stopped while it ran."""

    PRUNED = "pruned"
    DECIDED = "decided"


class Who(str, Enum):
    """Who took a sibling off its row."""

    SGLANG = "sglang"
    DEEPPRUNE = "deepprune"


class Failure(str, Enum):
    """What may go wrong with a judge; also the key under which its keeper logs it once."""

    LOAD = "load"  # it raised while it loaded
    LOAD_TIME = "load_time"  # it was not ready in time
    LAUNCH = "launch"  # the machine gave it no process
    DEADLINE = "deadline"  # a batch took longer than --deepprune-judge-deadline-ms
    END = "end"  # its process ended
    REPLY = "reply"  # its reply was none
    TASK = "task"  # it raised for one task, which alone has no verdict
    QUEUE = "queue"  # too many tasks wait for it
    OFF = "off"  # given up on, after too many restarts in a row


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. `values`: all that its own label may say; none without a label."""

    name: str  # without the prefix
    kind: Kind
    meaning: str
    label: str = ""
    values: type[Enum] | None = None
    of_judge: bool = False  # exported only where a judge is configured
    buckets: tuple[float, ...] = ()

    @property
    def full_name(self) -> str:
        return PREFIX + self.name


LIVE_GROUPS = Metric(
    "live_groups", Kind.GAUGE, "Groups that have not ended, refreshed once a second."
)
HELD_SIBLINGS = Metric(
    "held_siblings", Kind.GAUGE,
    "Siblings that wait within their groups, without a row and without KV.",
)  # fmt: skip
JUDGE_UP = Metric(
    "judge_up", Kind.GAUGE, "1: the judge's process is loaded and answers; 0: it is loading, "
    "being restarted, or off.", of_judge=True,
)  # fmt: skip
GROUPS = Metric(
    "groups_total", Kind.COUNTER, "Groups that have ended, by the reason in their record.",
    "reason", Reason,
)  # fmt: skip
SIBLINGS = Metric(
    "siblings_total", Kind.COUNTER, "Siblings of ended groups, by their end state.", "state", End
)
GENERATED_TOKENS = Metric(
    "generated_tokens_total", Kind.COUNTER,
    "Output tokens of all siblings of ended groups, stopped ones included.",
)  # fmt: skip
SAVED_TOKENS = Metric(
    "saved_tokens_at_most_total", Kind.COUNTER,
    "Tokens that the stopped siblings of ended groups would have generated, had each run to its "
    "max_new_tokens: a bound, not a measurement.",
)  # fmt: skip
JUDGE_WINDOWS = Metric(
    "judge_windows_total", Kind.COUNTER, "Windows of ended groups handed to the judge.",
    of_judge=True,
)  # fmt: skip
JUDGE_PAIRS = Metric(
    "judge_pairs_total", Kind.COUNTER, "Pairs of traces that the judge scored for ended groups.",
    of_judge=True,
)  # fmt: skip
JUDGE_TOKENS = Metric(
    "judge_tokens_total", Kind.COUNTER, "Trace tokens in these pairs.", of_judge=True
)
PROBE_TOKENS = Metric(
    "probe_tokens_total", Kind.COUNTER,
    "Tokens that probes of ended groups prefilled and decoded (judge `probe`).", of_judge=True,
)  # fmt: skip
JUDGE_SECONDS = Metric(
    "judge_seconds_total", Kind.COUNTER, "Time that the judge took for ended groups.",
    of_judge=True,
)  # fmt: skip
VERDICT_LATENCY = Metric(
    "verdict_latency_seconds", Kind.HISTOGRAM,
    "From the step that hands a window to the judge to the step that acts on its verdict.",
    of_judge=True,
    buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0),
)  # fmt: skip
FREED_SLOTS = Metric(
    "freed_kv_slots_total", Kind.COUNTER,
    "KV slots that stopped siblings gave back to the allocator, in whole pages, by end state.",
    "state", Stopped,
)  # fmt: skip
EXTRAS_STARTED = Metric(
    "extras_started_total", Kind.COUNTER,
    "Siblings started beyond their group's claim, because rows were free.",
)  # fmt: skip
EXTRAS_YIELDED = Metric(
    "extras_yielded_total", Kind.COUNTER, "Rows that such siblings gave back to somebody else."
)
RETRACTIONS_AVOIDED = Metric(
    "retractions_avoided_total", Kind.COUNTER,
    "Rows freed (probes, extras, redundant or surplus siblings) so that SGLang need not retract.",
)  # fmt: skip
RETRACTIONS = Metric(
    "retractions_total", Kind.COUNTER,
    "Siblings that lost row and KV before their end: SGLang retracted, preempted or paused them, "
    "or deepprune took them off (yielded extras are among these).",
    "by", Who,
)  # fmt: skip
JUDGE_FAILURES = Metric(
    "judge_failures_total", Kind.COUNTER, "Faults of the judge; none of them stops anybody.",
    "kind", Failure, of_judge=True,
)  # fmt: skip
JUDGE_RESTARTS = Metric(
    "judge_restarts_total", Kind.COUNTER, "Times that the judge's process was started anew.",
    of_judge=True,
)  # fmt: skip
HOOK_ERRORS = Metric(
    "hook_errors_total", Kind.COUNTER,
    "Faults of deepprune's own; groups at hand went on as plain sampling. More than 0: read the "
    "log, and report it.",
)  # fmt: skip

ALL: tuple[Metric, ...] = (
    LIVE_GROUPS, HELD_SIBLINGS, GROUPS, SIBLINGS, GENERATED_TOKENS, SAVED_TOKENS, FREED_SLOTS,
    EXTRAS_STARTED, EXTRAS_YIELDED, RETRACTIONS_AVOIDED, RETRACTIONS, HOOK_ERRORS,
    JUDGE_UP, JUDGE_WINDOWS, JUDGE_PAIRS, JUDGE_TOKENS, PROBE_TOKENS, JUDGE_SECONDS,
    VERDICT_LATENCY, JUDGE_FAILURES, JUDGE_RESTARTS,
)  # fmt: skip


class Meter:
    """Where SGLang has no metrics: counts nothing. Subclasses never raise."""

    is_on = False

    def count(self, metric: Metric, amount: float = 1, value: Enum | None = None) -> None:
        """Add to a counter. `value`: of its label, for a metric that has one."""

    def observe(self, metric: Metric, amount: float) -> None:
        """One more observation of a histogram."""

    def set(self, metric: Metric, amount: float) -> None:
        """What a gauge shows."""


def count_group(meter: Meter, record: GroupRecord, *, is_probed: bool) -> None:
    """A group has ended, with this settled record. `is_probed`: its judge tokens are probes'."""
    meter.count(GROUPS, value=Reason.of(record.reason))
    for state, number in Counter(choice.state for choice in record.choices).items():
        meter.count(SIBLINGS, number, End(state))
    meter.count(GENERATED_TOKENS, record.generated_tokens)
    meter.count(SAVED_TOKENS, record.saved_tokens_at_most)
    meter.count(JUDGE_WINDOWS, record.windows)
    meter.count(JUDGE_PAIRS, record.judge_calls)
    meter.count(PROBE_TOKENS if is_probed else JUDGE_TOKENS, record.judge_tokens)
    meter.count(JUDGE_SECONDS, record.judge_ms / 1000)


def table() -> str:
    """All metrics as Markdown; docs/metrics.md holds it, and a test compares the two."""
    lines = ["| name | type | label | meaning |", "| --- | --- | --- | --- |"]
    for metric in ALL:
        label = ""
        if metric.values is not None:
            label = f"`{metric.label}`: {', '.join(one.value for one in metric.values)}"
        lines.append(f"| `{metric.full_name}` | {metric.kind.value} | {label} | {metric.meaning} |")
    return "\n".join(lines) + "\n"
