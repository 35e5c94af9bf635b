"""`sglang-deepprune doctor`: what is wrong with this set-up, one sentence and a remedy each.

Looks at this machine: environment, entry point and version here, the rest in a child process that
does what a server's main process would (`preflight.py`), short of a server and a model. What stands
behind `--` are a server's flags. With `--url` it looks at a live server instead
(`server_check.py`). Imports no SGLang, which may be missing. Exit codes: 0 no fault, 1 a fault,
2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from sglang_deepprune import __version__, server_check
from sglang_deepprune.findings import WRONG_USAGE, Finding, as_json, as_text, exit_code
from sglang_deepprune.patches import support

_GROUP = "sglang.srt.plugins"
_LIMIT_S = 600.0  # SGLang imports in 10 to 60 seconds, later on a busy machine
_EPILOG = """\
examples:
  sglang-deepprune doctor
  sglang-deepprune doctor -- --model-path M --enable-deepprune --deepprune-judge belief:PATH
  sglang-deepprune doctor -- sglang serve M --enable-deepprune
  sglang-deepprune doctor --url http://127.0.0.1:30000

exit codes: 0 no fault, 1 a fault was found, 2 wrong usage. Nothing is started but a process that
parses the flags; with --url, one request of two one-token choices is sent (see --no-request). Its
key, if the server wants one: environment variable OPENAI_API_KEY."""


def check_here(argv: Sequence[str] | None, limit_s: float = _LIMIT_S) -> list[Finding]:
    """This machine and, unless None, these flags of a server."""
    found = [_entry_point(), _whitelist(), _version()]
    findings = [one for one in found if one is not None]
    if any(one.state == "fault" and one.check == "version" for one in findings):
        return findings  # what SGLang would say means nothing now
    return findings + _preflight(argv, limit_s)


def server_flags(words: Sequence[str]) -> list[str]:
    """The flags of a command line that may be there whole: `sglang serve M ...`."""
    flags = list(words)
    if "sglang.launch_server" in flags:
        flags = flags[flags.index("sglang.launch_server") + 1 :]
    elif len(flags) > 1 and Path(flags[0]).name == "sglang" and flags[1] == "serve":
        flags = flags[2:]
    if flags and not flags[0].startswith("-"):
        flags.insert(0, "--model-path")  # as `sglang serve` reads it
    return flags


def _version() -> Finding:
    try:
        version = metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return Finding(
            "version", "fault",
            f"no SGLang is installed for {Path(sys.executable).name} here; {support.INSTALL}",
        )  # fmt: skip
    return version_finding(version)


def version_finding(version: str) -> Finding:
    """Of an installed or a running SGLang."""
    place = support.place_of(version)
    if place == "older":
        return Finding(
            "version", "fault",
            f"SGLang {version} is older than {support.OLDEST}, the oldest that the plugin knows; "
            f"{support.INSTALL}",
        )  # fmt: skip
    if place == "newer":
        return Finding(
            "version", "warning",
            f"SGLang {version} is newer than what the plugin was tested with ({support.WINDOW}); "
            f"it works if every seam holds",
        )  # fmt: skip
    return Finding("version", "ok", f"SGLang {version}; tested with {support.OLDEST} to "
                   f"{support.NEWEST}")  # fmt: skip


def _entry_point() -> Finding:
    points = [one for one in metadata.entry_points(group=_GROUP) if one.name == support.PLUGIN]
    if not points:
        return Finding(
            "entry-point", "fault",
            f"no installed package has the entry point {support.PLUGIN!r} of {_GROUP}, so SGLang "
            f"does not see the plugin; pip install sglang-deepprune (a folder is not enough)",
        )  # fmt: skip
    who = [f"{one.dist.name} {one.dist.version}" if one.dist else one.value for one in points]
    if len(points) > 1:
        return Finding(
            "entry-point", "warning",
            f"{len(points)} packages have the entry point {support.PLUGIN!r} ({', '.join(who)}); "
            f"pip uninstall all but one",
        )  # fmt: skip
    return Finding("entry-point", "ok", f"{support.PLUGIN!r} of {who[0]} is there for SGLang")


def _whitelist() -> Finding | None:
    """As `sglang/srt/plugins/__init__.py::load_plugins_by_group` reads it."""
    allowed = os.environ.get("SGLANG_PLUGINS", "")
    names = [name.strip() for name in allowed.split(",") if name.strip()]
    if not allowed or support.PLUGIN in names:
        return None
    return Finding(
        "whitelist", "fault",
        f"SGLANG_PLUGINS={allowed!r} keeps the plugin out of every SGLang process; unset it, or "
        f"add {support.PLUGIN} to it",
    )  # fmt: skip


def _preflight(argv: Sequence[str] | None, limit_s: float) -> list[Finding]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "findings.jsonl"
        module = "sglang_deepprune.patches.preflight"
        command = [sys.executable, "-m", module, str(path), json.dumps(argv)]
        why = ""
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=limit_s, errors="replace",
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
            why = f"ended with {done.returncode}: {_last_line(done.stderr)}"
        except subprocess.TimeoutExpired:
            why = f"did not end within {limit_s:g} s"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    findings = [Finding(**row) for row in rows if "done" not in row]
    if not any("done" in row for row in rows):
        findings.append(Finding(
            "preflight", "fault",
            f"the process that does what a server's would {why}; start the server to see the whole "
            f"error",
        ))  # fmt: skip
    return findings


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no word of it"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sglang-deepprune doctor",
        usage="%(prog)s [-h] [--json] [--url URL [--no-request] [--timeout-s S]] [-- FLAGS]",
        description="What is wrong with this set-up, or with a live server.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--url", help="of a live server, without /v1; looked at instead")
    parser.add_argument("--no-request", action="store_true", help="only read what /server_info has")
    parser.add_argument(
        "--timeout-s", type=float, default=30.0, help="for each answer of the server (default: 30)"
    )
    return parser


def main(argv: list[str]) -> int:
    place = argv.index("--") if "--" in argv else len(argv)
    args = build_parser().parse_args(argv[:place])
    flags = server_flags(argv[place + 1 :]) if place < len(argv) else None
    if not args.timeout_s > 0:
        print("error: --timeout-s must be above 0", file=sys.stderr)
        return WRONG_USAGE
    if args.url and flags is not None:
        print("error: --url looks at a live server; flags are for one to come", file=sys.stderr)
        return WRONG_USAGE
    more: dict[str, Any] = {"version": __version__}
    if args.url:
        looked = server_check.look(
            args.url, version_finding, support.untested,
            sends=not args.no_request, timeout_s=args.timeout_s,
        )  # fmt: skip
        findings, where = looked.findings, args.url
        more |= {"url": args.url, "server": looked.facts}
    else:
        where = "this machine, no flags given" if flags is None else "a start with these flags"
        findings = check_here(flags)
    if args.json:
        print(as_json(findings, **more))
    else:
        print(as_text(findings, f"sglang-deepprune {__version__}: {where}"))
    return exit_code(findings)
