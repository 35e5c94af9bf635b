#!/usr/bin/env bash
# Builds the sdist, the wheel from it, installs that wheel into an empty environment without its
# dependencies, looks whether everything that has to ship is there, and uses it: the plugin as
# SGLang finds it, the embedded judge, the reasoner's files.
#
# `python` is one that has `build` and the project's dependencies (`make dist-check`: .venv's).
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Without a target, `build` makes the wheel from the unpacked sdist: a file that MANIFEST.in
# forgets is missed here.
python -m build --no-isolation --outdir "$work/dist" . >"$work/build.log" 2>&1 ||
    { tail -n 40 "$work/build.log"; exit 1; }

libraries=$(python -c "import sysconfig; print(sysconfig.get_path('purelib'))")
python -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --no-deps "$work"/dist/*.whl

# From another folder and without dependencies: only what was installed can answer.
cd "$work"
venv/bin/python - <<'PYTHON'
import json
import tarfile
from importlib.metadata import distribution, entry_points
from pathlib import Path

dist = distribution("sglang-deepprune")
files = sorted(str(file) for file in dist.files or [])
package = Path(dist.locate_file("sglang_deepprune"))


def shipped(prefix, suffix=""):
    return [file for file in files if file.startswith(prefix) and file.endswith(suffix)]


def cards():
    """Those that the code reads; a card without its figures is none."""
    judge = json.loads((package / "judges/embedded/belief.card.json").read_text())
    reasoner = json.loads((package / "reasoner/weights/training.json").read_text())
    return [judge["figures"], reasoner["parameters"]]


expected = {
    "reasoner weights": shipped("sglang_deepprune/reasoner/weights/", "model.safetensors"),
    "reasoner tokenizer": shipped("sglang_deepprune/reasoner/weights/", "tokenizer.json"),
    "chat template": shipped("sglang_deepprune/reasoner/weights/", ".jinja"),
    "belief weights": shipped("sglang_deepprune/judges/embedded/", "belief.json"),
    "cards": cards(),
    "judge's prompt": shipped("sglang_deepprune/judges/", "lm_prompt.txt"),
    "schema": shipped("sglang_deepprune/schema/", ".json"),
    "answers": shipped("sglang_deepprune/answers/", ".py"),
    "judges": shipped("sglang_deepprune/judges/", ".py"),
    "kernels": shipped("sglang_deepprune/kernels/", ".py"),
    "patches": shipped("sglang_deepprune/patches/", ".py"),
    "licence": [file for file in files if file.endswith("LICENSE")],
    "plugin entry point": entry_points(group="sglang.srt.plugins", name="deepprune"),
    "README": [dist.metadata["Description-Content-Type"]] if dist.metadata.get_payload() else [],
}
with tarfile.open(next(Path("dist").glob("*.tar.gz"))) as source:
    names = {name.partition("/")[2] for name in source.getnames()}
for name in ("docs/design.md", "mkdocs.yml", "deploy/Dockerfile", "tests/conftest.py", "Makefile"):
    expected[f"sdist: {name}"] = [name] if name in names else []
for what, found in expected.items():
    print(f"{what:<25} {len(found)}")
missing = [what for what, found in expected.items() if not found]
stray = [file for file in files if file.split("/")[0] in {"kernels", "patches", "tests"}]
if missing or stray:
    raise SystemExit(f"missing: {missing}; stray: {stray}")
PYTHON
venv/bin/sglang-deepprune --version

# With the dependencies in sight, SGLang included: what was installed has to work, not to be there.
LIBRARIES="$libraries" venv/bin/python - <<'PYTHON'
import argparse
import os
import site
from pathlib import Path

site.addsitedir(os.environ["LIBRARIES"])  # behind the wheel's own, and with its .pth files

import sglang_deepprune
from sglang_deepprune.judges import load_judge
from sglang_deepprune.reasoner import model_path
from sglang_deepprune.types import Pair, Trace

here = Path(sglang_deepprune.__file__).resolve()
if not here.is_relative_to(Path("venv").resolve()):
    raise SystemExit(f"not the wheel's: {here}")

from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs

load_plugins()
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
if not parser.parse_args(["--model-path", "M", "--enable-deepprune"]).enable_deepprune:
    raise SystemExit("SGLang did not take the plugin's flag")

agreeing = Trace(0, "17 * 2 = 34. So the answer is 34.", 12, "tokens", prompt="What is 17 * 2?")
(score,) = load_judge("belief").score([Pair(agreeing, agreeing)])
if not 0.5 < score <= 1:
    raise SystemExit(f"the embedded judge gives {score} to two equal traces")

from transformers import AutoTokenizer

text = AutoTokenizer.from_pretrained(model_path()).apply_chat_template(
    [{"role": "user", "content": "What is 17 * 2?"}], tokenize=False, add_generation_prompt=True
)
if "What is 17 * 2?" not in text:
    raise SystemExit(f"the reasoner's chat template gives {text!r}")
print("the plugin is found, the judge judges, the reasoner's tokenizer reads")
PYTHON
ls -l dist
