"""Tables for a terminal of any width."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table

EDGE = 3
"""Of each column: a space on both sides and a line. One line more ends the table."""


def show(console: Console, table: Table) -> None:
    """Print a table; if the terminal is too narrow for it, what does not fit goes on below, beside the names again.

    No number is cut: a cell is wrapped between words only, as long as its words fit beside the first column's.
    """
    spans = [_span(console, column) for column in table.columns]
    room = console.width - 1
    if sum(span.maximum + EDGE for span in spans) <= room:
        console.print(table)
        return
    parts = [[0]]
    for index in range(1, len(spans)):
        wanted = sum(spans[i].minimum + EDGE for i in (*parts[-1], index))
        if wanted > room and len(parts[-1]) > 1:
            parts.append([0])
        parts[-1].append(index)
    for number, part in enumerate(parts):
        shown = _part(table, part, _shared([spans[i] for i in part], room - EDGE * len(part)))
        shown.title = table.title if number == 0 else None
        shown.caption = table.caption if number == len(parts) - 1 else None
        console.print(shown)


def _span(console: Console, column: Column) -> Measurement:
    """Characters of a column's longest word, and of its longest line."""
    cells = [Measurement.get(console, console.options, cell) for cell in (column.header, *column.cells)]
    return Measurement(max(1, *(cell.minimum for cell in cells)), max(1, *(cell.maximum for cell in cells)))


def _shared(spans: Sequence[Measurement], room: int) -> list[int] | None:
    """Widths of columns that fill the room at most, none less than its longest word; None if that is impossible."""
    widths = [span.minimum for span in spans]
    spare = room - sum(widths)
    if spare < 0:
        return None
    modest = sorted(range(len(spans)), key=lambda i: spans[i].maximum - spans[i].minimum)
    for done, index in enumerate(modest):
        more = min(spans[index].maximum - spans[index].minimum, spare // (len(spans) - done))
        widths[index] += more
        spare -= more
    return widths


def _part(table: Table, columns: Sequence[int], widths: Sequence[int] | None) -> Table:
    part = Table(title_justify=table.title_justify)
    for place, index in enumerate(columns):
        column, width = table.columns[index], None if widths is None else widths[place]
        part.add_column(column.header, justify=column.justify, width=width, overflow="fold")
    cells = zip(*(table.columns[index].cells for index in columns), strict=True)
    for row, shown in zip(table.rows, cells, strict=True):
        part.add_row(*shown, style=row.style)
    return part
