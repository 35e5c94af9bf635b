"""What a scheduler says of us in /server_info, under `internal_states[rank].deepprune`.

`sglang-deepprune doctor --url` reads it. Plain JSON values: it crosses SGLang's wire, which may be
typed msgpack. No text of any request, and not the token.
"""

from __future__ import annotations

from typing import Any

from sglang_deepprune import __version__
from sglang_deepprune.config import dest_of, setting_fields
from sglang_deepprune.judges.permission import sentence
from sglang_deepprune.patches.scheduler import Engine
from sglang_deepprune.patches.server_args import activated
from sglang_deepprune.probing import ProbeDesk


def describe(engine: Engine) -> dict[str, Any]:
    """Settings in force (YAML names) and health of this scheduler's plugin.

    `judge_state`: none, loading, ready or off; None on a rank that has no judge's process.
    """
    config = engine.config
    return {
        "version": __version__,
        "seams": len(activated()),
        "settings": {dest_of(spec): getattr(config, spec.name) for spec in setting_fields()},
        "judge": sentence(config),
        "judge_is_asked": config.is_judged,
        "judge_state": _judge_state(engine),
        "live_groups": len(engine.coordinator.runs),
        "faults": engine.faults,
    }


def _judge_state(engine: Engine) -> str | None:
    if engine.config.judge == "none":
        return "none"
    judge = engine.coordinator.judge
    worker = judge.worker if isinstance(judge, ProbeDesk) else judge
    if judge is None or worker is None:
        return None
    if engine.coordinator.is_idle:
        judge.poll()  # nobody does while no group lives; what it says is about none
    if worker.is_disabled:
        return "off"
    return "ready" if worker.is_ready else "loading"
