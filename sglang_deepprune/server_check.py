"""A live server from outside: is the plugin on, in every scheduler and at the front, and as meant?

Reads /server_info, where each scheduler rank says what is in force (`patches/state.py`),
/model_info and /v1/models. That the front end carries the plugin shows in a reply alone, so one
request of two choices of one token each is sent, unless told not to. Needs no SGLang here.
"""

from __future__ import annotations

import json
import os
import shlex
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from sglang_deepprune.config import DeepPruneConfig, dest_of, setting_fields
from sglang_deepprune.findings import Finding, State

KEY = "deepprune"
_ENABLE = "--enable-deepprune"
_REQUEST = {
    "text": "1 + 1 =",
    "sampling_params": {
        "n": 2, "max_new_tokens": 1, "temperature": 1.0, "custom_params": {KEY: True},
    },
}  # fmt: skip


@dataclass(slots=True)
class Look:
    """What was found, and what the server says of itself (for `--json`)."""

    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def note(self, check: str, state: State, sentence: str) -> None:
        self.findings.append(Finding(check, state, sentence))


class _NoAnswer(RuntimeError):
    """One sentence; `status`: of HTTP, 0 where nobody answered."""

    def __init__(self, sentence: str, status: int = 0):
        self.status = status
        super().__init__(sentence)


def look(
    url: str,
    version_finding: Callable[[str], Finding],
    untested: Callable[[Any], list[str]],
    *,
    sends: bool = True,
    timeout_s: float = 30.0,
) -> Look:
    """Everything that can be told about the server at `url` (without /v1).

    Parameters
    ----------
    version_finding : Callable
        What to say about a version of SGLang.
    untested : Callable
        The modes that nobody has tried, out of SGLang's settings as attributes.
    sends : bool
        Whether a request may be sent.
    timeout_s : float
        Seconds for each answer.
    """
    found = Look()
    base = url.rstrip("/").removesuffix("/v1")
    try:
        info = _first(base, ("/server_info", "/get_server_info"), timeout_s)
    except _NoAnswer as error:
        found.note("server", "fault", _why_no_server(base, error))
        return found
    if not isinstance(info, dict) or "version" not in info:
        found.note("server", "fault", f"what answers at {base} is no SGLang server; mind the port")
        return found
    found.note("server", "ok", f"an SGLang server answers at {base}")
    found.findings.append(version_finding(str(info["version"])))
    found.facts["sglang"] = info["version"]  # not the launch command: it may hold keys
    _front_end(found, info)
    _model(found, base, timeout_s)
    is_on = _schedulers(found, info)
    for one in untested(SimpleNamespace(**info)):
        found.note("mode", "warning", f"not tested with the plugin: {one}")
    if sends and found.facts.get("is_generation", True):
        _request(found, base, timeout_s, is_on=is_on)
    return found


def _front_end(found: Look, info: Mapping[str, Any]) -> None:
    front = info.get("frontend", "python")
    if front != "python":
        found.note(
            "front-end", "fault",
            f"SGLang's {front} front end has none of our Python hooks; start the server without "
            f"SGLANG_RUST_SERVER",
        )  # fmt: skip


def _model(found: Look, base: str, timeout_s: float) -> None:
    try:
        model = _first(base, ("/model_info", "/get_model_info"), timeout_s)
        served = [one["id"] for one in _call(base, "/v1/models", None, timeout_s)["data"]]
    except (_NoAnswer, KeyError, TypeError) as error:
        found.note("model", "warning", f"the server does not say what it serves: {error}")
        return
    found.facts |= {
        "model": model.get("model_path"), "served": served,
        "is_generation": bool(model.get("is_generation", True)),
    }  # fmt: skip
    if not found.facts["is_generation"]:
        found.note("model", "fault", "an embedding model has no siblings; serve one that generates")
    else:
        found.note(
            "model", "ok", f"serves {', '.join(served)} (weights {model.get('weight_version')})"
        )


def _schedulers(found: Look, info: Mapping[str, Any]) -> bool | None:
    """What each rank says of the plugin. None: whether it is on is not known from here."""
    states = [state for state in info.get("internal_states") or [] if isinstance(state, dict)]
    ours = [state[KEY] for state in states if isinstance(state.get(KEY), dict)]
    if not ours:
        flags = _words(info.get("launch_command"))
        if _ENABLE in flags or "--config" in flags:
            found.note(
                "plugin", "warning",
                f"no scheduler says a word of the plugin, though the server was launched with "
                f"{_ENABLE if _ENABLE in flags else '--config'}; another version of it may run",
            )  # fmt: skip
            return None
        found.note(
            "plugin", "fault",
            f"the plugin is off on this server; start it with {_ENABLE}, where `sglang-deepprune "
            f"doctor` finds no fault",
        )  # fmt: skip
        return False
    if len(ours) < len(states):
        found.note(
            "plugin", "fault",
            f"only {len(ours)} of {len(states)} scheduler ranks carry the plugin; restart the "
            f"server",
        )  # fmt: skip
    first = ours[0]
    found.facts |= {"plugin": first.get("version"), "settings": first.get("settings"),
                    "ranks": ours}  # fmt: skip
    ranks = "" if len(states) == 1 else f" in {len(ours)} of {len(states)} ranks"
    found.note(
        "plugin", "ok",
        f"sglang-deepprune {first.get('version')} is on{ranks}, {first.get('seams')} seams each, "
        f"{sum(one.get('live_groups', 0) for one in ours)} groups live",
    )  # fmt: skip
    settings = first.get("settings") or {}
    found.note("settings", "ok", _changed(settings) or "all at their defaults")
    _judge(found, ours)
    kinds = sorted({kind for one in ours for kind in one.get("faults") or []})
    if kinds:
        found.note(
            "health", "warning",
            f"the plugin met errors of its own since the start ({'; '.join(kinds)}), whose groups "
            f"ran on as plain sampling; the server's log has each",
        )  # fmt: skip
    return True


def _judge(found: Look, ours: list[dict[str, Any]]) -> None:
    states = {one.get("judge_state") for one in ours} - {None}
    sentence = str(ours[0].get("judge"))
    if "off" in states:
        asked = any(one.get("judge_is_asked") for one in ours)
        found.note(
            "judge", "fault" if asked else "warning",
            f"{sentence}, but it is off after failures in a row and gives no verdict any more; the "
            f"server's log says why, and a restart tries again",
        )  # fmt: skip
    elif "loading" in states:
        found.note("judge", "warning", f"{sentence}; it is still loading, or being restarted")
    else:
        found.note("judge", "ok", sentence)


def _changed(settings: Mapping[str, Any]) -> str:
    """Settings that are not at their defaults, as flags would have them."""
    default = DeepPruneConfig(enable=True)
    known = {dest_of(spec): getattr(default, spec.name) for spec in setting_fields()}
    return ", ".join(
        f"{name.removeprefix('deepprune_')}={value}"
        for name, value in settings.items()
        if name not in known or known[name] != value
    )


def _request(found: Look, base: str, timeout_s: float, *, is_on: bool | None) -> None:
    """Two choices of one token: the reply has a record if the front end carries the plugin."""
    try:
        reply = _call(base, "/generate", _REQUEST, timeout_s)
        groups = [(one["meta_info"].get(KEY) or {}).get("group") for one in reply]
        group = next((one for one in groups if one), None)
    except _NoAnswer as error:
        found.note("request", "warning", f"a request of two choices had no reply: {error}")
        return
    except (KeyError, TypeError, AttributeError):
        found.note("request", "fault", "what /generate answers is no reply of SGLang's")
        return
    found.facts["record"] = group
    if group is None:
        if is_on is not False:  # else it has been said
            found.note(
                "request", "fault",
                "a request of two choices came back without a record: the front end does not carry "
                "the plugin; reach the server itself, not a proxy, or restart it",
            )  # fmt: skip
        return
    if not group.get("active"):
        found.note("request", "fault", f"a request of two choices was no group: {group['reason']}")
        return
    found.note(
        "request", "ok",
        f"a request of two choices came back as a group, preset {group['preset']}",
    )  # fmt: skip


def _words(command: Any) -> list[str]:
    try:
        return shlex.split(str(command or ""))
    except ValueError:  # an Engine call with a quote in it
        return str(command).split()


def _why_no_server(base: str, error: _NoAnswer) -> str:
    if error.status in (401, 403):
        return f"{base} wants a key ({error}); set OPENAI_API_KEY"
    if error.status == 404:
        return f"what answers at {base} is no SGLang server: it has no /server_info; mind the port"
    return f"no server answers at {base} ({error}); start one, or mind host and port"


def _first(base: str, paths: tuple[str, ...], timeout_s: float) -> Any:
    """The answer of the first path that is there: names have changed."""
    for path in paths[:-1]:
        try:
            return _call(base, path, None, timeout_s)
        except _NoAnswer as error:
            if error.status != 404:
                raise
    return _call(base, paths[-1], None, timeout_s)


def _call(base: str, path: str, body: Any, timeout_s: float) -> Any:
    """GET, or POST where there is a body; JSON. Raises `_NoAnswer`."""
    headers = {"Content-Type": "application/json"}
    key = os.environ.get("OPENAI_API_KEY")
    if key:
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(base + path, data, headers)
        with urllib.request.urlopen(request, timeout=timeout_s) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        raise _NoAnswer(f"{path}: HTTP {error.code}", error.code) from error
    except urllib.error.URLError as error:
        raise _NoAnswer(f"{error.reason}") from error
    except (OSError, ValueError) as error:  # time-outs; no JSON, or no URL
        raise _NoAnswer(f"{path}: {type(error).__name__}: {error}") from error
