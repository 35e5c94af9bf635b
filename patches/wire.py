"""What a sibling carries from the tokenizer side to the scheduler, and back on its finish reason.

Down: `sampling_params.custom_params["__deepprune"]`, a dict of scalars, because that is what
SGLang's typed msgpack wire lets through in every version, on every endpoint. Up: one JSON string
under `KEY` in the finish reason's `to_json()`, typed `Dict[str, str | int | list[int]]` since
0.5.15, which also survives streaming, retraction and several tokenizer workers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sglang_deepprune.config import ConfigError, DeepPruneConfig, checked_text, shown

TAG = "__deepprune"  # ours, on the wire
KEY = "deepprune"  # the users': request settings, and the reply's extension
MOST_SIBLINGS = 4096
_MOST_SETTINGS = 64  # names in one request: more than there are

_IDENTITY = ("gid", "index", "size", "rid", "token")


@dataclass(frozen=True, slots=True)
class Ask:
    """What one request says under `custom_params.deepprune`."""

    is_wanted: bool
    is_explicit: bool
    settings: dict[str, Any] = field(default_factory=dict)  # as the user wrote them, checked
    group: str = ""
    size: int = 0
    returns: str = "all"


def read_ask(config: DeepPruneConfig, custom_params: Any) -> Ask:
    """Check a request's settings. Raises ConfigError naming the field (a 400 for the client).

    `custom_params` is whatever the client sent: SGLang does not look at it, and passes it on.
    """
    asked = custom_params.get(KEY) if isinstance(custom_params, Mapping) else None
    if asked is None:
        return Ask(is_wanted=config.default == "on", is_explicit=False, returns=config.returns)
    if isinstance(asked, bool):
        return Ask(is_wanted=asked, is_explicit=True, returns=config.returns)
    if not isinstance(asked, Mapping):
        reason = f"{KEY} must be an object, true or false, got {shown(asked)}"
        raise ConfigError("custom_params", reason)
    if len(asked) > _MOST_SETTINGS:
        raise ConfigError("custom_params", f"{len(asked)} settings; there are not so many")
    settings = dict(asked)
    enabled = settings.pop("enabled", True)
    if not isinstance(enabled, bool):
        raise ConfigError("enabled", f"expected true or false, got {shown(enabled)}")
    group = checked_text("group", settings.pop("group", ""))
    size = settings.pop("size", 0)
    if isinstance(size, float) and size.is_integer():  # as other whole numbers
        size = int(size)
    if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= MOST_SIBLINGS:
        raise ConfigError("size", f"expected 0 (open-ended) to {MOST_SIBLINGS}, got {shown(size)}")
    if size and not group:
        raise ConfigError("size", "names the members of a `group`; an n>1 request has n of them")
    merged = config.override(settings)
    return Ask(enabled, True, settings, group, size, merged.returns)


def tag(
    group_id: str, index: int, size: int, settings: Mapping[str, Any], *, rid: str, token: str
) -> dict[str, Any]:
    """The wire form of one sibling's key and settings."""
    return {
        **settings, "gid": group_id, "index": index, "size": size, "rid": rid, "token": token
    }  # fmt: skip


def is_named(custom_params: Any) -> bool:
    """Whether a request holds a key of ours, whoever wrote it."""
    return isinstance(custom_params, Mapping) and (KEY in custom_params or TAG in custom_params)


def is_ours(custom_params: Any, token: str) -> bool:
    """Whether a request carries a tag of this server. A client may write anything in there."""
    tagged = custom_params.get(TAG) if isinstance(custom_params, Mapping) else None
    return isinstance(tagged, Mapping) and tagged.get("token") == token


def settings_of(tagged: Mapping[str, Any]) -> dict[str, Any]:
    """The request's settings out of a tag."""
    return {name: value for name, value in tagged.items() if name not in _IDENTITY}


def with_tag(custom_params: Any, tagged: dict[str, Any] | None) -> Any:
    """The caller's own keys untouched, ours replaced by the tag; None where nothing is left."""
    own = custom_params if isinstance(custom_params, Mapping) else {}
    kept = {name: value for name, value in own.items() if name not in (KEY, TAG)}
    if tagged is not None:
        kept[TAG] = tagged
    return kept or None
