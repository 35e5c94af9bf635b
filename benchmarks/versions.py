"""The tests under several SGLangs of the supported window, on a CPU: `make test-versions`.

Each SGLang gets a virtual environment of its own, with what it pins beside itself and is small
(transformers above all); everything else, torch included, it shares with the environment that runs
this. That one is `.venv`, which stands for its own SGLang. Environments are kept between runs.

`--seams` asks less, in seconds: whether every seam is there and takes our hook.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import sysconfig
import time
import venv
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.report import Row, print_table, write_json
from sglang_deepprune.local_server import CPU_ENV, has_gpu

ROOT = Path(__file__).resolve().parent.parent

_UP_TO_21 = ("transformers==5.12.1", "tokenizers==0.22.2", "openai==2.6.1")
# Version -> what it pins otherwise than scripts/cpu/requirements.txt, from its METADATA. Torch is
# the newest SGLang's for all: 0.5.15 pins 2.11.0, which would be half a gigabyte more.
PINS: dict[str, tuple[str, ...]] = {
    # Its /metrics middleware does not know the routers of newer FastAPIs: a 500 to every request.
    "0.5.15": (*_UP_TO_21, "xgrammar==0.2.1", "llguidance==0.7.30",
               "fastapi==0.115.14", "starlette==0.46.2"),
    "0.5.16": (*_UP_TO_21, "xgrammar==0.2.1"),
    "0.5.17": (*_UP_TO_21, "xgrammar==0.2.1"),
    "0.5.18": (*_UP_TO_21, "xgrammar==0.2.1"),
    "0.5.19": (*_UP_TO_21, "xgrammar==0.2.1"),
    "0.5.20": (*_UP_TO_21, "xgrammar==0.2.1"),
    "0.5.21": _UP_TO_21,
    "0.5.22": ("openai==2.6.1",),
    "0.5.23": (),
}  # fmt: skip
# The ends, and the first with the largest change between them: since 0.5.20 a scheduler's own
# commands ride the broadcast of requests. The others are asked for their seams alone.
TESTED = ("0.5.15", "0.5.20", "0.5.23")

# What reads or hooks SGLang. Left out: what asks for the algorithm alone, and the fault harness.
TESTS = (
    *(f"tests/unit/test_{name}.py" for name in
      ("judge_memory", "probe_engine", "ranks", "reply", "waiting")),
    *(f"tests/engine/test_{name}.py" for name in
      ("groups", "lazy", "weights", "cases", "pressure", "queue", "order", "fill", "modes",
       "seams", "second_plugin", "versions", "parallel", "serving", "probe")),
)  # fmt: skip
# The slow ones are longer versions of others, but for those of two ranks.
WHICH = ("-m", "not gpu", "-k", "not slow or test_parallel")

SEAMS = """
from sglang_deepprune.config import DeepPruneConfig
from sglang_deepprune.patches import seams, server_args
seams.check(seams.PARSER)
server_args.activate(DeepPruneConfig(enable=True), everywhere=True)
print("HELD", len(server_args.activated()))
"""


class WrongSGLang(RuntimeError):
    """An environment does not hold the SGLang that it is named after."""


def installed(python: Path | str, package: str) -> str:
    """The version of a package that this interpreter would import."""
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return _said([str(python), "-c", code]).strip()


def environment(version: str, folder: Path) -> Path:
    """The interpreter of this SGLang; its environment is made where it is missing or outdated.

    Raises CalledProcessError if pip fails, and WrongSGLang.
    """
    if version == metadata.version("sglang"):
        return Path(sys.executable)
    home = folder.resolve() / version
    python, stamp = home / "bin" / "python", home / "packages.txt"
    packages = [f"sglang=={version}", *PINS[version]]
    made_of = "\n".join([f"# Python {platform.python_version()}", *packages, ""])
    if not python.exists() or not stamp.is_file() or stamp.read_text() != made_of:
        venv.create(home, clear=True, symlinks=True)
        subprocess.run(
            [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet",
             "--no-deps", "--no-compile", *packages],
            check=True,
        )  # fmt: skip
        stamp.write_text(made_of)
    _share_own_packages(python)
    if installed(python, "sglang") != version:
        raise WrongSGLang(f"{home} does not hold SGLang {version}")
    return python


def _share_own_packages(python: Path) -> None:
    """Lets `python` import what this interpreter can, behind its own packages.

    By `addsitedir`, so that the .pth files there count too: those of editable installs.
    """
    ours = sysconfig.get_path("purelib")
    (_packages_of(python) / "shared.pth").write_text(f"import site; site.addsitedir({ours!r})\n")


def compile_modules(python: Path) -> None:
    """With PYTHONDONTWRITEBYTECODE each of many processes would compile SGLang again."""
    if python != Path(sys.executable):
        # It fails on the templates that some packages ship as .py; nothing imports those.
        command = [str(python), "-m", "compileall", "-qq", "-j", "0", str(_packages_of(python))]
        subprocess.run(command, stdout=subprocess.DEVNULL)


def _packages_of(python: Path) -> Path:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(_said([str(python), "-c", code]).strip())


def check_seams(python: Path) -> int:
    """How many seams hold; 0 where the check fails, whose sentence goes to standard error."""
    done = subprocess.run(
        [str(python), "-W", "ignore", "-c", SEAMS], env=_env(), capture_output=True, text=True
    )
    held = [line for line in done.stdout.splitlines() if line.startswith("HELD ")]
    if not held:
        print("\n".join(done.stderr.strip().splitlines()[-1:]), file=sys.stderr)
    return int(held[0].split()[1]) if held else 0


def run_tests(python: Path, tests: Sequence[str], results: Path) -> Row:
    """pytest under this interpreter; `results` is where its JUnit report goes."""
    results.parent.mkdir(parents=True, exist_ok=True)
    results.unlink(missing_ok=True)
    start = time.monotonic()
    done = subprocess.run(
        [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *WHICH,
         f"--junitxml={results}", *tests],
        cwd=ROOT, env=_env(),
    )  # fmt: skip
    found = counts(results)
    # No report, no test, a test file that is not there: pytest says so by its exit status alone.
    found["failed"] = found["failed"] or int(done.returncode != 0)
    return {**found, "seconds": round(time.monotonic() - start)}


def counts(results: Path) -> Row:
    """Tests by outcome, from a JUnit report."""
    found = Counter(map(_outcome, _parsed(results, "testcase")))
    return {outcome: found[outcome] for outcome in ("passed", "skipped", "failed")}


def reasons(results: Path) -> dict[str, int]:
    """Why tests were skipped -> how many of them, from a JUnit report."""
    found = Counter(tag.get("message", "") for tag in _parsed(results, "skipped"))
    return dict(found.most_common())


def _parsed(results: Path, tag: str) -> Iterator[ElementTree.Element]:
    return ElementTree.parse(results).iter(tag) if results.is_file() else iter(())


def _outcome(case: ElementTree.Element) -> str:
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    return "skipped" if case.find("skipped") is not None else "passed"


def _env() -> dict[str, str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(part for part in paths if part)
    return {**os.environ, **CPU_ENV, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}


def _said(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.versions", description=__doc__)
    parser.add_argument("--versions", nargs="+", choices=PINS, metavar="X.Y.Z",
                        help="run the tests under each of these (default: all seams, and the tests "
                             f"under {', '.join(TESTED)})")  # fmt: skip
    parser.add_argument("--tests", nargs="+", default=TESTS, metavar="PATH")
    parser.add_argument("--folder", type=Path, default=ROOT / ".venvs", help="of environments")
    parser.add_argument("--seams", action="store_true", help="check the seams, run no test")
    parser.add_argument("--json", type=Path, help="write rows, versions and machine to this file")
    args = parser.parse_args(argv)
    if has_gpu() and not args.seams:
        print("older SGLangs are tested on a CPU: with a GPU each needs kernels and a torch of "
              "its own", file=sys.stderr)  # fmt: skip
        return 2
    rows: list[Row] = []
    skipped: dict[str, dict[str, int]] = {}
    pythons = {version: environment(version, args.folder) for version in args.versions or PINS}
    for version, python in pythons.items():
        row: Row = {"sglang": version, "transformers": installed(python, "transformers"),
                    "seams": check_seams(python)}  # fmt: skip
        if not args.seams and version in (args.versions or TESTED):
            print(f"\nSGLang {version}", flush=True)
            compile_modules(python)
            results = args.folder.resolve() / f"{version}.xml"
            row |= run_tests(python, args.tests, results)
            skipped[version] = reasons(results)
        rows.append(row)
    print_table(rows, "SGLang versions")
    for version, why in skipped.items():
        for reason, number in why.items():
            print(f"{version}: {number} skipped: {reason}")
    if args.json:
        write_json(args.json, "versions", rows, tests=list(args.tests), skipped=skipped)
    return int(any(not row["seams"] or row.get("failed") or row.get("passed") == 0 for row in rows))


if __name__ == "__main__":
    sys.exit(main())
