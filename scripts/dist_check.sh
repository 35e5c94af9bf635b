#!/usr/bin/env bash
# Builds the sdist, the wheel from it, installs that wheel into an empty environment without its
# dependencies, and looks whether everything that has to ship is there.
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Without a target, `build` makes the wheel from the unpacked sdist: a file that MANIFEST.in
# forgets is missed here.
python -m build --no-isolation --outdir "$work/dist" . >"$work/build.log" 2>&1 ||
    { tail -n 40 "$work/build.log"; exit 1; }

python -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-deps "$work"/dist/*.whl

# From another folder and without dependencies: only what was installed can answer.
cd "$work"
venv/bin/python - <<'PYTHON'
from importlib.metadata import distribution, entry_points

dist = distribution("sglang-deepprune")
files = sorted(str(file) for file in dist.files or [])


def shipped(prefix, suffix=""):
    return [file for file in files if file.startswith(prefix) and file.endswith(suffix)]


expected = {
    "reasoner weights": shipped("sglang_deepprune/reasoner/weights/"),
    "reasoner card": shipped("sglang_deepprune/reasoner/", ".md"),
    "schema": shipped("sglang_deepprune/schema/", ".json"),
    "answers": shipped("sglang_deepprune/answers/", ".py"),
    "judges": shipped("sglang_deepprune/judges/", ".py"),
    "kernels": shipped("sglang_deepprune/kernels/", ".py"),
    "patches": shipped("sglang_deepprune/patches/", ".py"),
    "plugin entry point": entry_points(group="sglang.srt.plugins", name="deepprune"),
}
for what, found in expected.items():
    print(f"{what:<20} {len(found)}")
missing = [what for what, found in expected.items() if not found]
stray = [file for file in files if file.split("/")[0] in {"kernels", "patches", "tests"}]
if missing or stray:
    raise SystemExit(f"missing: {missing}; stray: {stray}")
PYTHON
venv/bin/sglang-deepprune --version
ls -l dist
