"""A second plugin that hooks what deepprune hooks: the parser, and each seam AROUND and AFTER.

It changes nothing. The first time that a hook runs it says so in the log, as a line of JSON. Its
parser hooks bring a flag of its own. When it hooks the seams is told by DEEPPRUNE_SECOND:

- `early`: at load, as SGLang wants it. Deepprune's hooks come with its flag, so around these.
- `late`: when the tokenizer manager or the scheduler is built, so around deepprune's.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from functools import partial, update_wrapper
from pathlib import Path
from typing import Any

from benchmarks.plugin_folder import plugin_path

WHEN = "DEEPPRUNE_SECOND"
SERVER_ARGS = "sglang.srt.server_args.ServerArgs"
BUILT = ("sglang.srt.managers.scheduler.Scheduler.__init__",
         "sglang.srt.managers.tokenizer_manager.TokenizerManager.__init__")  # fmt: skip

logger = logging.getLogger("second-plugin")
_said: set[tuple[str, str]] = set()


def plugin_env(folder: Path, when: str = "early") -> dict[str, str]:
    """Environment for a server with this plugin; `folder` receives the plugin's metadata."""
    return {**plugin_path(folder, "second", "tests.engine.second_plugin:register"), WHEN: when}


def register() -> None:
    """Entry point of the group `sglang.srt.plugins`."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(f"{SERVER_ARGS}.add_cli_args", add_flag, HookType.AFTER)
    HookRegistry.register(f"{SERVER_ARGS}.from_cli_args", take_flag, HookType.AROUND)
    if os.environ[WHEN] == "early":
        register_seams()
    else:
        for target in BUILT:
            HookRegistry.register(target, hook_seams_now, HookType.BEFORE)


def hook_seams_now(*args: Any, **kwargs: Any) -> None:
    """BEFORE a manager is built: deepprune is in place by then."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    if not any("send_output" in target for target in HookRegistry._hooks):
        register_seams()
        HookRegistry.apply_hooks()


def register_seams() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sglang_deepprune.patches import seams

    for seam in seams.rows(seams.TOKENIZER + seams.SCHEDULER):
        if seam.target not in BUILT:
            for kind, hook in ((HookType.AROUND, around), (HookType.AFTER, after)):
                mine = update_wrapper(partial(hook, seam.name), hook)
                HookRegistry.register(seam.target, mine, kind)


def around(name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    say(name, "around")
    return original(*args, **kwargs)


def after(name: str, result: Any, *args: Any, **kwargs: Any) -> None:
    say(name, "after")


def say(name: str, kind: str) -> None:
    if (name, kind) not in _said:
        _said.add((name, kind))
        logger.warning("second-plugin %s", json.dumps({"seam": name, "kind": kind}))


def add_flag(result: Any, parser: Any) -> None:
    """AFTER `ServerArgs.add_cli_args`."""
    parser.add_argument("--second-flag", type=int, default=0)


def take_flag(original: Callable[..., Any], cls: Any, args: Any) -> Any:
    """AROUND `ServerArgs.from_cli_args`."""
    server_args = original(cls, args)
    server_args._second_flag = args.second_flag
    return server_args
