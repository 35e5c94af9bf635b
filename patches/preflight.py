"""What a server's main process would meet, in a process of its own: `doctor` starts this module.

SGLang's own code in SGLang's own order: `load_plugins`, `ServerArgs.add_cli_args`, the flags. No
server is started and no model is read. Findings are written to a file, one JSON line each, as they
come: a process that dies half-way has still told what it knew.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import io
import json
import logging
import multiprocessing.reduction
import pickle
import sys
from collections.abc import Callable, Sequence
from typing import Any

from sglang_deepprune.config import (
    ConfigError,
    DeepPruneConfig,
    dest_of,
    flag_of,
    key_of,
    setting_fields,
)
from sglang_deepprune.findings import Finding, State
from sglang_deepprune.judges.permission import card_path, sentence
from sglang_deepprune.patches.support import INSTALL, NEWEST, PLUGIN, untested

DONE = "done"  # the last line's key
_ENABLE = "--enable-deepprune"
_PROCESSES = (
    ("scheduler", "sglang.srt.managers.scheduler", "run_scheduler_process"),
    ("detokenizer", "sglang.srt.managers.detokenizer_manager", "run_detokenizer_process"),
    ("data-parallel controller", "sglang.srt.managers.data_parallel_controller",
     "run_data_parallel_controller_process"),
    ("tokenizer workers", "sglang.srt.entrypoints.http_server", "init_multi_tokenizer"),
)  # fmt: skip
Report = Callable[[str, State, str], None]


class _Parsed(Exception):
    """Carries the parsed flags out of SGLang's own parse."""

    def __init__(self, args: argparse.Namespace):
        self.parsed = args


class _Kept(logging.Handler):
    """The log records that say what became of a plugin."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def check(report: Report, argv: Sequence[str] | None) -> None:
    """All checks that need SGLang. `argv`: a server's flags; None: none were given."""
    if not _imports(report):
        return
    _load_plugins(report)
    is_known = _knows_the_flag(report)
    _seams(report)
    _processes(report)
    _machine(report)
    args = argparse.Namespace()
    if argv is not None:
        if not is_known:
            return
        parsed = _parse(report, argv)
        if parsed is None:
            return
        args = parsed
    is_good = _modes(report, args) & _settings(report, args)
    if argv is not None and is_good and args.enable_deepprune:
        _carries(report, argv)


def _imports(report: Report) -> bool:
    try:
        importlib.import_module("sglang.srt.plugins")
        importlib.import_module("sglang.srt.server_args")
    except Exception as error:
        report(
            "import", "fault",
            f"SGLang does not import: {_brief(error)}; repair it, for instance by {INSTALL}",
        )  # fmt: skip
        return False
    return True


def _load_plugins(report: Report) -> None:
    """As a server does. SGLang only logs what a plugin raises."""
    from sglang.srt import plugins

    kept = _Kept()
    log = logging.getLogger(plugins.__name__)
    log.addHandler(kept)
    try:
        plugins.load_plugins()
    finally:
        log.removeHandler(kept)
    for record in kept.records:
        error = record.exc_info[1] if record.exc_info else None
        what = f"{record.getMessage()}: {_brief(error) if error else 'no reason given'}"
        if PLUGIN in [str(arg) for arg in _arguments(record)]:
            report(
                "plugin", "fault",
                f"the plugin raises at load, and SGLang only logs it ({what}); repair that, for "
                f"instance by pip install --force-reinstall sglang-deepprune",
            )  # fmt: skip
        else:
            report("other-plugins", "warning", f"SGLang logged: {what}")


def _arguments(record: logging.LogRecord) -> tuple[Any, ...]:
    return record.args if isinstance(record.args, tuple) else ()


def _knows_the_flag(report: Report) -> bool:
    """SGLang only logs a hook that does not apply: ask its parser."""
    from sglang.srt import server_args

    parser = argparse.ArgumentParser()
    try:
        server_args.ServerArgs.add_cli_args(parser)
    except Exception as error:
        report("flag", "fault", f"SGLang's parser cannot be built: {_brief(error)}; {INSTALL}")
        return False
    flags = [flag_of(spec) for spec in setting_fields()]
    missing = [flag for flag in flags if flag not in parser._option_string_actions]
    if not missing:
        report("flag", "ok", f"SGLang's parser knows {_ENABLE} and {len(flags) - 1} settings")
        return True
    why = "the plugin was not loaded" if missing == flags else "it is of another version"
    report(
        "flag", "fault",
        f"SGLang's parser does not know {missing[0]}: {why}; see the other findings, or reinstall "
        f"sglang-deepprune",
    )  # fmt: skip
    return False


def _seams(report: Report) -> None:
    """Every row, not only the first that fails."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    from sglang_deepprune.patches import seams

    every = seams.rows(seams.PARSER + seams.TOKENIZER + seams.SCHEDULER)
    broken = 0
    for seam in every:
        try:
            seams.check([seam])
        except Exception as error:
            broken += 1
            what = str(error) if isinstance(error, seams.SeamError) else _brief(error)
            report("seam", "fault", f"{what}; install one of these, for instance {NEWEST}")
        others = {
            entry[2].plugin_name
            for entry in HookRegistry._hooks.get(seam.target, ())
            if entry[2] is not None and entry[2].plugin_name != PLUGIN
        }
        if others:
            report(
                "seam", "note",
                f"{seam.target} is hooked by {', '.join(sorted(others))} too; both are in force",
            )  # fmt: skip
    if not broken:
        front, back = len(seams.rows(seams.TOKENIZER)), len(seams.rows(seams.SCHEDULER))
        report(
            "seams", "ok",
            f"all {len(every)} hold: 2 at the parser, {front} at the tokenizer, {back} at the "
            f"scheduler",
        )  # fmt: skip


def _processes(report: Report) -> None:
    """As this SGLang's source has it: who loads plugins, and who must get ours otherwise."""
    loads: list[str] = ["main"]
    gets: list[str] = []
    for name, module, function in _PROCESSES:
        try:
            found = inspect.unwrap(getattr(importlib.import_module(module), function))
            (loads if "load_plugins(" in inspect.getsource(found) else gets).append(name)
        except Exception as error:
            report("processes", "warning", f"{function} is not there: {_brief(error)}")
    unaided = f"; {', '.join(gets)}: activated by the settings on server_args" if gets else ""
    report("processes", "note", f"SGLang loads plugins in: {', '.join(loads)}{unaided}")


def _machine(report: Report) -> None:
    try:
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        names = sorted({torch.cuda.get_device_name(index) for index in range(count)})
    except Exception as error:
        report("gpu", "warning", f"torch cannot say what GPU there is: {_brief(error)}")
    else:
        found = f"{count} x {', '.join(names)}" if count else "none: SGLang's CPU engine only"
        report("gpu", "note", f"{found} (torch {torch.__version__})")
    try:
        import triton
    except Exception as error:
        report("triton", "warning", f"a judge on a GPU would do without kernels: {_brief(error)}")
    else:
        report("triton", "note", f"Triton {triton.__version__}; asked for by a judge on a GPU only")


def _parse(report: Report, argv: Sequence[str]) -> argparse.Namespace | None:
    """The flags as SGLang parses them, a `--config` file merged in; no ServerArgs is made yet."""
    from sglang.srt import server_args

    def take(cls: Any, args: argparse.Namespace) -> Any:
        raise _Parsed(args)

    original = server_args.ServerArgs.__dict__["from_cli_args"]
    server_args.ServerArgs.from_cli_args = classmethod(take)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            server_args.prepare_server_args(list(argv))
    except _Parsed as found:
        args = found.parsed
    except (SystemExit, Exception) as error:
        report(
            "parse", "fault", f"SGLang does not take these flags: {_last(said) or _brief(error)}"
        )
        return None
    finally:
        server_args.ServerArgs.from_cli_args = original
    if not args.enable_deepprune:
        report(
            "parse", "warning",
            f"these flags leave the plugin off; add {_ENABLE} (the other checks take it as given)",
        )  # fmt: skip
    return args


def _modes(report: Report, args: argparse.Namespace) -> bool:
    from sglang_deepprune.patches.server_args import refusals

    refused = refusals(args)
    for one in refused:
        report("mode", "fault", one)
    for one in untested(_with_device(args)):
        report("mode", "warning", f"not tested with the plugin: {one}")
    if not refused:
        report("mode", "ok", "nothing in the environment or the flags is refused")
    return not refused


def _with_device(args: argparse.Namespace) -> argparse.Namespace:
    """The flags with the device that SGLang takes where none is named."""
    import torch

    named = getattr(args, "device", None)
    return argparse.Namespace(
        **{**vars(args), "device": named or ("cuda" if torch.cuda.is_available() else "cpu")}
    )


def _settings(report: Report, args: argparse.Namespace) -> bool:
    """Ours, as a server reads them (`server_args._attach`); of several faults, each."""
    from sglang_deepprune.patches.server_args import SETTINGS_STEPS

    values = {
        spec.name: getattr(args, dest_of(spec))
        for spec in setting_fields()
        if hasattr(args, dest_of(spec))
    }
    is_good = True
    try:
        config = DeepPruneConfig(**{**values, "enable": True})
    except ConfigError as error:
        report("settings", "fault", f"{error}; change {_flag(error)}")
        return False
    cut = config.cut_name.replace(":", " ")
    report("preset", "ok", f"{config.preset}, cut at {cut}, default {config.default!r}")
    for step in SETTINGS_STEPS:
        try:
            config = step(config, args)
        except ConfigError as error:
            is_good = False
            report("card" if error.field == "judge_card" else "judge", "fault", str(error))
            if error.field == "judge":
                break  # the others read the judge's files
    if is_good:
        _judge(report, config, is_chosen=config.judge != DeepPruneConfig().judge)
    return is_good


def _judge(report: Report, config: DeepPruneConfig, *, is_chosen: bool) -> None:
    """A judge that is never asked works as meant by default, and perhaps not where it was named."""
    report("judge", "ok", sentence(config))
    if config.judge == "none" or config.is_judged:
        return
    place = card_path(config.judge)
    if config.preset == "collect":
        why = "preset collect stops nobody"
    elif config.card_taus:
        why = f"its card allows other cuts than {config.cut_name}; choose one of these"
    elif config.judge_card or (place is not None and place.is_file()):
        why = "its card allows it nowhere"
    elif place is None:
        why = "it has no card"
    else:
        why = f"it has no card at {place}; make one by eval-judge --card, or use preset paper"
    report("card", "warning" if is_chosen else "note", f"the judge is never asked: {why}")


def _flag(error: ConfigError) -> str:
    return next((flag_of(s) for s in setting_fields() if key_of(s) == error.field), error.field)


def _carries(report: Report, argv: Sequence[str]) -> None:
    """The whole way as a start goes it, and the settings' way into the other processes."""
    from sglang.srt.server_args import prepare_server_args

    from sglang_deepprune.patches import seams
    from sglang_deepprune.patches.server_args import activated, config_of

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            server_args = prepare_server_args(list(argv))
        packed = multiprocessing.reduction.ForkingPickler.dumps(server_args)
        there = pickle.loads(packed)
    except (SystemExit, Exception) as error:
        why = _last(said) if isinstance(error, SystemExit) else _brief(error)
        report("start", "fault", f"a start with these flags ends with: {why}")
        return
    if config_of(there) != config_of(server_args) or config_of(there) is None:
        report("start", "fault", "the settings are lost on their way to SGLang's processes")
        return
    front, back = len(seams.rows(seams.TOKENIZER)), len(seams.rows(seams.SCHEDULER))
    report(
        "start", "ok",
        f"a start would activate {len(activated())} seams in the main process, and the settings "
        f"travel on server_args: {front} in each tokenizer process, {back} in each scheduler",
    )  # fmt: skip


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__


def _last(said: io.StringIO) -> str:
    """argparse's or our own last line, without the program's name."""
    lines = [line for line in said.getvalue().splitlines() if line.strip()]
    return lines[-1].rpartition("error: ")[2] if lines else ""


def main(argv: Sequence[str]) -> int:
    """`FILE`, then the flags as JSON (null: none)."""
    path, flags = argv
    with open(path, "w", encoding="utf-8") as file:

        def report(check: str, state: State, sentence: str) -> None:
            one = Finding(check, state, " ".join(sentence.split()))
            line = {"check": one.check, "state": one.state, "sentence": one.sentence}
            file.write(json.dumps(line) + "\n")
            file.flush()

        check(report, json.loads(flags))
        file.write(json.dumps({DONE: True}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
