"""Every setting, once: one field is one server flag, one docs row and, where its scope allows, one
request override under `custom_params.deepprune`.

Owns names, ranges and error sentences. Nothing else parses settings. A request can never name a
path, a URL or a judge's code: those fields have the scope `server`. Presets follow the measured
table of docs/design.md; a preset fills only fields that the caller left unset (None).
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, Literal, NamedTuple

CUTS = ("tokens", "words")
RETURNS = ("all", "survivors", "vote")
FLAG_PREFIX = "deepprune"

MOST_CHARS = 256  # of a text in a request
MOST_CUT_TOKENS = 16_384  # about 8 ms to decode, in one step of the engine
_WORD = re.compile(r"[\w.:+-]{1,40}", re.ASCII)

ATTENTIONS = ("triton", "flashinfer")
ADMISSIONS = ("lazy", "eager")
COMPARISONS = ("full", "sequential", "exclusive")


class Preset(NamedTuple):
    """What a preset says where the caller says nothing (docs/design.md has the measurements)."""

    admission: str
    eps: float  # 0: never stop for a decided vote
    give_up_votes: int = 0
    prunes: bool = False


_PRESETS = {
    "balanced": Preset("lazy", 0.05),
    "faithful": Preset("lazy", 0.01),
    "economy": Preset("lazy", 0.05, give_up_votes=16),
    "latency": Preset("eager", 0.05),
    "paper": Preset("eager", 0.0, prunes=True),
    "collect": Preset("eager", 0.0),
}
PRESETS = tuple(_PRESETS)

# "derived": no flag and no request sets it; the server works it out at its start.
Scope = Literal["server", "request", "derived"]


class ConfigError(ValueError):
    """A setting that cannot be used: names the field, what was wrong and what is allowed."""

    def __init__(self, name: str, reason: str):
        self.field = name
        self.reason = reason
        super().__init__(f"deepprune.{name}: {reason}")


def shown(value: Any) -> str:
    """How an error names a value: a number as it is, all else by its kind.

    Errors go into SGLang's log, where no text of a request belongs, and into a JSON reply, which
    takes neither half a surrogate pair nor a number of a million digits. Never raises.
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        size = value.bit_length()
        return str(value) if size <= 64 else f"a whole number of {size} bits"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return f"a text of {len(value)} characters"
    if isinstance(value, dict):
        return "an object"
    return "a list" if isinstance(value, list) else f"a {type(value).__name__}"


def checked_text(name: str, value: Any) -> str:
    """A text that a request may send, or ConfigError: short, and whole characters alone, because
    it goes on to other processes as UTF-8."""
    if not isinstance(value, str):
        raise ConfigError(name, f"expected a text, got {shown(value)}")
    if len(value) > MOST_CHARS or any("\ud800" <= c <= "\udfff" for c in value):
        raise ConfigError(name, f"expected a text of at most {MOST_CHARS} whole characters")
    return value


def _setting(
    default: Any,
    help: str,
    *,
    scope: Scope = "request",
    choices: tuple[str, ...] | None = None,
    low: float | None = None,
    high: float | None = None,
    kind: type = str,
    key: str | None = None,
) -> Any:
    """One field with what flags, docs and checks need to know about it."""
    return field(
        default=default,
        metadata={
            "help": help,
            "scope": scope,
            "choices": choices,
            "low": low,
            "high": high,
            "kind": kind,
            "key": key,
        },
    )


@dataclass(frozen=True, slots=True)
class DeepPruneConfig:
    """Settings of a server, or of one request after `override`. None means: the preset decides."""

    enable: bool = _setting(
        False, "Group the siblings of n>1 requests, stop redundant ones, vote.", scope="server",
        kind=bool,
    )  # fmt: skip
    default: str = _setting(
        "on", "Which n>1 requests are groups: all ('on'), or those that ask for it ('opt-in').",
        scope="server", choices=("on", "opt-in"),
    )  # fmt: skip
    preset: str = _setting("balanced", "Named policy: see the presets table.", choices=PRESETS)
    admission: str | None = _setting(
        None, "Start the siblings as votes ask for them ('lazy'), or all at once ('eager').",
        choices=ADMISSIONS,
    )  # fmt: skip
    base: int = _setting(
        4, "Siblings that a lazy group has running at once; each undecided vote starts one more.",
        low=1, high=4096, kind=int,
    )  # fmt: skip
    widen: float = _setting(
        0.5, "Share of `base` that a lazy group gets on top a mean trace length of age, after "
        "three.",
        low=0.0, high=64.0, kind=float,
    )  # fmt: skip
    fill: float = _setting(
        0.25, "Largest growth of a decode step for which free rows are filled beyond what the "
        "votes ask for, by the measured step times; 0: never fill.",
        scope="server", low=0.0, high=100.0, kind=float,
    )  # fmt: skip
    window: int = _setting(
        32, "W: decode steps between two looks at a group (paper, section 4.2).",
        low=1, high=4096, kind=int,
    )  # fmt: skip
    cut: str | None = _setting(
        None, "What a judge reads of a trace: its first reasoning 'words', or its first 'tokens'. "
        "Preset `paper`: words; the others: tokens.", choices=CUTS,
    )  # fmt: skip
    cut_words: int = _setting(
        25, "k: reasoning words that end the cut 'words'.", low=1, high=1000, kind=int
    )
    cut_tokens: int = _setting(
        500, "k: tokens that end the cut 'tokens'.", low=1, high=MOST_CUT_TOKENS, kind=int
    )
    cut_max_tokens: int = _setting(
        4096, "Bound on the cut 'words' for traces that hold few reasoning words.",
        low=1, high=MOST_CUT_TOKENS, kind=int,
    )  # fmt: skip
    reasoning_words: str = _setting(
        "", "Comma-separated reasoning words to count beside the built-in list.", scope="server"
    )
    tau: float | None = _setting(
        None, "Similarity above which a trace joins a cluster; unset: what the judge's card says "
        "at this cut, 0.5 without a card and under `paper`.", low=0.0, high=1.0, kind=float,
    )  # fmt: skip
    tau_step: float = _setting(
        0.0, "How far one merge that turned out right or wrong moves a group's tau, within 0.2 of "
        "where it began; 0: not at all.", low=0.0, high=1.0, kind=float,
    )  # fmt: skip
    k: int = _setting(32, "K: most clusters of a group.", low=1, high=4096, kind=int)
    k1: int = _setting(10, "K1: members drawn for sim(t_i, c_j).", low=1, high=4096, kind=int)
    compare: str = _setting(
        "full", "Ask about all K1 members of every cluster (the paper), or one after the other "
        "until the placement is clear ('sequential'), soonest if clusters exclude each other "
        "('exclusive').", choices=COMPARISONS,
    )  # fmt: skip
    compare_error: float = _setting(
        0.05, "Of the latter two: chance that a mean lies outside its bounds, approximately; 0: "
        "certainty.",
        low=0.0, high=0.5, kind=float,
    )  # fmt: skip
    k2: int | None = _setting(
        None, "K2: traces of the largest cluster that run to their end; 0: min(20, ceil(n/4)). "
        "Preset `paper`: 20; the others, where a card lets the judge prune: 0.",
        low=0, high=4096, kind=int,
    )  # fmt: skip
    k3: int = _setting(
        0, "K3: traces that run on when all clusters are singletons; 0: as K2.",
        low=0, high=4096, kind=int,
    )  # fmt: skip
    eps: float | None = _setting(
        None, "Modelled chance that the runner-up gets strictly more votes, below which a vote "
        "counts as decided; ties and several rivals at once are left out. 0: never.",
        low=0.0, high=0.5, kind=float,
    )  # fmt: skip
    give_up_votes: int | None = _setting(
        None, "Votes after which a group whose leader has less than `give_up_share` of them stops; "
        "0: never.", low=0, high=4096, kind=int,
    )  # fmt: skip
    give_up_share: float = _setting(0.3, "See `give_up_votes`.", low=0.0, high=1.0, kind=float)
    min_votes: int = _setting(
        3, "Finished siblings before a vote can be decided.", low=1, high=4096, kind=int
    )
    judge: str = _setting(
        "similarity", "Judge of trace pairs, NAME[:PATH]: similarity, trigrams, "
        "encoder[:PATH], belief[:PATH], llm:PATH, remote:URL, probe[:TEXT] (the serving model), "
        "probe-server:URL (recorded traces), oracle:PATH, "
        "python:PKG.MOD:FACTORY (yours), none.",
        scope="server",
    )  # fmt: skip
    judge_device: str = _setting(
        "cpu", "Where a judge's model runs: 'cpu' or 'cuda:N', counted among the GPUs that the "
        "server sees, whose memory it takes before the server sizes its KV pool.", scope="server",
    )  # fmt: skip
    judge_mem: int = _setting(
        0, "MiB that a language model judge may take of its device, weights included; 0: on a GPU "
        "what it needs, on a CPU no bound but that of its prefix cache (512 MiB).",
        scope="server", low=0, high=1 << 20, kind=int,
    )  # fmt: skip
    judge_attention: str = _setting(
        "triton", "Attention of a language model judge on a GPU: this project's kernel, or "
        "FlashInfer's ragged one where it is installed.", scope="server", choices=ATTENTIONS,
    )  # fmt: skip
    judge_card: str = _setting(
        "", "What `eval-judge --card` wrote about this judge; unset: the card beside its weights. "
        "Outside `paper` a judge prunes only where its card allows it.", scope="server",
    )  # fmt: skip
    judge_deadline_ms: int = _setting(
        10_000,
        "Milliseconds that a judge has for a batch: at 0.9 of them what still asks has no verdict; "
        "a process that is silent beyond them is started anew.",
        scope="server", low=1, high=600_000, kind=int,
    )  # fmt: skip
    group_timeout_s: float = _setting(
        60.0, "Seconds after which a client-side group stops waiting for further members.",
        scope="server", low=0.1, high=86_400.0, kind=float,
    )  # fmt: skip
    seed: int = _setting(
        0, "Seed of the members drawn for sim(t_i, c_j).", low=0, high=2**31 - 1, kind=int
    )
    answer_field: str = _setting(
        "", "JSON field that holds the answer of a structured output, which is then read whole, to "
        "32,768 characters; a longer one abstains.", kind=str
    )  # fmt: skip
    returns: str = _setting(
        "all", "Choices that come back: all, those that finished, or the vote's winner alone.",
        choices=RETURNS, key="return",
    )  # fmt: skip
    log_steps: bool = _setting(
        False, "Log the time spent in hooks and the pool's numbers at each verdict.",
        scope="server", kind=bool,
    )  # fmt: skip

    card_taus: tuple[tuple[str, float], ...] = _setting(
        (), "Cuts at which the judge's card lets it prune, each with its calibrated tau.",
        scope="derived", kind=tuple,
    )  # fmt: skip
    judge_gpu: str = _setting(
        "", "`judge_device` as the main process saw it: SGLang may show a scheduler fewer GPUs.",
        scope="derived",
    )  # fmt: skip

    def __post_init__(self) -> None:
        for spec in setting_fields():
            value = getattr(self, spec.name)
            if value is None and spec.default is not None:  # an Engine keyword that was left open
                object.__setattr__(self, spec.name, spec.default)
            elif value is not None:
                object.__setattr__(self, spec.name, _checked(spec, value))
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.judge_device):
            raise ConfigError("judge_device", f"expected cpu or cuda:N, got {self.judge_device!r}")

    @property
    def cut_kind(self) -> str:
        """'words' or 'tokens', after the preset had its say."""
        return self.cut or ("words" if self.preset == "paper" else "tokens")

    @property
    def cut_name(self) -> str:
        """As evaluation and cards name it."""
        return f"{self.cut_kind}:{self.cut_words if self.cut_kind == 'words' else self.cut_tokens}"

    @property
    def merge_tau(self) -> float:
        """tau, after the judge's card had its say."""
        if self.tau is not None:
            return self.tau
        if _PRESETS[self.preset].prunes:
            return 0.5  # the paper's
        return dict(self.card_taus).get(self.cut_name, 0.5)

    @property
    def is_lazy(self) -> bool:
        return (self.admission or _PRESETS[self.preset].admission) == "lazy"

    @property
    def decided_eps(self) -> float:
        """eps, after the preset had its say; 0: a decided vote stops nobody."""
        return _PRESETS[self.preset].eps if self.eps is None else self.eps

    @property
    def votes_to_give_up(self) -> int:
        """0: never."""
        given = self.give_up_votes
        return _PRESETS[self.preset].give_up_votes if given is None else given

    @property
    def prunes_by_judge(self) -> bool:
        """`paper` always lets the judge prune, `collect` never; the others where a card allows."""
        if _PRESETS[self.preset].prunes:
            return True
        if not self.card_taus or self.preset == "collect":  # asked at every vote and window
            return False
        return self.cut_name in dict(self.card_taus)

    @property
    def is_judged(self) -> bool:
        """Whether traces are handed to a judge: only where its verdicts may stop anybody."""
        return self.judge != "none" and self.prunes_by_judge

    def kept_of_largest(self, size: int) -> int:
        """K2 for a group of `size` siblings."""
        if self.k2 is None and _PRESETS[self.preset].prunes:
            return 20
        return self.k2 or min(20, math.ceil(size / 4))

    def kept_of_singletons(self, size: int) -> int:
        """K3; the paper gives no value, so K2."""
        return self.k3 or self.kept_of_largest(size)

    def override(self, settings: Mapping[str, Any]) -> DeepPruneConfig:
        """This config with a request's settings. Raises ConfigError naming the field."""
        known = request_fields()
        changed = copy.copy(self)
        for name, value in settings.items():
            if name not in known:
                raise _unknown(name)
            spec = known[name]
            if value is None and spec.default is not None:
                raise ConfigError(name, "expected a value, got null")
            if value is not None:
                value = _checked(spec, value)
            object.__setattr__(changed, spec.name, value)  # ours alone so far
        return changed

    def request_values(self) -> dict[str, Any]:
        """The request-scope settings as scalars, for the wire; unset ones are left out."""
        return {
            key: getattr(self, spec.name)
            for key, spec in request_fields().items()
            if getattr(self, spec.name) is not None
        }


def setting_fields() -> tuple[dataclasses.Field[Any], ...]:
    """The fields that a user sets; each is one flag."""
    return tuple(spec for spec in fields(DeepPruneConfig) if spec.metadata["scope"] != "derived")


def key_of(spec: dataclasses.Field[Any]) -> str:
    """The name that users write for a field."""
    return spec.metadata["key"] or spec.name


@cache
def request_fields() -> dict[str, dataclasses.Field[Any]]:
    """User-facing name -> field, for the settings that a request may override."""
    return {key_of(spec): spec for spec in setting_fields() if spec.metadata["scope"] == "request"}


def flag_of(spec: dataclasses.Field[Any]) -> str:
    """The command line flag of a field."""
    name = key_of(spec).replace("_", "-")
    return f"--{name}-{FLAG_PREFIX}" if spec.name == "enable" else f"--{FLAG_PREFIX}-{name}"


def dest_of(spec: dataclasses.Field[Any]) -> str:
    """The argparse destination, which is also the YAML key and the Engine keyword."""
    return flag_of(spec)[2:].replace("-", "_")


def settings_table() -> str:
    """All settings as Markdown; docs/settings.md holds it, and a test compares the two."""
    lines = [
        "| flag | in a request | default | range | what it does |",
        "| --- | --- | --- | --- | --- |",
    ]
    for spec in setting_fields():
        low, high = spec.metadata["low"], spec.metadata["high"]
        choices = spec.metadata["choices"]
        bounds = ", ".join(choices) if choices else "" if low is None else _range(low, high)
        name = f"`{key_of(spec)}`" if spec.metadata["scope"] == "request" else "-"
        default = "by preset" if spec.default is None else f"`{spec.default}`"
        help = spec.metadata["help"].replace("|", "\\|")
        lines.append(f"| `{flag_of(spec)}` | {name} | {default} | {bounds} | {help} |")
    return "\n".join(lines) + "\n"


def _unknown(name: object) -> ConfigError:
    """For a setting that no request can make."""
    allowed = ", ".join(sorted(request_fields()))
    if not isinstance(name, str) or not _WORD.fullmatch(name):
        reason = f"unknown setting ({shown(name)}); a request may set {allowed}"
        return ConfigError("custom_params", reason)
    is_known = name in {key_of(spec) for spec in setting_fields()}
    why = "can only be set at server start" if is_known else "unknown setting"
    return ConfigError(name, f"{why}; a request may set {allowed}")


def _checked(spec: dataclasses.Field[Any], value: Any) -> Any:
    """The value in its field's type, or ConfigError."""
    kind, name = spec.metadata["kind"], key_of(spec)
    if kind is bool:
        if not isinstance(value, bool):
            raise ConfigError(name, f"expected true or false, got {shown(value)}")
        return value
    if kind is int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(name, f"expected a whole number, got {shown(value)}")
    elif kind is float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
            raise ConfigError(name, f"expected a number, got {shown(value)}")
    elif not isinstance(value, str):
        raise ConfigError(name, f"expected a text, got {shown(value)}")
    choices = spec.metadata["choices"]
    if choices and value not in choices:
        raise ConfigError(name, f"expected one of {', '.join(choices)}, got {shown(value)}")
    low, high = spec.metadata["low"], spec.metadata["high"]
    # Before it becomes a float: a whole number may be too large for one.
    if low is not None and not low <= value <= high:
        raise ConfigError(name, f"expected {_range(low, high)}, got {shown(value)}")
    if kind is str and not choices and spec.metadata["scope"] == "request":
        return checked_text(name, value)
    return float(value) if kind is float else value


def _range(low: float, high: float) -> str:
    return " to ".join(f"{one:.0f}" if one >= 1e6 else f"{one:g}" for one in (low, high))
