"""Puts the files of docs/recipes/ into docs/recipes.md, under each `<!-- recipes/NAME -->`.

The tests run the files (`make test-stacks`), and a unit test holds that the page shows them as they
are. `python scripts/show_recipes.py` after a change of one.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = DOCS / "recipes.md"
_LANGUAGES = {".py": "python", ".mjs": "js", ".yaml": "yaml", ".jsonl": "json"}
_BLOCK = re.compile(r"<!-- (recipes/\S+) -->\n```.*?\n```\n", re.DOTALL)


def render(page: str) -> str:
    """The page's text with every shown file as it is now."""

    def show(found: re.Match[str]) -> str:
        path = DOCS / found[1]
        return f"<!-- {found[1]} -->\n```{_LANGUAGES[path.suffix]}\n{path.read_text()}```\n"

    return _BLOCK.sub(show, page)


def shown(page: str) -> set[str]:
    """Names of the files that the page shows."""
    return {Path(name).name for name in _BLOCK.findall(page)}


if __name__ == "__main__":
    sys.stdout.write(f"{PAGE.name}: {len(shown(PAGE.read_text()))} files\n")
    PAGE.write_text(render(PAGE.read_text()))
