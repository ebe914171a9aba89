"""A run in MLflow: a parent run, one child per stage, datasets, figures, notes and registered versions."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

from lifelong_moe.config.data import patterns
from lifelong_moe.config.load import whole_config, written_config
from lifelong_moe.evaluation.evaluation import Evaluation
from lifelong_moe.measures import MEASURES
from lifelong_moe.plan.planned import PlannedStage
from lifelong_moe.reports.report import Report
from lifelong_moe.store.head import MlflowState
from lifelong_moe.store.lineage import lineage_rows
from lifelong_moe.store.logged import LoggedMetrics, read_logged, write_logged
from lifelong_moe.store.runs import OpenRun, trained_by
from lifelong_moe.store.stages import CommittedStage, StageStore
from lifelong_moe.tracking.operations import MODEL_PREFIX, local_id
from lifelong_moe.tracking.tracker import Tracker
from lifelong_moe.training.callbacks.points import Row
from pipelines.run import render
from pipelines.run.compared import Compared
from pipelines.run.pictures import FOLDER, PAGE, drawn, is_written, write_pages
from pipelines.run.rows import cost_rows, row, summary_rows, usage_rows
from pipelines.shared.markdown import plain
from pipelines.shared.record_params import CONFIG, config_yaml, run_params, stage_params
from pipelines.shared.recorded import show_champion
from pipelines.shared.workspace import ROOT, Prepared

RECORD = 3
"""Raised where MLflow gets more of a run than before, so that it gets it of earlier ones too."""


class MlflowRecord:
    """Logs a run; the run's head holds what was logged, so continuing appends and repeating adds nothing.

    Args:
        tracker: Connection to MLflow, if there is any.
        prepared: The run.
        opened: Its head holds what was logged.
        content: Key of everything to be recorded: stages and evaluations.
        trains: Whether stages are left to train.
        compared: The run's place in a comparison, if it belongs to one. Its stages are then not registered: a
            comparison makes many models, of which most are made to be compared.
    """

    def __init__(
        self,
        tracker: Tracker,
        prepared: Prepared,
        opened: OpenRun,
        content: str,
        trains: bool,
        compared: Compared | None = None,
    ) -> None:
        self.tracker, self.prepared, self.opened, self.content = tracker, prepared, opened, content
        self.compared = compared
        self._known: dict[tuple[str, str], Mapping[str, float]] = {}
        """What MLflow has of a stage, by its run and the stage, as read or written last; of this stage and the last."""
        self._open: str | None = None
        self._tokens = 0
        """Trained on in all stages before the one that is trained now."""
        self._step_tokens = 0
        """Of a step of that stage; 0 for a model from scratch beside the run."""
        # Printed already when the connection was made; `run_done` prints only another one.
        self._told = tracker.problem
        # If MLflow has exactly this content, nothing is sent at all.
        known = self.told.run if self.told.content == content else None
        self.active = tracker.active and not (known and tracker.run_exists(known))
        if self.active:
            self._start(adds=not trains)

    @property
    def told(self) -> MlflowState:
        """What MLflow knows of the run by now."""
        return self.opened.head.mlflow

    def _tell(self, **changes: Any) -> None:
        self.opened.save(self.opened.head.with_mlflow(**changes))

    def _start(self, *, adds: bool) -> None:
        config, compared = self.prepared.config, self.compared
        params = run_params(self.prepared)
        tags = {"lifelong.run": config.run, "lifelong.kind": "run", "lifelong.method": config.method.value}
        name, parent = config.run, None
        if compared is not None:
            name, parent = compared.name, compared.parent
            params, tags = params | compared.settings, tags | compared.tags
        known = self.told.run or local_id()
        # Persist the id first, so a killed process can resume this MLflow run.
        self._tell(run=known)
        run_id = self.tracker.start_run(name, run_id=known, parent_id=parent, params=params, tags=tags, adds=adds)
        if run_id is None:
            return
        # Runs that --replace started over stay in MLflow, marked with their successor.
        for old in self.told.replaced:
            self.tracker.replaced(old, run_id)
        # MLflow made a new run, because it is the first or the old one was deleted: it holds no stages and no points.
        self._tell(replaced=(), **({"run": run_id, "stages": {}, "logged": {}} if run_id != known else {}))
        self.tracker.log_text(run_id, config_yaml(whole_config(self.prepared.loaded.raw)), CONFIG)
        for name, record in self.prepared.data.records.items():
            context = "training" if name in config.trained else "evaluation"
            self._dataset(run_id, name, record.train_hash, context)

    @cached_property
    def _sources(self) -> Mapping[str, Any]:
        """Where the text of each distribution is from, once a run: it takes a copy of the whole configuration."""
        # As written: an interpolation of a secret must not be resolved into MLflow.
        return {str(key): value for key, value in written_config(self.prepared.loaded.raw)["distributions"].items()}

    def _dataset(self, run_id: str | None, name: str, digest: str, context: str) -> None:
        record = self.prepared.data.records[name]
        source = self._sources[name]
        if not isinstance(source, str):
            named = ", ".join(patterns(source.get("files")))
            source = source.get("builtin") or named or f"{source['hf']}@{source['revision']}"
        profile = {
            "documents": record.documents,
            "tokens": record.tokens,
            "bytes_per_token": round(record.bytes_per_token, 3),
            "near_copies": len(record.left_out),
        }
        self.tracker.log_dataset(run_id, name=name, digest=digest[:32], context=context, source=source, profile=profile)

    def stage_begins(self, planned: PlannedStage, *, adds: bool = False) -> str | None:
        """Start the stage's child run, or resume it; ``adds`` if the stage is committed already."""
        if not self.active:
            return None
        spec = planned.spec
        self._step_tokens = 0 if planned.is_from_scratch else spec.optim.batch_tokens
        tags = {"lifelong.run": self.prepared.config.run, "lifelong.kind": "stage", "lifelong.stage_key": planned.key}
        params = stage_params(planned)
        # As reports count the stages, without a checkpoint that the run began with.
        title = self.prepared.config.run if self.compared is None else self.compared.title
        name = f"{title} · {planned.depth - self.prepared.config.base.is_given} {spec.name}"
        # The same as for the parent: the id is persisted before MLflow hears of it.
        known = self.told.stages.get(planned.key) or local_id()
        self._tell(stages={**self.told.stages, planned.key: known})
        run_id = self.tracker.start_run(
            name, run_id=known, parent_id=self.told.run, params=params, tags=tags, adds=adds
        )
        if run_id is None:
            return None
        self._open = run_id
        self._tell(stages={**self.told.stages, planned.key: run_id})
        # A distribution that is learned and replayed is logged once, as training.
        contexts = dict.fromkeys(spec.learns, "training")
        # Replay of generated text is absent here: it reads no distribution.
        for context, names in (("replay", spec.reads), ("fisher", spec.fisher_data)):
            for distribution in names:
                contexts.setdefault(distribution, context)
        for distribution, context in contexts.items():
            self._dataset(run_id, distribution, self.prepared.data.records[distribution].train_hash, context)
        return run_id

    def curves(self, run_id: str | None, points: list[Row]) -> None:
        """Log training curves of a stage."""
        if self.active:
            self.tracker.log_metrics(run_id, points)
            self.tracker.log_metrics(self.told.run, self._over_tokens(points))

    def _over_tokens(self, points: list[Row]) -> list[Row]:
        """The loss of a stage's points once more, at the number of tokens that the run has trained on by then."""
        return [
            row("train_over_tokens", value, self._tokens + step * self._step_tokens)
            for key, value, step in points
            if key == MEASURES["loss"].metric and self._step_tokens
        ]

    def stage_done(self, planned: PlannedStage, stage: CommittedStage, report: Report, shared: bool) -> None:
        """Log what the run has reached and the stage used, and register the stage as a model version."""
        if not self.active:
            return
        # No child run is open if this process did not train the stage: it is shared, or was committed before a kill.
        if self._open is None:
            self.stage_begins(planned, adds=True)
        run_id = self.told.stages.get(planned.key)
        # Its place in the report, in which a checkpoint that the run began with is no stage.
        index = len(report.stages) - 1
        note = render.stage_note(report, index, self._origin(planned.key) if shared else "")
        own, so_far = report.stages[index], report.stages[: index + 1]
        # The run's alone: a stage's page begins with its curves, and copies of these points would stand before them.
        before = self._logged(report.stages[index - 1].key) if index else {}
        self._log(planned, self.told.run, {"": summary_rows(report, before), "run/": cost_rows(so_far, index)})
        self._tokens = sum(stage.tokens for stage in so_far)
        final = own.training.get("final", {}).get("train/loss")
        if shared and final is not None:
            # Its curve stands in the other run; here at least where it ended, so that later stages go on from there.
            self._log(planned, self.told.run, {"": [row("train_over_tokens", final, self._tokens)]})
        self._log(planned, run_id, {"": usage_rows(own.tokens, own.active_flops, own.seconds, index, own.training)})
        self.tracker.set_note(run_id, note)
        config = self.prepared.config
        tags = {
            "stage_key": planned.key,
            "stage": planned.spec.name,
            "run": config.run,
            "data": ", ".join(planned.spec.new),
        }
        if planned.parent_key:
            tags["parent_key"] = planned.parent_key
        tags["weights_sha256"] = stage.weights_hash
        if self.compared is None:
            model = f"{MODEL_PREFIX}{config.run}"
            self.tracker.register_version(model, run_id=run_id, tags=tags, description=note)
        self.tracker.finish(run_id)
        self._open = None
        self._known = {of: points for of, points in self._known.items() if of[1] == planned.key}

    def _origin(self, stage: str) -> str:
        """Markdown that names the run which trained a stage, with a link to the page that has its curves."""
        head = trained_by(ROOT, stage)
        if head is None:
            return "another run"
        name, known = plain(head.run), head.mlflow.stages.get(stage)
        page = self.tracker.run_page(known) if known else ""
        return f"[{name}]({page})" if page else name

    def scratch_done(self, planned: PlannedStage, stage: CommittedStage, own: Mapping[str, Evaluation]) -> None:
        """Log a model trained from scratch: its distributions' loss, on the parent; its cost, on a child of its own.

        Reports count the cost apart from the run's.

        Args:
            planned: The stage that begins from scratch.
            stage: It, committed.
            own: Its evaluation on what it learned, by distribution; without one whose held-out text is gone.
        """
        if not self.active:
            return
        if self._open is None:
            self.stage_begins(planned, adds=True)
        run_id = self.told.stages.get(planned.key)
        losses = [row("from_scratch", found.bits_per_byte, 0, name) for name, found in own.items()]
        self._log(planned, self.told.run, {"": losses})
        used = usage_rows(planned.tokens, planned.flops, stage.metrics["seconds"], 0, stage.metrics)
        self._log(planned, run_id, {"": used})
        self.tracker.finish(run_id)
        self._open = None

    def _log(self, planned: PlannedStage, target: str | None, rows: Mapping[str, list[Row]]) -> None:
        """Log the points that MLflow does not have yet.

        Args:
            planned: The stage that they are of.
            target: MLflow's run that gets them.
            rows: By what is put before their names where they are noted, which tells the run's from the stage's own.
        """
        if self.told.run is None:
            return
        logged = self._logged(planned.key)
        # MLflow keeps every point, so one logged again would appear twice in its charts.
        new = {
            place + one[0]: one for place, each in rows.items() for one in each if logged.get(place + one[0]) != one[1]
        }
        self.tracker.log_metrics(target, new.values())
        if new and self.tracker.active:
            now = {**logged, **{name: value for name, (_, value, _) in new.items()}}
            write_logged(self._noted, LoggedMetrics(self.told.run, planned.key, now))
            self._known[self.told.run, planned.key] = now

    @property
    def _noted(self) -> Path:
        return self.opened.record.path / "logged"

    def _logged(self, stage: str) -> Mapping[str, float]:
        """The points that MLflow has of a stage."""
        if self.told.run is None:
            return {}
        of = self.told.run, stage
        if of not in self._known:
            # Those that an earlier version noted in the head stay there, and are logged no second time either.
            self._known[of] = {**self.told.logged.get(stage, {}), **read_logged(self._noted, *of)}
        return self._known[of]

    def run_done(self, report: Report, console: Console) -> None:
        """Write pictures and report to the run's folder, log them and the parent's note, and finish it."""
        folder, images = self.opened.record.path, dict[str, bytes]()
        keeps = not is_written(folder, report)
        # Once a run: to draw them costs what stages times distributions cost.
        if self.active or keeps:
            images = dict(drawn(report, self.prepared.plan))
        if keeps:
            write_pages(folder, report, lineage_rows(StageStore(ROOT), self.opened.head.stages), images)
        if self.compared is None:
            console.print(f"Report: {folder / PAGE} and report.json; pictures: {folder / FOLDER}/")
        if self.active:
            for name, image in images.items():
                self.tracker.log_image(self.told.run, image, f"figures/{name}")
            self.tracker.set_note(self.told.run, render.run_note(report))
            self.tracker.log_text(self.told.run, render.report_json(report), "report.json")
            self.tracker.finish(self.told.run)
            # Last, so a process killed before logs the rest when it continues.
            self._tell(content=self.content if self.tracker.active else None)
        # The spool got the request when the run was new; asking again would only repeat it.
        if self.compared is None and (self.active or self.tracker.connected):
            show_champion(self.opened.head, self.tracker)
        # A comparison prints the address of all its runs.
        shown = self.told.run if self.compared is None else None
        if shown and (link := self.tracker.ui_url(shown)):
            # Folded by us, it could be neither clicked nor copied.
            console.print(f"MLflow: {link}{self.tracker.starting}", soft_wrap=True)
        elif self.tracker.problem != self._told:
            console.print(self.tracker.problem, style="yellow")

    def ended_by(self, error: BaseException) -> None:
        """Finish open runs with the error; continuing resumes them."""
        if self.active:
            for run_id in (self._open, self.told.run):
                if run_id is not None:
                    self.tracker.finish(run_id, error)
