"""An SGLang that is newer than what was tested: one warning, and every seam is checked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.plugin_folder import plugin_path
from tests.engine.test_fill import joined
from tests.engine.test_modes import parse
from tests.engine.versions import before

NEWER = "0.5.99"
pytestmark = pytest.mark.skipif(
    before("0.5.23"), reason="only the newest SGLang of the window can pass for a newer one"
)


@pytest.fixture
def newer(tmp_path: Path) -> dict[str, str]:
    """The environment in which the installed SGLang says that it is NEWER."""
    info = tmp_path / "newer" / f"sglang-{NEWER}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sglang\nVersion: {NEWER}\n")
    return {"PYTHONPATH": os.pathsep.join([str(info.parent), os.environ.get("PYTHONPATH", "")])}


def test_a_newer_version_gets_one_warning_where_the_flag_is_on(tiny: Path, newer: dict[str, str]):
    off, on = parse(tiny, [], ["--enable-deepprune"], env=newer)
    lines = [*off, *on]
    started = [line.split()[1] for line in lines if line.startswith("ok ")]
    assert started == ["False", "True"]
    warnings = [line for line in lines if "deepprune was tested with" in line]
    assert len(warnings) == 1
    assert f"SGLang 0.5.15 to 0.5.23; this is {NEWER}" in warnings[0]


def test_a_newer_version_without_a_seam_is_refused_with_one_sentence(
    tiny: Path, newer: dict[str, str], tmp_path: Path
):
    gone = plugin_path(tmp_path / "gone", "gone", "tests.engine.test_versions:take_a_seam_away")
    (lines,) = parse(tiny, ["--enable-deepprune"], env=joined(newer, gone))
    assert "exit 2" in lines
    (error,) = [line for line in lines if line.startswith("error: ")]
    assert f"Scheduler.is_fully_idle is not there in SGLang {NEWER}" in error
    assert "supported: SGLang 0.5.15 to 0.5.23" in error


def take_a_seam_away() -> None:
    """Entry point of a plugin that makes this SGLang one without the seam."""
    from sglang.srt.managers.scheduler import Scheduler

    del Scheduler.is_fully_idle
