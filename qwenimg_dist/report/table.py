"""A table with a title, told once and shown three ways: rich on a terminal, plain text in a log, HTML in a report.

Deliberately no formatting options: columns of numbers, shares and sizes go right, others left.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import rich.table
from rich.cells import cell_len
from rich.text import Text

Cell = str | int | float | None
_QUANTITY: Final = re.compile(r"^(-|[\d.,]+ ?(%|[kMGT]?B)?)?$")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells; `None` shows as an empty cell, integers get thousands separators."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.title!r} has {len(self.columns)} columns, but a row of {len(row)}")

    def rich(self) -> rich.table.Table:
        """For `rich.console.Console.print`."""
        # A title wider than its columns would be wrapped.
        width = cell_len(self.title) + 1
        table = rich.table.Table(title=self.title, title_justify="left", title_style="bold", min_width=width)
        for name, right in zip(self.columns, self._numeric()):
            table.add_column(name, justify="right" if right else "left")
        for row in self.rows:
            table.add_row(*(Text(show(cell)) for cell in row))
        return table

    def text(self) -> str:
        """Aligned plain lines, without colour or box characters."""
        lines = [list(self.columns), *([show(cell) for cell in row] for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        right = self._numeric()
        aligned = (
            "  ".join(
                cell.rjust(width) if is_right else cell.ljust(width)
                for cell, width, is_right in zip(line, widths, right)
            ).rstrip()
            for line in lines
        )
        return "\n".join([self.title, *(f"  {line}" for line in aligned)])

    def html(self) -> str:
        """A `<table>`, every cell escaped."""
        right = self._numeric()
        return "".join(
            [
                f"<table><caption>{html.escape(self.title)}</caption><thead>",
                _html_row("th", self.columns, right),
                "</thead><tbody>",
                *(_html_row("td", [show(cell) for cell in row], right) for row in self.rows),
                "</tbody></table>",
            ]
        )

    def _numeric(self) -> list[bool]:
        return [bool(self.rows) and all(_is_number(row[i]) for row in self.rows) for i in range(len(self.columns))]


def show(cell: Cell) -> str:
    """One cell as text: 12,345 and 0.1235."""
    if cell is None:
        return ""
    if isinstance(cell, int):
        return f"{cell:,}"
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.4g}"
    return cell


def _is_number(cell: Cell) -> bool:
    return not isinstance(cell, str) or bool(_QUANTITY.match(cell))


def show_bytes(size: float) -> str:
    """Bytes with a decimal unit: 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError("unreachable")


def show_time(seconds: float) -> str:
    """`42 s`, `7 min`, `3 h 05 min`, `3 days 4 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 72 else f"{hours // 24} days {hours % 24} h"


def show_share(part: int, whole: int) -> str:
    """A share as per cent, `-` of nothing."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _html_row(tag: str, cells: Sequence[str], right: Sequence[bool]) -> str:
    shown = (
        f'<{tag} class="n">{html.escape(cell)}</{tag}>' if is_right else f"<{tag}>{html.escape(cell)}</{tag}>"
        for cell, is_right in zip(cells, right)
    )
    return f"<tr>{''.join(shown)}</tr>"
