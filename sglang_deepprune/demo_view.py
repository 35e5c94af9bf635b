"""What the demo shows while it runs: one row of cells a question, one cell a sibling.

Pure state and rendering; it reads chunks of a streaming reply and knows nothing of HTTP.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

_STYLES = {
    "queued": ("·", "dim"),
    "running": ("▪", "white"),
    "pruned": ("✂", "yellow"),
    "decided": ("■", "cyan"),
    "not_started": ("-", "dim"),
    "aborted": ("!", "red"),
    "failed": ("!", "red"),
}


@dataclass(slots=True)
class Cell:
    """One sibling as far as the stream has told."""

    state: str = "queued"
    tokens: int = 0
    answer: str | None = None


@dataclass(slots=True)
class Row:
    """One question."""

    prompt: str
    gold: str
    cells: list[Cell]
    group: dict[str, Any] | None = None

    def take(self, chunk: dict[str, Any]) -> None:
        """One chunk of the reply: progress of a sibling, its end, or the group's record."""
        meta = chunk["meta_info"]
        cell = self.cells[chunk["index"]]
        cell.tokens = meta["completion_tokens"]
        cell.state = "running"
        ours = meta.get("deepprune") or {}
        if meta.get("finish_reason"):
            choice = ours.get("choice") or {}
            cell.state = choice.get("state", "aborted")
            cell.answer = choice.get("answer")
        if "group" in ours:
            self.group = ours["group"]


@dataclass
class View:
    """The rows on the screen; several threads write to it."""

    title: str
    done: int = 0
    total: int = 0
    rows: dict[int, Row] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def open(self, number: int, row: Row) -> None:
        with self.lock:
            self.rows[number] = row

    def close(self, number: int) -> None:
        with self.lock:
            self.rows.pop(number, None)
            self.done += 1

    def __rich__(self) -> RenderableType:
        table = Table.grid(padding=(0, 1))
        with self.lock:
            for row in self.rows.values():
                table.add_row(Text(row.prompt[:44], style="bold"), *map(render, row.cells))
                table.add_row(Text(f"= {row.gold}", style="dim"), *map(render_tokens, row.cells))
        legend = "▪ running  [green]answer[/] finished  ✂ pruned  ■ vote decided  - not started"
        head = f"{self.title}: {self.done} of {self.total} questions    {legend}"
        return Lines(Text.from_markup(head), table)


def render(cell: Cell) -> Text:
    """An answer for a finished sibling, a mark for any other."""
    if cell.state == "finished":
        return Text(f"{cell.answer or '?':>5}", style="green")
    mark, style = _STYLES.get(cell.state, ("?", "red"))
    return Text(f"{mark:>5}", style=style)


def render_tokens(cell: Cell) -> Text:
    return Text(f"{cell.tokens:>5}", style="dim")
