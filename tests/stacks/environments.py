"""Other people's packages, pinned, each in an environment of its own under `.stacks/`.

`python -m tests.stacks.environments [NAME ...]` makes what is missing (all by default) and prints
the versions; `make test-stacks` calls it first. An environment that cannot be made here keeps the
reason, and its recipes are skipped with it: nobody may take them for tested. Imports nothing but
the standard library.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".stacks"
INSTALL_LIMIT_S = 900
_FAILURE = "cannot-be-had"  # a file: why there is no such environment here
_STAMP = "installed"  # a file: the pins that are in there


class CannotBeHad(RuntimeError):
    """An environment that does not exist here; says why in one sentence."""


@dataclass(frozen=True, slots=True)
class Environment:
    """One recipe's packages.

    `pins` are installed with what they require. `shown` are the distributions whose versions a
    test run prints. `is_on_top`: sees the packages of the running environment, too, so that torch
    and its like are not installed twice. `is_node`: a node_modules folder instead of a venv.
    """

    name: str
    pins: tuple[str, ...]
    shown: tuple[str, ...]
    is_on_top: bool = False
    is_node: bool = False

    @property
    def folder(self) -> Path:
        return FOLDER / self.name

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def require(self) -> None:
        """Raises CannotBeHad where it has not been made."""
        failure = self.folder / _FAILURE
        if failure.exists():
            raise CannotBeHad(f"{self.name}: {failure.read_text().strip()}")
        if not self.is_current:
            raise CannotBeHad(f"{self.name}: not installed; `make test-stacks` does it")

    @property
    def is_current(self) -> bool:
        stamp = self.folder / _STAMP
        return stamp.exists() and stamp.read_text().split() == list(self.pins)

    def make(self) -> None:
        """Make it anew. Never raises: a failure is written down, for `require`."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        try:
            self._install()
        except (OSError, subprocess.SubprocessError, CannotBeHad) as error:
            (self.folder / _FAILURE).write_text(f"{_reason(error)}\n")
        else:
            (self.folder / _STAMP).write_text("\n".join(self.pins) + "\n")

    def _install(self) -> None:
        if self.is_node:
            if shutil.which("npm") is None or shutil.which("node") is None:
                raise CannotBeHad("there is no node or no npm on this machine")
            (self.folder / "package.json").write_text('{"private": true}\n')
            _run("npm", "install", "--save-exact", "--no-audit", "--no-fund", *self.pins,
                 cwd=self.folder)  # fmt: skip
            return
        _run(sys.executable, "-m", "venv", str(self.folder))
        if self.is_on_top:
            # pip sees these as installed, and puts what must differ in front of them.
            inside = next(self.folder.glob("lib/python*/site-packages"))
            (inside / "on_top_of.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
        _run(str(self.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
             *self.pins)  # fmt: skip

    def versions(self) -> dict[str, str]:
        """What is in there, by name; the interpreter first."""
        if self.is_node:
            said = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True)
            found = {"node": said.stdout.strip().lstrip("v")}
            for name in self.shown:
                manifest = self.folder / "node_modules" / name / "package.json"
                found[name] = json.loads(manifest.read_text())["version"]
            return found
        code = (
            "import json, platform, sys; from importlib import metadata; "
            "print(json.dumps({'python': platform.python_version(), "
            "**{name: metadata.version(name) for name in sys.argv[1:]}}))"
        )
        done = subprocess.run(
            [str(self.python), "-c", code, *self.shown], capture_output=True, text=True, check=True
        )
        return dict(json.loads(done.stdout))


ENVIRONMENTS = {
    one.name: one
    for one in (
        Environment("openai-python", ("openai==3.57.0",), ("openai",)),
        # 7.x wants Node 22; Debian 12 and 13 have less.
        Environment("openai-node", ("openai@6.49.0",), ("openai",), is_node=True),
        Environment("lm-eval", ("lm-eval[api]==0.4.13",), ("lm-eval", "datasets"), is_on_top=True),
        # Later ones (1.110.2) want a `litellm-proxy` that could not be had; this one
        # imports a function that later FastAPI releases do not have.
        Environment(
            "litellm",
            ("litellm[proxy]==1.96.0", "fastapi==0.136.3"),
            ("litellm", "fastapi", "openai"),
        ),
        Environment(
            "langchain",
            ("langchain-openai==1.7.4",),
            ("langchain-openai", "langchain-core", "openai"),
        ),
        Environment("router", ("sglang-router==0.3.2",), ("sglang-router",)),
    )
}


def _run(*command: str, cwd: Path | None = None) -> None:
    subprocess.run(
        command, cwd=cwd, check=True, capture_output=True, text=True, timeout=INSTALL_LIMIT_S
    )


def _reason(error: Exception) -> str:
    """One line out of what an installer said."""
    if isinstance(error, subprocess.CalledProcessError):
        said = [line for line in str(error.stderr).splitlines() if "error" in line.lower()]
        return (said or [f"{error.cmd[0]} ended with {error.returncode}"])[-1][:300]
    return str(error)


def main(argv: Sequence[str]) -> int:
    """Make what is missing among `argv` (names; empty: all) and print what is there."""
    unknown = sorted(set(argv) - set(ENVIRONMENTS))
    if unknown:
        print(f"unknown: {', '.join(unknown)}; there are {', '.join(ENVIRONMENTS)}")
        return 2
    for name in argv or ENVIRONMENTS:
        one = ENVIRONMENTS[name]
        if not one.is_current:
            print(f"{name}: installing {' '.join(one.pins)}", flush=True)
            one.make()
        try:
            one.require()
            print(f"{name}: {', '.join(f'{key} {value}' for key, value in one.versions().items())}")
        except CannotBeHad as error:
            print(f"{error} (its recipes will be skipped)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
