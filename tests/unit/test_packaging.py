"""What has to hold for installs, clones and SGLang's pins; no network, no build."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import setuptools

import sglang_deepprune
from sglang_deepprune import cli

ROOT = Path(__file__).resolve().parents[2]
LINKS = {"kernels": "../kernels", "patches": "../patches"}
# What SGLang pins exactly in some version of the window, and what carries CUDA with it.
SGLANG_OWNS = {
    "compressed-tensors", "flashinfer-python", "openai", "sgl-kernel", "sglang", "sglang-kernel",
    "tokenizers", "torch", "torchaudio", "torchvision", "transformers", "triton", "xgrammar",
}  # fmt: skip


def project_name(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match, requirement
    return re.sub(r"[-_.]+", "-", match[0]).lower()


@pytest.fixture(scope="module")
def metadata() -> dict[str, Any]:
    """The keywords that setup.py passes to `setup`."""
    seen: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **keywords: seen.update(keywords))
        runpy.run_path(str(ROOT / "setup.py"))
    return seen


def test_kernels_is_a_namespace_folder():
    """With an `__init__.py` it hid Hugging Face's `kernels` from a server started in the clone."""
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_a_process_started_in_the_clone_imports_the_other_kernels():
    code = "import kernels; print(kernels.__file__)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert not Path(run.stdout.strip()).is_relative_to(ROOT / "kernels")
    assert run.stdout.strip() != "None", "ours was imported: a namespace folder has no file"


@pytest.mark.parametrize("name", LINKS)
def test_a_link_in_the_package_points_to_the_top_level_folder(name: str):
    link = ROOT / "sglang_deepprune" / name
    assert link.is_symlink()
    assert str(link.readlink()) == LINKS[name]


def test_no_folder_of_tests_is_a_package():
    """A package `tests.kernels` would make pytest import `kernels` as ours."""
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_packages_are_the_folders_with_modules(metadata: dict[str, Any]):
    package = ROOT / "sglang_deepprune"
    folders = [package, *(folder for folder in package.iterdir() if folder.is_dir())]
    # A linked room is a package even while it has no module yet.
    rooms = [f for f in folders if f.is_symlink() or any(f.glob("*.py"))]
    names = {".".join(f.relative_to(ROOT).parts) for f in rooms}
    assert set(metadata["packages"]) == names
    assert metadata["package_dir"] == {f"sglang_deepprune.{name}": name for name in LINKS}


def test_every_data_file_in_the_package_is_shipped(metadata: dict[str, Any]):
    shipped = {
        file
        for package, patterns in metadata["package_data"].items()
        for pattern in patterns
        for file in ROOT.joinpath(*package.split(".")).glob(pattern)
    }
    files = {file for file in (ROOT / "sglang_deepprune").rglob("*") if file.is_file()}
    left_out = {f for f in files - shipped if f.suffix != ".py" and "__pycache__" not in f.parts}
    assert not left_out


def test_sglang_finds_the_plugin(metadata: dict[str, Any]):
    assert metadata["entry_points"]["sglang.srt.plugins"] == [
        "deepprune = sglang_deepprune.patches:register"
    ]


def test_an_install_moves_no_pin_of_sglang(metadata: dict[str, Any]):
    names = {project_name(requirement) for requirement in metadata["install_requires"]}
    assert not names & SGLANG_OWNS
    everything = [metadata["install_requires"], *metadata["extras_require"].values()]
    pinned = [line for lines in everything for line in lines if "==" in line or "<" in line]
    assert not pinned, "a pin or an upper bound can clash with SGLang's"


def test_the_cpu_set_up_installs_all_that_setup_py_names(metadata: dict[str, Any]):
    """That list is installed without dependencies, so a package missing there stays missing."""
    lines = (ROOT / "scripts" / "cpu" / "requirements.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", pin) for pin in pins)
    groups = [metadata["install_requires"], *metadata["extras_require"].values()]
    named = {project_name(line) for lines in groups for line in lines}
    assert named <= {project_name(pin) for pin in pins}


def test_metadata_is_stated_once(metadata: dict[str, Any]):
    assert metadata["version"] == sglang_deepprune.__version__
    assert "[project]" not in (ROOT / "pyproject.toml").read_text().splitlines()


def test_the_command_line_passes_options_through_to_the_subcommand(monkeypatch):
    seen: list[str] = []

    def demo(argv: list[str]) -> int:
        seen.extend(argv)
        return 3

    monkeypatch.setattr(cli, "import_module", lambda name: SimpleNamespace(main=demo))
    assert cli.main(["demo", "--n", "8", "--help"]) == 3
    assert seen == ["--n", "8", "--help"]


def test_the_command_line_refuses_an_unknown_subcommand(capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["demolish"])
    assert error.value.code == 2
    assert "invalid choice: 'demolish'" in capsys.readouterr().err


def test_no_script_hides_a_module_of_pythons():
    """`python benchmarks/x.py` puts that folder first on the path: a numbers.py there breaks
    fractions."""
    scripts = [path for path in (ROOT / "benchmarks").glob("*.py") if path.stem != "__init__"]
    assert scripts and not [one for one in scripts if one.stem in sys.stdlib_module_names]
