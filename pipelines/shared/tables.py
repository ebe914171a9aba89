"""Tables for a terminal of any width."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table

EDGE = 3
"""Characters per column besides its text: a space on both sides and a line. One more line ends the table."""


def show(console: Console, table: Table) -> None:
    """Print a table; columns that do not fit into the terminal follow below, each time beside the first column.

    Cells are wrapped between words, so no number is cut unless a single word is wider than the terminal.
    """
    # rich would render it and then throw it away, and a comparison says nothing of hundreds of complete runs.
    if console.quiet:
        return
    # rich would fold it at the table's width, however much room the terminal has.
    if table.title:
        console.print(table.title, style="table.title", highlight=False)
        table.title = None
    spans = [_span(console, column) for column in table.columns]
    room = console.width - 1  # the line that ends the table
    if sum(span.maximum + EDGE for span in spans) <= room:
        console.print(table)
        return
    parts = [[0]]
    for index in range(1, len(spans)):
        wanted = sum(spans[i].minimum + EDGE for i in (*parts[-1], index))
        if wanted > room and len(parts[-1]) > 1:  # at least one column beside the names, however wide
            parts.append([0])
        parts[-1].append(index)
    for number, part in enumerate(parts):
        shown = _part(table, part, _shared([spans[i] for i in part], room - EDGE * len(part)))
        shown.caption = table.caption if number == len(parts) - 1 else None
        console.print(shown)


def _span(console: Console, column: Column) -> Measurement:
    """Widths of a column's longest word and longest line."""
    # rich measures a cell's minimum as its longest word.
    cells = [Measurement.get(console, console.options, cell) for cell in (column.header, *column.cells)]
    return Measurement(max(1, *(cell.minimum for cell in cells)), max(1, *(cell.maximum for cell in cells)))


def _shared(spans: Sequence[Measurement], room: int) -> list[int] | None:
    """Share the room among columns, each at least as wide as its longest word; None if that is impossible."""
    widths = [span.minimum for span in spans]
    spare = room - sum(widths)  # characters left once the longest words fit
    if spare < 0:
        return None
    # Columns that need little first: what they leave of an equal share goes to the wider ones.
    modest = sorted(range(len(spans)), key=lambda i: spans[i].maximum - spans[i].minimum)
    for done, index in enumerate(modest):
        more = min(spans[index].maximum - spans[index].minimum, spare // (len(spans) - done))
        widths[index] += more
        spare -= more
    return widths


def _part(table: Table, columns: Sequence[int], widths: Sequence[int] | None) -> Table:
    part = Table()
    for place, index in enumerate(columns):
        column, width = table.columns[index], None if widths is None else widths[place]
        part.add_column(column.header, justify=column.justify, width=width, overflow="fold")
    cells = zip(*(table.columns[index].cells for index in columns), strict=True)
    for row, shown in zip(table.rows, cells, strict=True):
        part.add_row(*shown, style=row.style)
    return part
