"""MLflow record of a tick: a nested run with plan, probes, gate and champion."""

from __future__ import annotations

import dataclasses
import json
import math

from lifelong_moe.config.load import whole_config
from lifelong_moe.data.text.documents import Corpus
from lifelong_moe.plan.retraining import RetrainConfig
from lifelong_moe.retraining.checks import Verdict
from lifelong_moe.store.runs import OpenRun
from lifelong_moe.store.stages import CommittedStage
from lifelong_moe.tracking.operations import local_id
from lifelong_moe.tracking.registry import PENDING
from lifelong_moe.tracking.tracker import Tracker
from lifelong_moe.training.callbacks.points import Row
from pipelines.retrain.outcome import AWAITING, TickOutcome
from pipelines.retrain.plan_file import PlanFacts
from pipelines.retrain.render import tick_note
from pipelines.run.rows import usage_rows
from pipelines.shared.markdown import plain
from pipelines.shared.record_params import CONFIG, config_yaml, stage_params
from pipelines.shared.recorded import model_name, show_champion
from pipelines.versions.candidates import Candidate

# The others hold paths, commands and addresses, which may name secrets.
SHOWN = ("trigger", "drift", "probe", "decision", "gate", "limits")
"""Sections of the retraining file that are logged as params."""


class TickRecord:
    """One MLflow run for each batch; a tick that is repeated resumes it.

    Args:
        tracker: Connection to MLflow, which may be inactive.
        opened: The lifelong run, whose head keeps the MLflow run ids by batch.
    """

    def __init__(self, tracker: Tracker, opened: OpenRun) -> None:
        self.tracker, self.opened = tracker, opened
        self.run_id: str | None = None
        self._registered: dict[str, str] | None = None

    @property
    def model(self) -> str:
        """Name of the registered model."""
        return model_name(self.opened.head)

    def begin(self, name: str, batch: str, corpus: Corpus, settings: RetrainConfig, bad_lines: int) -> None:
        """Start or resume the batch's MLflow run; ``bad_lines`` of the inbox were left out."""
        if not self.tracker.active:
            return
        run, told = self.opened.head.run, self.opened.head.mlflow
        known = told.ticks.get(batch) or local_id()
        # Persist the id first, so that a killed tick resumes this MLflow run.
        self._save_id(batch, known)
        tags = {"lifelong.run": run, "lifelong.kind": "tick", "lifelong.batch": batch}
        params = {section: dataclasses.asdict(getattr(settings, section)) for section in SHOWN}
        self.run_id = self.tracker.start_run(
            f"{run} · {name}",
            run_id=known,
            parent_id=told.run,
            params=params,
            tags=tags,
        )
        # MLflow gives the run an id of its own; offline the local one stays.
        self._save_id(batch, self.run_id or known)
        profile = {"documents": len(corpus.train) + len(corpus.heldout), "held_out": len(corpus.heldout)}
        profile |= {"near_copies": len(corpus.near_copies), "bad_lines": bad_lines}
        self.tracker.log_dataset(
            self.run_id, name=name, digest=corpus.train_hash[:32], context="training", source="inbox", profile=profile
        )

    def _save_id(self, batch: str, run_id: str) -> None:
        head = self.opened.head
        self.opened.save(head.with_mlflow(ticks={**head.mlflow.ticks, batch: run_id}))

    def curves(self, points: list[Row]) -> None:
        """Log training curves of the candidate."""
        self.tracker.log_metrics(self.run_id, points)

    def planned(self, facts: PlanFacts, candidate: Candidate | None) -> None:
        """Log the plan's terms as metrics and the plan as a file; the candidate's settings as params and as a file."""
        rows = [(f"decision/{key}", number(value), 0) for key, value in facts.decision.terms.items()]
        for name, drift in facts.drift.items():
            rows += [(f"drift/{name}/{key}", number(getattr(drift, key)), 0) for key in ("auc", "null_quantile", "psi")]
        if facts.power is not None:
            rows.append(("gate/harmless_passes", facts.power.passes, 0))
        looks = {} if facts.looks is None else dataclasses.asdict(facts.looks)
        rows += [(f"looks/{key}", float(value), 0) for key, value in looks.items() if isinstance(value, (int, float))]
        self.tracker.log_metrics(self.run_id, rows)
        self.tracker.log_text(self.run_id, json.dumps(facts.to_json(), indent=1, ensure_ascii=False), "plan.json")
        if candidate is not None and self.run_id is not None:
            # Resuming an open run only adds to it; it keeps its name.
            self.tracker.start_run("", run_id=self.run_id, params=stage_params(candidate.planned))
            self.tracker.log_text(self.run_id, config_yaml(whole_config(candidate.raw)), CONFIG)

    def candidate(self, stage: CommittedStage, facts: PlanFacts) -> None:
        """Log what the candidate cost, and register it as a model version, before the gate and whatever its verdict."""
        spent = stage.metrics
        rows = usage_rows(spent["tokens"], spent["active_flops"], spent["seconds"], 0, spent)
        self.tracker.log_metrics(self.run_id, rows)
        tags = {"stage_key": stage.key, "stage": stage.name, "run": self.opened.head.run, "data": facts.data}
        tags |= {"parent_key": str(stage.parent), "weights_sha256": stage.weights_hash}
        self.tracker.register_version(self.model, run_id=self.run_id, tags=tags, description=PENDING, alias="candidate")
        self._registered = tags

    def judged(self, verdict: Verdict) -> None:
        """Log the checks of the gate."""
        rows: list[Row] = []
        for check in verdict.checks:
            for what, value in (("value", check.value), ("limit", check.limit), ("passed", float(check.passed))):
                rows.append((f"gate/{check.name}/{what}", value, 0))
        self.tracker.log_metrics(self.run_id, rows)

    def done(self, ended: TickOutcome, facts: PlanFacts, verdict: Verdict | None) -> None:
        """Log the outcome, and end the MLflow run."""
        if self.run_id is None:
            return
        self.tracker.start_run("", run_id=self.run_id, tags={"lifelong.outcome": ended.outcome})
        self.tracker.set_note(self.run_id, tick_note(ended, facts, verdict))
        if self._registered is not None:  # else the registry would show a rejected version as one at the gate
            # What a person decides replaces it, as it replaces nothing else.
            outcome = f"{PENDING}, passed" if ended.outcome == AWAITING else ended.outcome
            said = f"{outcome}: {plain(ended.reason)}."
            self.tracker.register_version(self.model, run_id=self.run_id, tags=self._registered, description=said)
            if ended.outcome not in ("promoted", AWAITING):
                key = self._registered["stage_key"]
                self.tracker.remove_alias(self.model, run_id=self.run_id, stage_key=key, alias="candidate")
        self.tracker.log_text(self.run_id, json.dumps(ended.to_json(), indent=1, ensure_ascii=False), "outcome.json")
        self.tracker.finish(self.run_id)
        # Last: the alias of the champion moves only once its run says why.
        show_champion(self.opened.head, self.tracker)

    def ended_by(self, error: BaseException) -> None:
        """End the MLflow run with the error's status; the next tick resumes it."""
        self.tracker.finish(self.run_id, error)


def number(value: float | None) -> float:
    """A term as a metric; None becomes NaN, which is logged as absent."""
    return math.nan if value is None else float(value)
