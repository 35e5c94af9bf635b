"""Hooks of `mkdocs.yml`: links from docs/ to files of the repository work in the site, too.

A page may link to a figure's JSON or to a source file as `../benchmarks/results/serving.json`; a
viewer of the repository follows that as it is. MkDocs knows only what lies in docs/, so a linked
file outside is copied into the site under `files/`, and the link is pointed there. A link to
nothing is a warning, which `strict` makes a failure.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PLACE = "files"
_LINK = re.compile(r"\]\((\.\./[^)\s#]+)(#[^)\s]*)?\)")
_LOG = logging.getLogger("mkdocs.plugins.deepprune")


def on_page_markdown(markdown: str, /, *, page: Page, config: Any, files: Files) -> str:
    """Before a page is rendered: point its links out of docs/ to copies in the site."""

    def point(match: re.Match[str]) -> str:
        target = (ROOT / "docs" / match[1]).resolve()
        if not target.is_file() or not target.is_relative_to(ROOT):
            _LOG.warning("%s: no file %r in the repository", page.file.src_uri, match[1])
            return match[0]
        uri = f"{PLACE}/{target.relative_to(ROOT).as_posix()}"
        if target.suffix == ".md":
            uri += ".txt"  # a page of its own would be rendered, and looked for in the nav
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, abs_src_path=str(target)))
        return f"]({uri})"

    return _LINK.sub(point, markdown)
