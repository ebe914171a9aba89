"""Pictures in tests of something else: of each kind the first is drawn, which takes as long as to train a stage."""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO, Any

import pytest
from matplotlib.figure import Figure

_drawn: dict[tuple[object, ...], bytes] = {}


def draw_once(patch: pytest.MonkeyPatch) -> None:
    """From now on a figure with axes of one that this process has drawn is saved as a copy of that one.

    ``tests/unit/reports/figures`` draws every kind with data of all sorts, and ``tests/security`` with hostile names.
    """
    draw = Figure.savefig

    def savefig(self: Figure, target: str | Path | IO[bytes], **options: Any) -> None:
        # Titles tell of a run's name and numbers.
        texts = ((axes.get_xlabel(), axes.get_ylabel()) for axes in self.axes)
        kind = (*texts, *sorted(options.items()))
        if kind not in _drawn:
            picture = io.BytesIO()
            draw(self, picture, **options)
            _drawn[kind] = picture.getvalue()
        if isinstance(target, str | Path):
            Path(target).write_bytes(_drawn[kind])
        else:
            target.write(_drawn[kind])

    patch.setattr(Figure, "savefig", savefig)
