"""`lifelong-moe compare`: train the arms that are not committed yet, and put them side by side.

A run that another process has locked is tried again later. So the same command, started on several machines that share
``mlruns/`` or twice on one, shares the work.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from rich.console import Console

from lifelong_moe.errors import DivergedError, LockedError
from lifelong_moe.plan.comparison import Comparison
from lifelong_moe.store.runs import RunRecord
from lifelong_moe.tracking.tracker import Tracker
from lifelong_moe.training.callbacks.interrupt import handling_signals
from pipelines.compare import render as render_comparison
from pipelines.compare.jobs import Job, Memory, plan_jobs, refuse_taken_names
from pipelines.compare.record import ComparisonRecord
from pipelines.run.file_list import show_data
from pipelines.run.run import run
from pipelines.shared.output import silent
from pipelines.shared.workspace import ROOT

WAIT_SECONDS, MOST_SECONDS = 3.0, 60.0
"""Seconds between two looks at the store, and at most until locked runs are tried again, while other processes hold all
that are left."""


def compare(comparison: Comparison, only: list[str], replace: bool, console: Console) -> Mapping[str, Any]:
    """Run or continue a comparison; returns its ``comparison.json``.

    Args:
        comparison: Arms, and the configuration that they override.
        only: Arms, or grids, to run; all by default.
        replace: Let the runs' names refer to other stages than before.
        console: Where people read.

    Raises:
        ConfigError: If anything about any arm is wrong; nothing was trained then.
        DivergedError: At the end, if runs diverged; the others are committed and compared.
        TryAgainError: If SIGTERM came.
        KeyboardInterrupt: After Ctrl-C; a checkpoint is committed by then.
    """
    with handling_signals():
        chosen, memory = comparison.select(only), Memory()
        with console.status("reading and tokenizing the distributions, planning all arms"):
            jobs = plan_jobs(comparison, memory)
        wanted = [job for job in jobs if job.arm in chosen]
        if not replace:
            refuse_taken_names(wanted)
        if any(job.report() is None for job in wanted):
            show_data(console, jobs[0].prepared)
        record = ComparisonRecord(comparison, jobs, Tracker.connect(jobs[0].prepared.config.tracking, ROOT))
        try:
            train = partial(run, memory=memory)
            with _without_warnings():
                failed = _work(wanted, train, record, replace, console)
            found = record.update()
            render_comparison.terminal(console, found)
            if failed:
                raise DivergedError(
                    f"{len(failed)} of {len(wanted)} runs diverged: {', '.join(failed)}; the others are compared."
                )
        except BaseException as error:
            record.finish(console, error)
            raise
        record.finish(console)
    return found


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Context in which nobody is warned of forgetting: some arms are there to forget, and MLflow has the curves."""
    # By its name, since the module is imported only where something is trained.
    log = logging.getLogger("lifelong_moe.training.callbacks.watch")
    log.disabled = True
    try:
        yield
    finally:
        log.disabled = False


def _work(
    jobs: list[Job], train: Callable[..., object], record: ComparisonRecord, replace: bool, console: Console
) -> list[str]:
    """Train run after run, locked ones last; returns the names of those that diverged."""
    queue, turned_away = deque(jobs), 0
    failed: list[str] = []
    while queue:
        job = queue.popleft()
        complete = job.report() is not None
        how = "committed" if complete else "training"
        render_comparison.heading(console, job.run, f"{how} ({len(jobs) - len(queue)} of {len(jobs)})")
        try:
            # A complete run trains nothing, but may still owe MLflow something; what it reached was printed before.
            quiet = silent() if complete else console
            # Replacing a run that this plan continues would start its record in MLflow over.
            train(job.prepared.loaded, replace and job.is_taken(), quiet, compared=record.place(job))
        except LockedError as error:
            console.print(f"{error} Going on with others.")
            queue.append(job)
            # Every run left was refused in a row: other processes hold all of them.
            turned_away += 1
            if turned_away == len(queue):
                console.print("Other processes work on all that is left; waiting for them.")
                turned_away = 0
                _wait(jobs)
            continue
        except DivergedError as error:
            console.print(f"{job.run}: {error}", style="red")
            record.record_failure(job, str(error))
            failed.append(job.run)
        # Meanwhile a locked run may have become free.
        turned_away = 0
        # What was complete before is compared at the end, once.
        if not complete:
            record.update()
    return failed


def _wait(jobs: list[Job]) -> None:
    """Wait until another process commits a stage or writes a head."""
    # A process that dies does neither; its lock is free then, so the runs are tried again in any case.
    before, deadline = _signs(jobs), time.monotonic() + MOST_SECONDS
    while _signs(jobs) == before and time.monotonic() < deadline:
        time.sleep(WAIT_SECONDS)


def _signs(jobs: list[Job]) -> tuple[set[str], list[int]]:
    """Names of the committed stages, and the modification times of the runs' heads."""
    heads = [RunRecord(ROOT, job.run).path / "head.json" for job in jobs]
    written = [path.stat().st_mtime_ns for path in heads if path.is_file()]
    return {path.name for path in (ROOT / "stages").glob("*")}, written
