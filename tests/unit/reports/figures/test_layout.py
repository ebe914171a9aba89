"""How figures look, as far as their renderer tells: all is on the canvas, and no text lies over another one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from lifelong_moe.reports.figures import comparison, drawing, interpolation, run, specialization

Name = Callable[[int], str]
Drawn = Figure | None


def short(index: int) -> str:
    return f"n{index:02}"


def long(index: int) -> str:
    """80 characters that begin and end alike, with some that matplotlib would obey and some that its font lacks."""
    return f"{index:02}_$a_b$ 語\N{RIGHT-TO-LEFT OVERRIDE}\\$" + "m" * 63 + f"_{index:02}"


def losses(stages: int, distributions: int) -> np.ndarray:
    """The last distribution was not measured after the first of several stages."""
    values = np.random.default_rng(0).uniform(1.0, 9.0, (stages, distributions))
    values[0, -1] = np.nan if stages > 1 else 2.0
    return values


def compared(name: Name, stages: int, arms: int) -> dict[str, Any]:
    """Arms of two seeds; many of them crowd in a corner, and the last one learns all in one stage."""
    random = np.random.default_rng(0)
    names = [name(i) for i in range(stages)]
    found = []
    for arm in range(arms):
        chain = names[:1] if 0 < arm == arms - 1 else names
        numbers = {
            comparison.FORGETTING: float(random.exponential(0.1)),
            comparison.GAP: float(random.exponential(0.1)),
            "active_flops": 1e13,
            "final_mean_bits_per_byte": 2.0 + arm,
        }
        runs = [
            {
                "status": "committed",
                "seed": seed,
                "numbers": numbers | {comparison.GAP: numbers[comparison.GAP] + 0.01 * seed},
                "leak": {data: float(random.uniform()) for data in names[:-1]} if arm else {},
                "curves": {data: random.uniform(1, 9, len(chain)).tolist() for data in names},
            }
            for seed in (0, 1)
        ]
        found.append(
            {
                "name": name(arm),
                "stages": chain,
                "learned_after": {data: min(i, len(chain) - 1) for i, data in enumerate(names)},
                "runs": runs,
                "summary": {key: {"mean": value} for key, value in numbers.items()},
            }
        )
    return {"compare": name(99), "distributions": names, "arms": found}


def inspected(name: Name, stages: int) -> dict[str, Any]:
    """Two layers, two experts a stage."""
    names = [name(i) for i in range(stages)]
    experts = 2 * stages
    shares = np.random.default_rng(0).uniform(0, 1, (experts, experts)).tolist()
    shares[0][0] = None
    known = {"nats": 0.5, "null_mean": 0.1, "null_95": 0.2}
    layer = {
        "experts": [f"{one}/L0/E{i}" for one in names for i in (0, 1)],
        "token": known,
        "distribution": known if stages > 1 else None,
        "leak": {data: 0.25 for data in names},
        "coactivation": shares,
        "similarity": shares,
    }
    saturation = {stage: {data: [0.5, 0.25] for data in names} for stage in names[:-1]}
    return {"run": name(99), "tokens": dict.fromkeys(names, 9), "layers": [layer] * 2, "saturation": saturation}


def matrix(name: Name, stages: int, arms: int) -> Figure:
    names = [name(i) for i in range(stages)]
    return run.loss_matrix_figure(name(99), losses(stages, stages), names, names, init=np.full(stages, 9.5))


def curves(name: Name, stages: int, arms: int) -> Figure:
    names = [name(i) for i in range(stages)]
    return run.curves_figure(name(99), losses(stages, stages), names, names, init=np.full(stages, 9.5))


def load(name: Name, stages: int, arms: int) -> Figure:
    counts = {name(i): np.full((2, 2 * stages), 1000 + i) for i in range(stages)}
    return run.expert_load_figure(name(99), counts, [name(i) for i in range(stages) for _ in (0, 1)])


def mixtures(name: Name, stages: int, arms: int) -> Figure:
    found = {name(i): losses(2, 11)[1].tolist() for i in range(stages)}
    found[name(0)][3] = float("nan")
    return interpolation.interpolation_figure(name(99), np.linspace(0, 1, 11).tolist(), found, [name(0)], name(0))


def inspection(kind: str) -> Callable[[Name, int, int], Drawn]:
    return lambda name, stages, arms: specialization.inspection_figures(inspected(name, stages), name(stages - 1)).get(
        kind
    )


FIGURES: Mapping[str, Callable[[Name, int, int], Drawn]] = {
    "matrix": matrix,
    "curves": curves,
    "load": load,
    "mixtures": mixtures,
    "compared_pareto": lambda *case: comparison.pareto_figure(compared(*case)),
    "compared_curves": lambda *case: comparison.curves_figure(compared(*case)),
    "compared_leak": lambda *case: comparison.leak_figure(compared(*case)),
    **{kind: inspection(kind) for kind in specialization.FIGURES},
}
CASES = {"one": (1, 1), "few": (2, 2), "many": (20, 30)}
"""Stages and arms; what few short names look like, the tests of each figure see."""
NAMED = [("one", long), ("few", long), ("many", long), ("many", short)]


def drawn(figure: Figure, patch: pytest.MonkeyPatch) -> tuple[Any, list[Text]]:
    """Draw a figure; returns its renderer and all texts that it really drew."""
    texts: list[Text] = []
    draw = Text.draw

    def remember(self: Text, renderer: Any) -> None:
        texts.append(self)
        draw(self, renderer)

    canvas = FigureCanvasAgg(figure)
    with patch.context() as context:
        context.setattr(Text, "draw", remember)
        canvas.draw()
    return canvas.get_renderer(), [text for text in texts if text.get_visible() and text.get_text().strip()]


def outline(text: Text, renderer: Any) -> np.ndarray:
    """Corners of a text in pixels, tilted as it is ``(4, 2)``, a pixel smaller at each side."""
    angle = text.get_rotation()
    if angle % 90:
        assert text.get_rotation_mode() == "anchor"
    else:
        box = Text.get_window_extent(text, renderer).padded(-1.0)
        return np.array([(box.x0, box.y0), (box.x1, box.y0), (box.x1, box.y1), (box.x0, box.y1)])
    text.set_rotation(0)
    box = Text.get_window_extent(text, renderer).padded(-1.0)
    text.set_rotation(angle)
    corners = np.array([(box.x0, box.y0), (box.x1, box.y0), (box.x1, box.y1), (box.x0, box.y1)])
    anchor = text.get_transform().transform(text.get_position())
    cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    return (corners - anchor) @ np.array([[cos, sin], [-sin, cos]]) + anchor


def test_the_test_sees_what_is_cut_or_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = Figure()
    for place, angle in ((0.5, 30), (0.52, 30), (0.9, 0)):
        figure.text(place, 0.5, "a long text", rotation=angle, rotation_mode="anchor")
    renderer, texts = drawn(figure, monkeypatch)
    first, second, third = (outline(text, renderer) for text in texts)
    assert overlap(first, second) and not overlap(first, third)
    assert [line[:11] for line in outside(figure, renderer, texts)] == ["a long text"]


def overlap(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two rectangles overlap: no direction of a side parts them."""
    for corners in (one, other):
        for side in (corners[1] - corners[0], corners[2] - corners[1]):
            ours, theirs = one @ side, other @ side
            if ours.max() <= theirs.min() or theirs.max() <= ours.min():
                return False
    return True


def outside(figure: Figure, renderer: Any, texts: list[Text]) -> Iterator[str]:
    """What lies beyond the canvas by more than a pixel."""
    width, height = figure.canvas.get_width_height()
    legends = [*figure.legends, *filter(None, (axes.get_legend() for axes in figure.axes))]
    for artist in [*texts, *legends, *figure.axes]:
        if isinstance(artist, Text):
            box = Text.get_window_extent(artist, renderer)
        else:
            box = artist.get_window_extent(renderer)
        if box.x0 < -1 or box.y0 < -1 or box.x1 > width + 1 or box.y1 > height + 1:
            yield f"{artist.get_text() if isinstance(artist, Text) else artist}: {box} of {width} x {height}"


@pytest.mark.parametrize(("case", "name"), NAMED)
@pytest.mark.parametrize("kind", FIGURES)
def test_nothing_is_cut_or_covered(kind: str, case: str, name: Name, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = FIGURES[kind](name, *CASES[case])
    if figure is None:
        return
    renderer, texts = drawn(figure, monkeypatch)
    assert not list(outside(figure, renderer, texts))
    outlines = [outline(text, renderer) for text in texts]
    boxes = np.array([[*corners.min(axis=0), *corners.max(axis=0)] for corners in outlines])
    # Of all pairs the few whose upright boxes overlap.
    near = (boxes[:, None, :2] < boxes[None, :, 2:]).all(-1)
    near &= near.T
    pairs = [(i, j) for i, j in np.argwhere(near) if i < j]
    assert not [(texts[i].get_text(), texts[j].get_text()) for i, j in pairs if overlap(outlines[i], outlines[j])]


def test_grey_alone_tells_lines_and_values_apart() -> None:
    styles = [drawing.line_style(index) for index in range(60)]
    assert len({(style["color"], style["marker"]) for style in styles}) == 60
    assert len({(style["marker"], style["fillstyle"]) for style in styles[:30]}) == 30
    for name in (drawing.LOSS_COLOURS, drawing.LOAD_COLOURS, drawing.COSINE_COLOURS, "viridis"):
        luma = colormaps[name](np.linspace(0, 1, 64))[:, :3] @ np.array([0.299, 0.587, 0.114])
        steps = np.diff(luma)
        assert (steps > 0).all() or (steps < 0).all(), name


@pytest.mark.parametrize("kind", FIGURES)
def test_a_title_names_the_run_and_says_what_was_found(kind: str) -> None:
    figure = FIGURES[kind](short, 3, 3)
    assert figure is not None
    name, _, message = figure.get_suptitle().partition(": ")
    assert name == "n99" and re.match(r"[^\n]*\d", message)
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes[:1])


def test_names_are_shown_as_they_are() -> None:
    assert drawing.shown("a_b.c-d") == "a_b.c-d"
    assert drawing.shown("$x$") == r"\$x\$"  # matplotlib's way to write dollars
    assert drawing.shown("語\u202e\n") == r"\u8a9e\u202e\n"
    assert drawing.shown("a" * 20 + "b" * 20) == "a" * 12 + "…" + "b" * 11


def test_names_without_room_become_numbers_with_a_key() -> None:
    names = ["english", "python", "cpp"]
    assert drawing.ticks_across(names, 1.0, "stages").labels == names
    tilted = drawing.ticks_across(names, 0.4, "stages")
    assert (tilted.labels, tilted.tilt, tilted.key) == (names, 30, "")
    numbers = drawing.ticks_across(names, 0.2, "stages")
    assert (numbers.labels, list(numbers.places)) == (["1", "3"], [0, 2])
    assert numbers.key == "stages: 1 = english, 2 = python, 3 = cpp"
    assert drawing.ticks_beside(["a"] * 41, 0.1, "arms").key == "arms: 1 = a, …, 41 = a"
