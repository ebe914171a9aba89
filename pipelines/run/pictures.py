"""A run's pictures and its page, in the run's folder."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lifelong_moe.plan.architecture import Architecture
from lifelong_moe.plan.planned import PlannedStage
from lifelong_moe.plan.stages import chain
from lifelong_moe.reports.figures import run as figures
from lifelong_moe.reports.pages.run import page_begins, run_page
from lifelong_moe.reports.report import Report
from lifelong_moe.storage.files import write_atomic
from lifelong_moe.storage.opening import open_regular
from lifelong_moe.storage.plain_files import corrupt_if_irregular
from lifelong_moe.store.lineage import LineageRow

NAMES = ("loss_matrix.png", "curves.png", "expert_load.png")
FOLDER, PAGE = "figures", "report.html"


def drawn(report: Report, plan: Sequence[PlannedStage]) -> Iterator[tuple[str, bytes]]:
    """Each picture's name and its PNG, drawn once for whoever wants it."""
    stages, distributions = [stage.name for stage in report.stages], report.distributions
    loss, init = np.array(report.bits_per_byte), np.array(report.bits_per_byte_at_init)
    last = list(report.learned_last().values())
    architecture = chain(list(plan))[len(stages) - 1].architecture
    load = {name: aligned_counts(counts, architecture) for name, counts in report.expert_counts.items()}
    born = [generation.stage for generation in architecture.generations for _ in range(generation.experts)]
    for name in NAMES:
        if name == "expert_load.png":
            figure = figures.expert_load_figure(report.run, load, born)
        else:
            draw = figures.loss_matrix_figure if name == "loss_matrix.png" else figures.curves_figure
            figure = draw(report.run, loss, stages, distributions, init=init, learned_after=last)
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=figure.dpi)
        yield name, image.getvalue()


def is_written(folder: Path, report: Report) -> bool:
    """Whether a run's folder holds the pictures and the page of this report; drawing takes a second or more."""
    page, begins = folder / PAGE, page_begins(report).encode()
    with suppress(FileNotFoundError), corrupt_if_irregular(page), open_regular(page, follow=False) as file:
        return file.read(len(begins)) == begins and all((folder / FOLDER / name).is_file() for name in NAMES)
    return False


def write_pages(folder: Path, report: Report, lineage: Sequence[LineageRow], images: Mapping[str, bytes]) -> None:
    """Write the pictures, and last the page: see :func:`is_written`."""
    for name, image in images.items():
        write_atomic(folder / FOLDER / name, image)
    write_atomic(folder / PAGE, run_page(report, lineage, images))


def aligned_counts(counts: Sequence[Sequence[float]], architecture: Architecture) -> NDArray[np.float64]:
    """Counts by layer with a column for each expert of each generation; NaN where a layer did not grow."""
    columns = [[e < g.experts_in(layer) for g in architecture.generations for e in range(g.experts)]
               for layer in range(len(counts))]  # fmt: skip
    # shape: (layers, experts of all generations)
    array = np.full((len(counts), len(columns[0])), np.nan)
    for row, present, layer in zip(array, columns, counts, strict=True):
        row[np.flatnonzero(present)] = layer
    return array
