"""A folder that makes SGLang find a plugin of ours that is not installed."""

from __future__ import annotations

import os
from pathlib import Path


def plugin_path(folder: Path, name: str, target: str, *more: Path) -> dict[str, str]:
    """PYTHONPATH for a server. `folder` receives the metadata that names `target`, MODULE:FUNCTION,
    as entry point `name` of `sglang.srt.plugins`; `more` is put on the path too."""
    info = folder / f"deepprune_{name}-0.0.1.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: deepprune-{name}\nVersion: 0.0.1\n"
    )
    (info / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{name} = {target}\n")
    paths = (str(folder), *map(str, more), os.environ.get("PYTHONPATH", ""))
    return {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
