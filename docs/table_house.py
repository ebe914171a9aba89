"""Tables of how the code is laid out; ``make_tables.py`` says where they stand."""

from __future__ import annotations

import ast
from typing import Any

from table_kinds import ROOT, markdown, read

from tests.house import FLOORS


def purpose(room: str) -> str:
    """First line of the docstring of a room of `tests/house.py`."""
    folder = ROOT / ("" if room.startswith("pipelines") else "lifelong_moe") / room
    file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    return (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n")[0]


def floors() -> list[str]:
    """Every room with its floor and what it is for."""
    rows = [[str(floor), f"`{room}`", purpose(room)] for floor, rooms in enumerate(FLOORS) for room in sorted(rooms)]
    return markdown(["floor", "room", "responsibility"], rows, "rll")


def short_floors() -> list[str]:
    """The rooms of each floor."""
    rows = [[str(floor), ", ".join(f"`{room}`" for room in sorted(rooms))] for floor, rooms in enumerate(FLOORS)]
    return markdown(["floor", "rooms"], rows, "rl")


FIGURES = {
    "lines": "lines",
    "largest_folder": "files in the largest folder",
    "many_parameters": "functions of eight parameters or more",
    "long_functions": "functions of more than 60 lines",
    "untyped_dicts": "`dict[str, Any]` in signatures",
    "comment_percent": "lines that hold a comment alone, %",
    "status_modules": "modules that `lifelong-moe status` imports",
    "status_modules_ours": "of these, ours",
}


def figures() -> list[str]:
    """What `tests/house.py` measured before and after the rooms were moved."""
    sides = [_with_largest(read("results/house")[side]) for side in ("before", "after")]
    rows = [[text, *(f"{side[key]:,}" for side in sides)] for key, text in FIGURES.items()]
    return markdown(["", *(f"`{side['commit'][:7]}`" for side in sides)], rows)


def lines() -> list[str]:
    """Lines and files of each folder before and after."""
    before, after = (read("results/house")[side] for side in ("before", "after"))
    names = sorted({*before["lines_by_folder"], *after["lines_by_folder"]})
    rows = []
    for name in names:
        cells = [side[key].get(name) for key in ("lines_by_folder", "files_by_folder") for side in (before, after)]
        rows.append([f"`{name}`", *("–" if cell is None else f"{cell:,}" for cell in cells)])
    return markdown(["folder", "lines before", "after", "files before", "after"], rows)


def _with_largest(side: dict[str, Any]) -> dict[str, Any]:
    return {**side, "largest_folder": max(side["files_by_folder"].values())}
