"""The runner of the tests under several SGLangs; no network, no server."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import pytest

from benchmarks import versions

ROOT = Path(__file__).resolve().parents[2]


def test_the_ends_of_the_window_are_tested():
    from sglang_deepprune.patches import support

    assert (versions.TESTED[0], versions.TESTED[-1]) == (support.OLDEST, support.NEWEST)
    assert len(versions.TESTED) > 2 and set(versions.TESTED) <= set(versions.PINS)
    assert list(versions.PINS)[0] == support.OLDEST and list(versions.PINS)[-1] == support.NEWEST


def test_ci_checks_the_oldest_and_make_installs_the_newest():
    assert f"--versions {versions.TESTED[0]} " in (ROOT / ".ci/run").read_text()
    newest = f"sglang=={versions.TESTED[-1]}\n"
    assert newest in (ROOT / "Makefile").read_text()
    assert newest in (ROOT / "scripts/cpu/requirements.txt").read_text()


def test_what_a_version_pins_is_not_what_the_newest_has():
    """Else the pin could go; and what is pinned is there at all."""
    lines = (ROOT / "scripts/cpu/requirements.txt").read_text().splitlines()
    newest = dict(line.split("==") for line in lines if re.match(r"[a-z0-9-]+==", line))
    for pins in versions.PINS.values():
        for pin in pins:
            name, version = pin.split("==")
            assert newest[name] != version


def test_every_chosen_test_is_there():
    assert [path for path in versions.TESTS if not (ROOT / path).is_file()] == []


def test_the_running_interpreter_stands_for_its_own_sglang(tmp_path: Path):
    python = versions.environment(metadata.version("sglang"), tmp_path)
    assert python == Path(sys.executable) and not list(tmp_path.iterdir())


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """An environment with one package, which shadows one of ours."""
    venv.create(tmp_path / "env", symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    (packages,) = (tmp_path / "env" / "lib").glob("*/site-packages")
    (packages / "iniconfig.py").write_text("")
    info = packages / "iniconfig-0.0.7.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: iniconfig\nVersion: 0.0.7\n")
    versions._share_own_packages(python)
    return python


def test_an_environment_sees_its_own_packages_first_and_then_ours(python: Path):
    assert versions.installed(python, "iniconfig") == "0.0.7"
    assert versions.installed(python, "pytest") == metadata.version("pytest")
    code = "import iniconfig, pluggy; print(iniconfig.__file__)"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).is_relative_to(python.parents[1])


@pytest.mark.parametrize(
    ("outcome", "seams", "status"),
    [({"passed": 9, "skipped": 1, "failed": 0}, 24, 0),
     ({"passed": 9, "skipped": 0, "failed": 1}, 24, 1),
     ({"passed": 0, "skipped": 9, "failed": 0}, 24, 1),
     ({"passed": 9, "skipped": 0, "failed": 0}, 0, 1)],
)  # fmt: skip
def test_all_seams_are_checked_and_four_versions_tested(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    outcome: dict[str, int],
    seams: int,
    status: int,
):
    monkeypatch.setattr(versions, "has_gpu", lambda: False)
    monkeypatch.setattr(versions, "environment", lambda version, folder: Path(sys.executable))
    monkeypatch.setattr(versions, "installed", lambda python, package: "5.12.1")
    monkeypatch.setattr(versions, "check_seams", lambda python: seams)
    monkeypatch.setattr(versions, "run_tests", lambda *_: {**outcome, "seconds": 1})
    out = tmp_path / "versions.json"
    assert versions.main(["--folder", str(tmp_path), "--json", str(out)]) == status
    rows = json.loads(out.read_text())["rows"]
    assert [row["sglang"] for row in rows] == list(versions.PINS)
    assert [row["sglang"] for row in rows if "passed" in row] == list(versions.TESTED)
    assert versions.main(["--seams", "--versions", "0.5.15"]) == int(not seams)


TESTS = """
import pytest

@pytest.fixture
def broken():
    raise ValueError

def test_passes(): ...
def test_fails(): assert False
def test_has_no_server(broken): ...
@pytest.mark.skip(reason="too old")
def test_is_skipped(): ...
@pytest.mark.gpu
def test_has_no_card(): assert False
def test_of_a_gpu_without_one(): ...
@pytest.mark.slow
def test_takes_long(): assert False
"""


def test_outcomes_and_reasons_are_counted(tmp_path: Path):
    (tmp_path / "test_them.py").write_text(TESTS)
    # Of the slow ones those of two ranks are wanted.
    (tmp_path / "test_parallel.py").write_text(
        "import pytest\n@pytest.mark.slow\ndef test_two(): ..."
    )
    results = tmp_path / "results.xml"
    row = versions.run_tests(Path(sys.executable), [str(tmp_path)], results)
    assert row.pop("seconds") < 300
    assert row == {"passed": 3, "skipped": 1, "failed": 2}
    assert versions.reasons(results) == {"too old": 1}


def test_a_run_without_a_report_is_a_failure(tmp_path: Path):
    results = tmp_path / "results.xml"
    row = versions.run_tests(Path(sys.executable), ["tests/unit/no_such_file.py"], results)
    assert (row["passed"], row["failed"]) == (0, 1)
