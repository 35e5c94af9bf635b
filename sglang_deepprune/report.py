"""What every benchmark prints and writes: a fixed-width table, and one JSON object.

The JSON holds name, command, versions, machine and rows, so that a number can be traced to the
code and the machine it came from. It holds no absolute path and no host name. Imports neither
torch nor sglang: a benchmark of pure Python should not pay for them.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

Row = dict[str, Any]

_CPUS = len(os.sched_getaffinity(0))  # as imported: a study may pin itself to fewer
_ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = (
    "torch",
    "triton",
    "flashinfer-python",
    "sglang",
    "sglang_deepprune",
    "transformers",
    "sympy",
    "math-verify",
)


def print_table(rows: list[Row], title: str) -> None:
    """Print rows under a ruled title; columns are the keys in the order they first appear."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(line[index]) for line in [columns, *cells]) for index in range(len(columns))]
    rule = "-" * max(len(title), sum(widths) + 2 * (len(columns) - 1))
    print(f"\n{title}\n{rule}")
    for line in [columns, *cells]:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    print(rule)


def write_json(path: str | Path, name: str, rows: list[Row], **extra: Any) -> None:
    """Write the benchmark's one JSON object."""
    report = {
        "name": name,
        "command": command(),
        "versions": versions(),
        "machine": machine(),
        "rows": rows,
        **extra,
    }
    Path(path).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")


def with_ratios(rows: list[Row], baseline: Row, keys: Iterable[str]) -> list[Row]:
    """Copies of the rows with `<key>_ratio` = row / baseline for each key (None at zero)."""
    extended = []
    for row in rows:
        ratios = {
            f"{key}_ratio": row[key] / baseline[key] if baseline.get(key) else None
            for key in keys
            if key in row
        }
        extended.append({**row, **ratios})
    return extended


def command() -> str:
    """The command line, with paths relative to the repository, or bare names outside it."""
    program, *arguments = sys.argv
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None:
        start = ["python", "-m", spec.name.removesuffix(".__main__")]
    elif Path(program).name == "sglang-deepprune":
        start = ["sglang-deepprune"]
    else:
        start = ["python", _relative(program)]
    return " ".join([*start, *map(_relative, arguments)])


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that matter."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """The kind of machine, not which one."""
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": _CPUS,
        "cpu": _cpu_model(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or "unknown"


def _relative(argument: str) -> str:
    option, is_option, value = argument.partition("=")
    if is_option and option.startswith("-"):
        return f"{option}={_relative(value)}"
    judge, is_spec, path_of_judge = argument.partition(":")
    if is_spec and path_of_judge.startswith(os.sep) and not path_of_judge.startswith("//"):
        return f"{judge}:{_relative(path_of_judge)}"  # NAME:PATH
    path = Path(argument)
    if os.sep not in argument:
        return argument
    try:
        return str(path.resolve().relative_to(_ROOT))
    except ValueError:
        # Outside the repository a folder would name someone's machine. A model id is no path.
        return path.name if path.is_absolute() or path.exists() else argument


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
