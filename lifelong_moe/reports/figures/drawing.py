"""What all figures share: canvas, titles, names, ticks and colours. Without pyplot, so safe in any thread.

Sizes are in inches. The canvas grows with what stands on it, and names are shortened, so that nothing is cut off or
lies over something else; ``tests/unit/reports/figures/test_layout.py`` asks the renderer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lifelong_moe.errors import both_ends, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.lines import Line2D

Floats = NDArray[np.floating[Any]]

DPI = 110
LEAST_INCHES, LEAST_HEIGHT = 6.5, 2.4
"""Of a canvas, such that the longest name in a title fits into a line, and the name of an axis beside it."""
MAX_INCHES = 18.0
PLOT_INCHES = 13.0
"""Most for the cells of a heat map or the stages of a curve; the rest of the canvas is for names and colours."""
LINE = 0.17
"""Height of a line of text."""
TILT, TILTED = 30, 0.36
"""Degrees of labels that are too long, and the least distance of two of them."""
POINTS, SMALL_POINTS, TITLE_POINTS = 9, 8, 10
PANEL_CHARS, TICK_CHARS, LEGEND_CHARS, TITLE_CHARS = 20, 24, 32, 40
MOST_IN_KEY = 40
MOST_NUMBERED = 1000
"""Cells of a heat map that hold numbers: to draw one takes as long as to draw all colours together."""
SAMPLE_INCHES = 0.6
"""Width of a line's sample in a legend, with what is between it and its neighbours."""

LOSS_COLOURS = "YlOrRd"
LOAD_COLOURS = "Blues"
COSINE_COLOURS = "cividis"
ABSENT_COLOUR = "#dddddd"
LINE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe's and Ito's, which colour-blind people tell apart; without yellow, which is too pale for a line."""
MARKERS = "osD^vP*Xhp"
FILLS = ("full", "none", "left")


def line_style(index: int) -> Mapping[str, Any]:
    """Colour, marker and its filling of one of many lines; in grey, marker and filling alone tell 30 apart."""
    return {
        "color": LINE_COLOURS[index % len(LINE_COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "fillstyle": FILLS[index // len(MARKERS) % len(FILLS)],
    }


def shown(name: str, most: int = TICK_CHARS) -> str:
    """A name as matplotlib draws it: without its middle if it is long, and nothing in it is obeyed.

    Characters that are obeyed, or that the font lacks, are written as escapes.
    """
    text = "".join(char if _ems(char) else ascii(char)[1:-1] for char in visible(name, keep=""))
    # Two dollars would begin and end a formula.
    return both_ends(text, most).replace("$", r"\$")


def canvas(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with its panels, row by row."""
    from matplotlib.figure import Figure

    # Bounded, because a long chain of stages would otherwise make an image too large to open.
    size = (min(max(width, LEAST_INCHES), MAX_INCHES), min(max(height, LEAST_HEIGHT), 2 * MAX_INCHES))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def entitle(
    figure: Figure, name: str, message: str, note: str, keys: Iterable[str] = (), lines: Sequence[Line2D] = ()
) -> None:
    """Write the title, the legend beside the panels and keys of numbers below them; makes room for title and keys.

    Args:
        figure: Otherwise complete, as wide as its legend asks for in addition (:func:`legend_inches`).
        name: Of the run or comparison.
        message: What the figure shows, from its data.
        note: How to read it.
        keys: Of numbers that stand for names; empty ones are left out.
        lines: What the legend names; their labels are made by :func:`shown`.
    """
    width = figure.get_figwidth()
    room, left = width - 0.3, 0.15 / width
    title = "\n".join(_wrapped(text, TITLE_POINTS, room) for text in (f"{shown(name, TITLE_CHARS)}: {message}", note))
    figure.suptitle(title, x=left, ha="left", fontsize=TITLE_POINTS)
    key = "\n".join(_wrapped(text, SMALL_POINTS, room) for text in keys if text)
    if key:
        figure.supxlabel(key, x=left, ha="left", fontsize=SMALL_POINTS)
    above = LINE * (title.count("\n") + 2)
    height = figure.get_figheight() + above + (LINE * (key.count("\n") + 2) if key else 0)
    figure.set_figheight(height)
    if lines:
        # Where the layout would put it, it would lie over the title.
        border = 1 - (max(_inches(str(line.get_label()), SMALL_POINTS) for line in lines) + SAMPLE_INCHES) / width
        place: dict[str, Any] = {
            "loc": "upper left",
            "bbox_to_anchor": (border, 1 - above / height),
            "borderaxespad": 0,
        }
        found = figure.legend(handles=lines, **place, fontsize=SMALL_POINTS, labelspacing=0.25, frameon=False)
        found.set_in_layout(False)
        figure.set_layout_engine("constrained", rect=(0, 0, border, 1))


@dataclass(frozen=True)
class Ticks:
    """Labels of an axis: names, or numbers where these have no room."""

    places: Sequence[float]
    labels: Sequence[str]
    tilt: int
    inches: float
    """Room that they take beside or below the axis."""
    key: str
    """What the numbers stand for; empty for names."""

    def put(self, axis: Axis, side: str = "right") -> None:
        """Draw them; ``side`` is where a tilted label touches its tick."""
        tilted: dict[str, Any] = {"rotation": self.tilt, "ha": side, "rotation_mode": "anchor"} if self.tilt else {}
        axis.set_ticks(self.places, self.labels, fontsize=POINTS, **tilted)


def ticks_across(
    names: Sequence[str], room: float, what: str, places: Sequence[float] = (), overhang: float = math.inf
) -> Ticks:
    """Labels of a horizontal axis.

    Args:
        names: From left to right.
        room: Inches from one to the next.
        what: The names are of, in the plural.
        places: Of the names; by default 0, 1, …
        overhang: Most inches that a tilted name may reach over, into what is beside the axes.
    """
    places = places or range(len(names))
    labels = [shown(name) for name in names]
    widest = max(map(_inches, labels))
    if widest + 0.1 <= room:
        return Ticks(places, labels, 0, LINE, "")
    if room >= TILTED and widest <= overhang:
        return Ticks(places, labels, TILT, widest * math.sin(math.radians(TILT)) + LINE, "")
    return _numbers(labels, math.ceil(0.3 / room), what, places)


def ticks_beside(names: Sequence[str], room: float, what: str, places: Sequence[float] = ()) -> Ticks:
    """Labels of a vertical axis; arguments as of :func:`ticks_across`."""
    places = places or range(len(names))
    labels = [shown(name) for name in names]
    if room >= LINE:
        return Ticks(places, labels, 0, max(map(_inches, labels)), "")
    return _numbers(labels, math.ceil(LINE / room), what, places)


def few(num: int) -> range:
    """At most 16 of the indices below ``num``, evenly apart."""
    # More labels would overlap.
    return range(0, num, -(-num // 16))


def legend_inches(names: Iterable[str], extra: str = "", most: int = LEGEND_CHARS) -> float:
    """Width of a legend of these names in at most so many characters, each with ``extra``."""
    return max(_inches(shown(name, most) + extra, SMALL_POINTS) for name in names) + SAMPLE_INCHES


def heat_map(axes: Axes, values: Floats, colours: str, low: float, high: float) -> AxesImage:
    """Colour the cells of a matrix; what is not finite is grey."""
    from matplotlib import colormaps

    palette = colormaps[colours].with_extremes(bad=ABSENT_COLOUR)
    return axes.imshow(np.ma.masked_invalid(values), cmap=palette, vmin=low, vmax=high, aspect="auto")


def write_in(axes: Axes, image: AxesImage, texts: Sequence[Sequence[str]], points: float = SMALL_POINTS) -> None:
    """Write a text into each cell of a heat map, black or white, as its colour asks; nothing if they are too many."""
    # Luma of Rec. 601: the perceived brightness of a colour. shape: (rows, columns)
    luma = image.to_rgba(np.ma.asarray(image.get_array()))[..., :3] @ np.array([0.299, 0.587, 0.114])
    for (row, column), light in np.ndenumerate(luma) if luma.size <= MOST_NUMBERED else ():
        ink = "black" if light > 0.5 else "white"
        text = axes.text(column, row, texts[row][column], ha="center", va="center", fontsize=points, color=ink)
        # Within the axes, so not asked for its size, which takes as long as to draw it.
        text.set_in_layout(False)


def colour_bar(figure: Figure, image: AxesImage, axes: Axes | Sequence[Axes], **options: Any) -> Any:
    """Draw a slim scale of colours at the right."""
    return figure.colorbar(image, ax=axes, shrink=0.8, fraction=0.3 / figure.get_figwidth(), **options)


def signed(value: float) -> str:
    """A difference with its sign and two digits; never a negative 0."""
    return f"{round(value, 2) + 0.0:+.2f}"


def _numbers(labels: Sequence[str], step: int, what: str, places: Sequence[float]) -> Ticks:
    named = [f"{number} = {label}" for number, label in enumerate(labels, 1)]
    if len(named) > MOST_IN_KEY:
        named = [named[0], "…", named[-1]]
    numbers = [str(number) for number in range(1, len(labels) + 1, step)]
    return Ticks(places[::step], numbers, 0, 0.3, f"{what}: {', '.join(named)}")


def _wrapped(text: str, points: float, room: float) -> str:
    first, *others = text.split(" ")
    lines = [first]
    for word in others:
        longer = f"{lines[-1]} {word}"
        if _inches(longer, points) <= room:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


def _inches(text: str, points: float = POINTS) -> float:
    """Width of a line, but for kerning."""
    return sum(map(_ems, text)) * points / 72


@cache
def _ems(char: str) -> float:
    """Width of a character in sizes of the font; 0 if the font lacks it."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    if not font.get_char_index(ord(char)):
        return 0.0
    font.set_size(100.0, 72.0)
    return float(font.load_char(ord(char)).linearHoriAdvance / 65536 / 100)
