"""From the command line, `--config` YAML or `Engine(...)` keywords to hooks in every process.

Owns the flags, the refusals at start and the carrier. SGLang loads plugins in the main and the
scheduler processes, but not in tokenizer workers, nor (before 0.5.23) in the detokenizer and the
DP controller. All of them unpickle `server_args`, so our settings ride there as one object whose
unpickling activates the plugin (`Carrier`). Follows `ServerArgs.add_cli_args`, `from_cli_args`
and `Engine.server_args_class`.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import secrets
import sys
from collections.abc import Callable
from typing import Any

from packaging.version import Version

from sglang_deepprune.config import ConfigError, DeepPruneConfig, dest_of, flag_of, setting_fields
from sglang_deepprune.judges import check_judge
from sglang_deepprune.judges.attention import check_attention
from sglang_deepprune.judges.gpu import (
    BALANCE_CHECK,
    ServerGpus,
    check_neighbours,
    visible_gpu,
)
from sglang_deepprune.judges.memory import check_memory
from sglang_deepprune.judges.permission import with_card
from sglang_deepprune.patches import seams, support
from sglang_deepprune.probing import is_probe

logger = logging.getLogger(__name__)

UNTESTED = (
    "deepprune has not been run with %s yet (docs/modes.md); --deepprune-default opt-in leaves all "
    "requests alone that do not ask for it"
)
ATTRIBUTE = "_deepprune"  # underscore names stay writable on every ServerArgs since 0.5.15
_SCHEDULER_MODULE = "sglang.srt.managers.scheduler"
_FRONT_MODULES = ("sglang.srt.entrypoints.http_server", "sglang.srt.entrypoints.engine")
_ENGINE_MODULE = "sglang.srt.entrypoints.engine"


class Carrier:
    """Our settings on `server_args`; unpickling one activates the plugin in that process.

    `token` is drawn at each start and shared by the server's processes alone: a tag that carries it
    was made by our tokenizer side and not by a client.
    """

    def __init__(self, config: DeepPruneConfig, token: str = ""):
        self.config = config
        self.token = token or secrets.token_hex(8)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _restore, (dataclasses.asdict(self.config), self.token)

    def __repr__(self) -> str:
        return f"Carrier({self.config!r})"


def _restore(values: dict[str, Any], token: str) -> Carrier:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    config = DeepPruneConfig(**values)
    activate(config, everywhere=False)
    return Carrier(config, token)


def add_cli_args(result: Any, parser: argparse.ArgumentParser) -> None:
    """AFTER `ServerArgs.add_cli_args`: one flag a setting, in a group of their own."""
    group = parser.add_argument_group("deepprune")
    for spec in setting_fields():
        flag, help = flag_of(spec), spec.metadata["help"]
        if spec.metadata["kind"] is bool:
            group.add_argument(flag, dest=dest_of(spec), action="store_true", help=help)
            continue
        # Ranges are checked by the config, whose sentence names the setting and the remedy.
        group.add_argument(
            flag,
            dest=dest_of(spec),
            type=spec.metadata["kind"],
            choices=spec.metadata["choices"],
            default=spec.default,
            help=f"{help} (default: {spec.default})",
        )


def from_cli_args(original: Callable[..., Any], cls: Any, args: argparse.Namespace) -> Any:
    """AROUND `ServerArgs.from_cli_args`: settings ride along; a refusal is one line, exit 2."""
    server_args = original(cls, args)
    values = {
        spec.name: getattr(args, dest_of(spec))
        for spec in setting_fields()
        if hasattr(args, dest_of(spec))
    }
    try:
        _attach(server_args, values)
    except (ConfigError, seams.SeamError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    return server_args


class ServerArgsFactory:
    """Stands in for `Engine.server_args_class`: takes our keywords out, calls the real one.

    An instance, not a function: a function on a class would be bound to the Engine.
    """

    def __init__(self, original: Callable[..., Any]):
        self.original = original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        values = {
            spec.name: kwargs.pop(dest_of(spec))
            for spec in setting_fields()
            if dest_of(spec) in kwargs
        }
        server_args = self.original(*args, **kwargs)
        _attach(server_args, values)
        return server_args

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)


def hook_engine() -> None:
    """`sglang.Engine(enable_deepprune=True, ...)`: effective because Engine loads plugins first."""
    engine = sys.modules.get(_ENGINE_MODULE)
    if engine is not None and not isinstance(engine.Engine.server_args_class, ServerArgsFactory):
        engine.Engine.server_args_class = ServerArgsFactory(engine.Engine.server_args_class)


def config_of(server_args: Any) -> DeepPruneConfig | None:
    """The settings that `server_args` carries, or None where the plugin is off."""
    carrier = getattr(server_args, ATTRIBUTE, None)
    return carrier.config if carrier is not None and carrier.config.enable else None


def token_of(server_args: Any) -> str:
    """What proves that a tag is ours."""
    return str(getattr(server_args, ATTRIBUTE).token)


def _attach(server_args: Any, values: dict[str, Any]) -> None:
    config = DeepPruneConfig(**values)
    if not config.enable:
        return
    for step in SETTINGS_STEPS:
        config = step(config, server_args)
    refuse_unproven_modes(server_args)
    untested = untested_modes(server_args)
    if untested:
        logger.warning(UNTESTED, " and ".join(untested))
    setattr(server_args, ATTRIBUTE, Carrier(config))
    activate(config, everywhere=True)


def _with_judge(config: DeepPruneConfig, server_args: Any) -> DeepPruneConfig:
    check_judge(config.judge)
    if config.judge.partition(":")[0] == "probe-server":
        raise ConfigError("judge", "'probe-server' is for recorded traces; use probe")
    if is_probe(config.judge):
        from sglang_deepprune.patches.fork import refusal  # imports SGLang's scheduler side

        why = refusal(server_args)
        if why:
            raise ConfigError("judge", f"probe does not work here: {why}; choose another judge")
    return config


def _with_card(config: DeepPruneConfig, server_args: Any) -> DeepPruneConfig:
    return with_card(config)


def _with_memory(config: DeepPruneConfig, server_args: Any) -> DeepPruneConfig:
    """The config with the judge's GPU, and what it will take of it."""
    check_attention(config)
    total = None
    is_on_gpu = config.judge_device != "cpu" and config.judge != "none"
    if is_on_gpu:
        config = dataclasses.replace(config, judge_gpu=visible_gpu(config.judge_device))
        from sglang.srt.utils import get_device_memory_capacity

        try:
            total = get_device_memory_capacity("cuda")
        except (OSError, ValueError, RuntimeError):  # no nvidia-smi, or one that has no answer
            total = None
        if not total:
            raise ConfigError("judge_device", f"no {config.judge_device!r} here; use cpu")
    config = dataclasses.replace(config, judge_mem=check_memory(config, total))
    if is_on_gpu:
        check_neighbours(config, _server_gpus(server_args, total or 0.0))
    return config


def _server_gpus(server_args: Any, mib: float) -> ServerGpus:
    """The server's GPUs, as `Engine._launch_scheduler_processes` deals them out."""
    from sglang.srt.environ import envs

    def number(name: str, default: int) -> int:
        found = getattr(server_args, name, None)
        return default if found is None else int(found)

    tp_size = number("tp_size", 1)
    first, step = number("base_gpu_id", 0), number("gpu_id_step", 1)
    here = max(1, tp_size // number("nnodes", 1)) if _runs_on_cuda(server_args) else 0
    check = getattr(envs, BALANCE_CHECK, None)
    return ServerGpus(
        tp_size, number("dp_size", 1), [first + step * rank for rank in range(here)],
        is_balance_checked=check is None or bool(check.get()), mib=mib,
    )  # fmt: skip


# What a start makes of the settings, in order: each gives the config back, more complete, or raises
# ConfigError. A later one may read what an earlier one has found to be there.
# `server_args`: SGLang's ServerArgs, or the parsed flags that it is made of.
SETTINGS_STEPS = (_with_judge, _with_card, _with_memory)


def refuse_unproven_modes(server_args: Any) -> None:
    """Raise SeamError, one sentence, for the first mode that nobody has proven with this plugin."""
    for sentence in refusals(server_args):
        raise seams.SeamError(sentence)


def refusals(server_args: Any) -> list[str]:
    """One sentence for each mode of this server that nobody has proven with this plugin.

    `server_args`: SGLang's ServerArgs, or the parsed flags that it is made of.
    """
    modes = (
        (os.environ.get("SGLANG_RUST_SERVER", "").lower() in ("1", "true", "yes", "y"),
         "SGLANG_RUST_SERVER: the Rust front end has none of our Python hooks; unset it"),
        (bool(getattr(server_args, "smg_grpc_mode", False) or getattr(server_args, "grpc_mode", 0)),
         "--smg-grpc-mode: its servicer fans n>1 out itself; use HTTP or --grpc-port"),
        (getattr(server_args, "disaggregation_mode", "null") not in ("null", None),
         "--disaggregation-mode: prefill/decode disaggregation moves KV between servers"),
        (int(getattr(server_args, "pp_size", 1) or 1) > 1,
         "--pp-size: pipeline stages see a verdict at different steps; use 1"),
        (bool(getattr(server_args, "enable_pdmux", False)),
         "--enable-pdmux: its loop runs prefill and decode side by side"),
        (bool(getattr(server_args, "dllm_algorithm", None)),
         "--dllm-algorithm: diffusion LLMs have no decode step to stop at"),
        (bool(getattr(server_args, "enable_streaming_session", False)),
         "--enable-streaming-session: such sessions keep the KV row of a finished request"),
        (bool(getattr(server_args, "enable_dp_attention", False))
         and seams.sglang_version() < Version("0.5.20"),
         "--enable-dp-attention before SGLang 0.5.20: verdicts reach the first group's ranks only"),
        (bool(getattr(server_args, "skip_tokenizer_init", False)),
         "--skip-tokenizer-init: answers are read from text, so a tokenizer is needed"),
    )  # fmt: skip
    start = "--enable-deepprune does not work yet with"
    return [f"{start} {sentence}" for applies, sentence in modes if applies]


def untested_modes(server_args: Any) -> list[str]:
    """What of this server nobody has run with the plugin yet: docs/modes.md has the reasons."""
    names = [sentence.partition(":")[0] for sentence in support.untested(server_args)]
    return (
        names if support.GPU in names or not _runs_on_cuda(server_args) else [support.GPU, *names]
    )


def _runs_on_cuda(server_args: Any) -> bool:
    import torch

    device = getattr(server_args, "device", None)
    return device == "cuda" or (device is None and torch.cuda.is_available())


_activated: list[seams.Seam] = []


def activate(config: DeepPruneConfig, *, everywhere: bool) -> None:
    """Check and install the seams of this process: all in the main one, else those of its role."""
    from sglang_deepprune.patches import hooks

    wanted: list[seams.Seam] = []
    if everywhere or any(name in sys.modules for name in _FRONT_MODULES):
        wanted += seams.rows(seams.TOKENIZER)
    if everywhere or _SCHEDULER_MODULE in sys.modules:
        wanted += seams.rows(seams.SCHEDULER)
    known = seams.sglang_version()
    if everywhere and not seams.is_known(known):
        logger.warning(
            "deepprune was tested with %s; this is %s. Its seams are checked now.",
            support.WINDOW, known,
        )  # fmt: skip
    seams.check(wanted)
    seams.install(wanted, hooks.TABLE)
    seams.check(wanted, hooks.TABLE)
    _activated[:] = wanted


def activated() -> tuple[seams.Seam, ...]:
    """The rows that are installed in this process."""
    return tuple(_activated)
