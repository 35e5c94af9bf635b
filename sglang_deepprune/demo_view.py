"""What the demo shows: the siblings while they run, and the table at its end.

Pure state and rendering; it reads chunks of a streaming reply and knows nothing of HTTP. Both fit
a terminal of 80 columns: cells come eight a line, and the table has a column a mode.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from sglang_deepprune.equal_tokens import is_same

CELLS_A_LINE = 8
PAPER_CUT_WORDS = 25
LEGEND = (
    "[green]answer[/] right  [red]answer[/] wrong  ▪ running  [yellow]✂ pruned[/]  "
    "[cyan]■ vote decided[/]  [dim]- not started[/]"
)
_MARKS = {
    "queued": ("·", "dim"),
    "running": ("▪", "white"),
    "pruned": ("✂", "yellow"),
    "decided": ("■", "cyan"),
    "not_started": ("-", "dim"),
}
_UNKNOWN = ("!", "red")  # aborted, failed


@dataclass(slots=True)
class Cell:
    """One sibling as far as the stream has told."""

    state: str = "queued"
    tokens: int = 0
    answer: str | None = None
    text: str = ""


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
        cell.text = chunk.get("text") or cell.text
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
    num_right: int = 0
    rows: dict[int, Row] = field(default_factory=dict)
    on_close: Callable[[View], None] | None = None  # a plain line where nothing is live
    lock: threading.Lock = field(default_factory=threading.Lock)

    def open(self, number: int, row: Row) -> None:
        with self.lock:
            self.rows[number] = row

    def close(self, number: int, is_right: bool = False) -> None:
        with self.lock:
            self.rows.pop(number, None)
            self.done += 1
            self.num_right += is_right
            if self.on_close is not None:
                self.on_close(self)

    @property
    def progress(self) -> str:
        return f"{self.title}: {self.done} of {self.total} questions, {self.num_right} votes right"

    def __rich__(self) -> RenderableType:
        with self.lock:
            blocks = [block for row in self.rows.values() for block in _block(row)]
        return Lines(Text(self.progress, style="bold"), Text.from_markup(LEGEND), *blocks)


def _block(row: Row) -> tuple[Text, Table]:
    grid = Table.grid(padding=(0, 1))
    for first in range(0, len(row.cells), CELLS_A_LINE):
        grid.add_row(*(render(cell, row.gold) for cell in row.cells[first : first + CELLS_A_LINE]))
    head = Text(f"{row.prompt}  = {row.gold}", style="dim", no_wrap=True, overflow="ellipsis")
    return head, grid


def render(cell: Cell, gold: str) -> Text:
    """Tokens so far, and the answer of a finished sibling or a mark for any other."""
    if cell.state == "finished":
        right = is_same(cell.answer, gold)
        mark, style = cell.answer or "?", "green" if right else "red"
    else:
        mark, style = _MARKS.get(cell.state, _UNKNOWN)
    return Text.assemble((f"{mark[:5]:>5}", style), (f"{cell.tokens:>4}", "dim"))


def table_of(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """One column a mode; `rows` are those of the JSON file, ratios included."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for row in rows:
        table.add_column(row["mode"], justify="right")
    for label, show in _LINES:
        table.add_row(label, *(show(row) for row in rows))
    return table


def _share(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: "-" if row[key] is None else f"{100 * row[key]:.1f} %"


def _count(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: f"{row[key]:,.0f}"


def _with_ratio(key: str) -> Callable[[dict[str, Any]], str]:
    def show(row: dict[str, Any]) -> str:
        ratio = row[f"{key}_ratio"]
        return f"{row[key]:,.0f} (x{ratio:.2f})" if ratio is not None else f"{row[key]:,.0f}"

    return show


def _cut(row: dict[str, Any]) -> str:
    if row["cut_words"] is None:
        return "-"
    mark = "" if row["cut_words"] == PAPER_CUT_WORDS else f" (paper: {PAPER_CUT_WORDS})"
    return f"{row['cut_words']} words{mark}"


_LINES: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("questions", _count("questions")),
    ("votes right", _share("vote_right")),
    ("cons@k right", _share("cons_k_right")),
    ("  k", lambda row: f"{row['cons_k']:.1f}"),
    ("one sample right", _share("single_right")),
    ("same winner as plain", _share("same_winner")),
    ("same texts as plain", _share("same_texts")),
    ("tokens a question", _with_ratio("tokens")),
    ("seconds", _with_ratio("seconds")),
    ("siblings finished", _count("finished")),
    ("  pruned", _count("pruned")),
    ("  vote decided", _count("decided")),
    ("  not started", _count("not_started")),
    ("judge: pairs", _count("judge_calls")),
    ("judge: tokens read", _count("judge_tokens")),
    ("judge: window", lambda row: f"{row['window']} steps" if row["window"] else "-"),
    ("judge: cut", _cut),
    ("  of a whole trace", _share("cut_share")),
)
