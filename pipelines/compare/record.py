"""Record a comparison: in files, and in MLflow as one parent run with the arms' runs below it.

``mlruns/comparisons/<name>/`` holds ``comparison.json``, ``comparison.md``, ``figures/`` and ``head.json``. Several
processes may work on one comparison; each holds a lock while it records.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lifelong_moe.plan.comparison import Comparison
from lifelong_moe.redaction import redact, shown_address, without_credentials
from lifelong_moe.reports.comparison import SCHEMA, ArmResult, build_comparison
from lifelong_moe.reports.figures.comparison import comparison_figures
from lifelong_moe.storage.files import write_atomic
from lifelong_moe.storage.keys import content_key
from lifelong_moe.tracking.operations import local_id
from lifelong_moe.tracking.pages.views import View, comparison_view
from lifelong_moe.tracking.tracker import Tracker
from pipelines.compare import render as render_comparison
from pipelines.compare.head import ComparisonHead, ComparisonMlflow, head_to_change
from pipelines.compare.jobs import Job
from pipelines.compare.numbers import MEANS, log_means, log_progress, log_runs
from pipelines.run.compared import COMPARISON, Compared
from pipelines.shared.workspace import ROOT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RECORD = 4
"""Raised where MLflow gets more of a comparison than before, so that it gets it of earlier ones too."""


class ComparisonRecord:
    """Keeps the files and MLflow up to date with what is committed; recording the same again changes nothing.

    Args:
        comparison: The comparison.
        jobs: All of its runs.
        tracker: Connection to MLflow, if there is any.
    """

    def __init__(self, comparison: Comparison, jobs: list[Job], tracker: Tracker) -> None:
        self.comparison, self.jobs, self.tracker = comparison, jobs, tracker
        self.path = ROOT / "comparisons" / comparison.settings.compare
        self._begun = False
        """Whether the parent run was started, and is to be ended."""
        # Persist the id before MLflow hears of it, so a process killed in between resumes the same parent run.
        with head_to_change(self.path) as head:
            if self.tracker.active and head.mlflow.run is None:
                head.mlflow.run = local_id()
        # Started under the lock, so that of several processes one creates the run and the others resume it.
        with head_to_change(self.path) as head:
            self.parent = head.mlflow.run if self._is_told(head) else self._start(head.mlflow.run)
            if self.parent != head.mlflow.run:
                # A new run, as when the old one was deleted, shows nothing yet.
                head.mlflow.content = None
            head.mlflow.run = self.parent

    def _is_told(self, head: ComparisonHead) -> bool:
        """Whether MLflow shows all of the comparison, and the run that shows it has ended."""
        reports = {job.run: report for job in self.jobs if (report := job.report())}
        known = head.mlflow.run
        if known is None or len(reports) < len(self.jobs) or not self.tracker.has_ended(known):
            return False
        return head.mlflow.content == content_key([RECORD, self._compare(reports, {})])

    def _start(self, known: str | None) -> str | None:
        self._begun = True
        settings = self.comparison.settings
        params = {
            "base": settings.base,
            "budget": settings.budget,
            "seeds": settings.seeds,
            "reference": self.comparison.reference,
            "unrestrained": settings.unrestrained,
            "joint": settings.joint,
            "overrides": list(_shown(self.comparison.common)),
            "arms": {arm.name: " ".join(_shown(arm.overrides)) for arm in self.comparison.arms},
        }
        tags = {"lifelong.kind": "comparison", "lifelong.comparison": settings.compare}
        adds = all(job.report() is not None for job in self.jobs)
        return self.tracker.start_run(settings.compare, run_id=known, params=params, tags=tags, adds=adds) or known

    def place(self, job: Job) -> Compared:
        """A run's place in the comparison."""
        config = job.prepared.config
        return Compared(
            comparison=self.comparison.settings.compare,
            parent=self.parent,
            arm=job.arm.name,
            seed=job.seed,
            method=config.method.value,
            routing=config.routing.mode,
        )

    def record_failure(self, job: Job, reason: str) -> None:
        """Record that a run failed, and why."""
        with head_to_change(self.path) as head:
            head.failed[job.run] = reason

    def update(self) -> Mapping[str, Any]:
        """Compare what is committed so far, and bring the files and MLflow up to date; returns the comparison."""
        with head_to_change(self.path) as head:
            reports = {job.run: report for job in self.jobs if (report := job.report())}
            # A later attempt may have committed what failed before.
            head.failed = {run: reason for run, reason in head.failed.items() if run not in reports}
            found = self._compare(reports, head.failed)
            content = content_key([RECORD, found])
            stale, unseen = head.content != content, head.mlflow.content != content
            if stale or (unseen and self.tracker.active):
                figures = comparison_figures(found)
                # Files first: they are complete even if MLflow is unreachable.
                self._write(found, figures)
                head.content = content
                self._log(found, figures, head.mlflow)
                head.mlflow.content = content if self.tracker.active else None
        return found

    def _compare(self, reports: Mapping[str, Any], failed: Mapping[str, str]) -> Mapping[str, Any]:
        """The comparison of what is committed, from the reports of runs and the reasons of failed ones, by name."""
        settings = self.comparison.settings
        arms = []
        for arm in self.comparison.arms:
            jobs = {job.seed: job for job in self.jobs if job.arm is arm}
            done = {seed: reports[job.run] for seed, job in jobs.items() if job.run in reports}
            reasons = {seed: failed[job.run] for seed, job in jobs.items() if job.run in failed}
            # A seed changes no other setting, so any of the arm's runs tells its method.
            method = next(iter(jobs.values())).prepared.config.method.value
            names = {seed: job.run for seed, job in jobs.items()}
            arms.append(ArmResult(arm.name, method, _shown(arm.overrides), names, done, reasons))
        compared = build_comparison(
            arms, reference=self.comparison.reference, unrestrained=settings.unrestrained, joint=settings.joint
        )
        return {
            "schema": SCHEMA,
            "compare": settings.compare,
            "budget": settings.budget.value,
            "base": str(self.comparison.base),
            "overrides": list(_shown(self.comparison.common)),
            "seeds": settings.seeds,
            **compared,
        }

    def _write(self, found: Mapping[str, Any], figures: Mapping[str, Figure]) -> None:
        write_atomic(self.path / "comparison.json", json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False))
        write_atomic(self.path / "comparison.md", render_comparison.markdown(found))
        (self.path / "figures").mkdir(exist_ok=True)
        for name, figure in figures.items():
            figure.savefig(self.path / "figures" / name)

    def _log(self, found: Mapping[str, Any], figures: Mapping[str, Figure], mlflow: ComparisonMlflow) -> None:
        """Log numbers on the arms' runs, figures and tables on the parent."""
        if not self.tracker.active:
            return
        places = {job.run: self.place(job) for job in self.jobs}
        log_runs(self.tracker, found, places, mlflow)
        log_means(self.tracker, found, places, mlflow)
        log_progress(self.tracker, self.parent, found, mlflow)
        for name, figure in figures.items():
            self.tracker.log_figure(self.parent, figure, f"figures/{name}")
        table = render_comparison.markdown(found)
        self.tracker.log_text(self.parent, table, "comparison.md")
        self.tracker.log_text(self.parent, json.dumps(found, indent=1, ensure_ascii=False), "comparison.json")
        # Whoever comes upon this page has not seen the addresses that the command printed. First: MLflow cuts notes.
        titles = " and ".join(f"“{view.title}”" for view in self._views())
        # The verdict before all else, as on a run's page.
        said, _, rest = table.partition("\n\n")
        note = f"{said}\n\nIn the list of runs, the menu at the top right has {titles}.\n\n{rest}"
        self.tracker.set_note(self.parent, note)
        for tag in self._choices():
            self.tracker.save_view(self.parent, tag, found["compare"])

    def _choices(self) -> tuple[str, ...]:
        """Tags of the runs that people look at: of each seed, and of several seeds the means."""
        return (COMPARISON, MEANS) if len(self.comparison.settings.seeds) > 1 else (COMPARISON,)

    def _views(self) -> list[View]:
        return [comparison_view(tag, self.comparison.settings.compare) for tag in self._choices()]

    def finish(self, console: Console, error: BaseException | None = None) -> None:
        """End the parent run, as failed if there is an error, and print where the results are."""
        if self._begun:
            self.tracker.finish(self.parent, error)
        console.print(f"Comparison: {self.path / 'comparison.md'}, comparison.json and figures/")
        view, *means = self._views()
        if self.parent and (link := self.tracker.view_url(view)):
            # Folded by us, it could be neither clicked nor copied.
            console.print(f"MLflow: {link}{self.tracker.starting}", soft_wrap=True)
            for view in means:
                console.print(f"Means over seeds: {self.tracker.view_url(view)}", soft_wrap=True)
        elif self.tracker.problem:
            console.print(self.tracker.problem, style="yellow")


def _shown(overrides: Sequence[str]) -> tuple[str, ...]:
    """Overrides without secrets: one of them may be a tracking URI."""
    return tuple(map(_shown_override, overrides))


def _shown_override(override: str) -> str:
    key, _, value = override.partition("=")
    return f"{key}={shown_address(value)}" if key == "tracking.uri" else without_credentials(redact(override))
