"""A second SGLang plugin, for studies and tests: sibling i of a known prompt emits script i.

Only the choice of the next token is scripted. Model forward, scheduler, radix cache, KV pool, our
hooks and the API are the real ones. The plugin works with deepprune on or off (then siblings are
told apart by their order of arrival), so both can be measured on the same traces.

What a probe (judge `probe`) answers can be scripted as well, through the logits that it sees.

`plugin_env` makes the folder that lets SGLang's `importlib.metadata` find it in every process.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.plugin_folder import plugin_path

FILE_VARIABLE = "DEEPPRUNE_SCRIPTS"
_MOST_RIDS = 16_384

_scripts: dict[tuple[int, ...], list[list[int]]] = {}
_arrivals: dict[tuple[int, ...], int] = defaultdict(int)
_by_rid: dict[str, tuple[int, list[int]]] = {}  # rid -> (prompt length, tokens to emit)

Reading = tuple[Sequence[int], float]  # what a probe decodes, and the logit of each token over 0
_probes: dict[tuple[int, ...], list[list[Reading]]] = {}  # prompt -> sibling -> probe after probe
_readings: dict[tuple[str, int], list[Reading]] = {}  # (group, sibling) -> what is left of them
_leans: dict[str, tuple[int, Reading]] = {}  # rid of a probe -> (its prompt's length, its reading)


def write_scripts(
    path: Path,
    scripts: dict[tuple[int, ...], Sequence[Sequence[int]]],
    probes: dict[tuple[int, ...], list[list[Reading]]] | None = None,
) -> None:
    """{prompt ids: one list of output ids a sibling}; each should end with the model's EOS.

    `probes`: {prompt ids: what the probes of each sibling answer, one after the other}.
    """
    body = [{"prompt": list(prompt), "tokens": [list(t) for t in tokens],
             "probes": (probes or {}).get(prompt, [])}
            for prompt, tokens in scripts.items()]  # fmt: skip
    path.write_text(json.dumps(body))


def plugin_env(scripts: Path, folder: Path) -> dict[str, str]:
    """Environment for a server that plays `scripts`; `folder` receives the plugin's metadata."""
    return {
        **plugin_path(folder, "scripted", "benchmarks.scripted:register"),
        FILE_VARIABLE: str(scripts),
    }


def register() -> None:
    """Entry point of the group `sglang.srt.plugins`."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for entry in json.loads(Path(os.environ[FILE_VARIABLE]).read_text()):
        _scripts[tuple(entry["prompt"])] = entry["tokens"]
        if entry.get("probes"):
            _probes[tuple(entry["prompt"])] = entry["probes"]
    HookRegistry.register(
        "sglang.srt.managers.scheduler.Scheduler._add_request_to_queue", note, HookType.AROUND
    )
    HookRegistry.register(
        "sglang.srt.model_executor.model_runner.ModelRunner.sample", play, HookType.AROUND
    )
    if _probes:
        HookRegistry.register(
            "sglang.srt.model_executor.model_runner.ModelRunner.forward", lean, HookType.AFTER
        )


def note(original: Callable[..., Any], self: Any, req: Any, is_retracted: bool = False) -> Any:
    """AROUND `_add_request_to_queue`: give the request its script. Warm-ups have none."""
    prompt = tuple(req.origin_input_ids)
    tokens = _scripts.get(prompt)
    if tokens and req.rid not in _by_rid and req.sampling_params.max_new_tokens:
        custom = req.sampling_params.custom_params
        tag = (custom.get("__deepprune") if isinstance(custom, dict) else None) or {}
        index = tag.get("index", -1)
        if index < 0:
            index = _arrivals[prompt]
            _arrivals[prompt] += 1
        _by_rid[req.rid] = (len(prompt), tokens[index % len(tokens)])
        if len(_by_rid) > _MOST_RIDS:  # of a sibling that was stopped nobody tells us
            del _by_rid[next(iter(_by_rid))]
        if prompt in _probes and index < len(_probes[prompt]):
            _readings[tag["gid"], index] = list(_probes[prompt][index])
    return original(self, req, is_retracted)


def lean(result: Any, self: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER `ModelRunner.forward`: a scripted probe's next token stands out by its logit."""
    logits = result.logits_output.next_token_logits
    for row, rid in enumerate(forward_batch.rids or ()):
        if not rid.startswith("__deepprune_probe_"):
            continue
        length = int(forward_batch.seq_lens[row])
        if rid not in _leans:
            group, index, _ = rid.removeprefix("__deepprune_probe_").rsplit("_", 2)
            left = _readings.get((group, int(index)))
            if not left:
                continue
            _leans[rid] = (length, left.pop(0) if len(left) > 1 else left[0])
        start, (tokens, logit) = _leans[rid]
        logits[row] = 0.0
        logits[row, tokens[min(length - start, len(tokens) - 1)]] = logit


def play(original: Callable[..., Any], self: Any, logits_output: Any, forward_batch: Any) -> Any:
    """AROUND `ModelRunner.sample`: the sequence length tells which token is due."""
    ids = original(self, logits_output, forward_batch)
    lengths = forward_batch.seq_lens
    for row, rid in enumerate(forward_batch.rids or ()):
        known = _by_rid.get(rid)
        if known is None:
            continue
        prompt_len, tokens = known
        due = int(lengths[row]) - prompt_len
        if due >= 0:
            ids[row] = tokens[min(due, len(tokens) - 1)]
        if due >= len(tokens):
            _by_rid.pop(rid, None)
    return ids
