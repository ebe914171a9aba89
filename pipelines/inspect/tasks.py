"""`lifelong-moe evaluate --tasks`: scores of a run's stages on tasks of lm-evaluation-harness, stage by task."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from lifelong_moe.errors import ConfigError, CorruptError
from lifelong_moe.storage.files import write_atomic
from lifelong_moe.storage.grammars import Key, RunId
from lifelong_moe.storage.keys import canonical_json
from lifelong_moe.storage.plain import from_plain
from lifelong_moe.storage.stored import read_stored
from lifelong_moe.store.evaluations import EvaluationStore
from lifelong_moe.store.head import RunHead
from lifelong_moe.store.runs import RunRecord, require_head
from lifelong_moe.store.stages import CommittedStage, StageStore
from pipelines.inspect.opening import check_label, open_stage, open_stages, step_of
from pipelines.shared.places import ROOT
from pipelines.shared.recorded import tracker_of, tracking_of
from pipelines.shared.tables import show

if TYPE_CHECKING:
    from lifelong_moe.evaluation.tasks import LoadedTask, TaskScores

Matrix = Mapping[str, Mapping[str, "TaskScores"]]
"""Scores by stage and task."""


@dataclass(frozen=True)
class Recorded:
    """What MLflow has of a run's scores (``tasks.json``), so that no point is sent twice."""

    mlflow_run: RunId | None = None
    points: Mapping[Key, Mapping[str, float]] = field(default_factory=dict)
    """By the stage's key, and by metric."""


def evaluate_tasks(
    run: str, stage: str | None, tasks: Sequence[str], label: str | None, console: Console, *, int8: bool = False
) -> Mapping[str, Any]:
    """Put tasks to the stages of a run; scores that are stored are not computed again.

    Args:
        run: A run.
        stage: Name of a committed stage; all of them if None.
        tasks: YAML files, or names that the harness has, one or several with commas between them.
        label: Domain of the tasks' text, for routing by label; a stage that does not know it yet takes its oldest.
        console: Where people read.
        int8: Hold the weight matrices in 8 bits.

    Raises:
        ConfigError: If the harness is not installed, or a stage, a task or what it reads is not there.
    """
    files, names = _named(tasks)
    if find_spec("lm_eval") is None:
        raise ConfigError("--tasks: lm-evaluation-harness is not installed: pip install 'lifelong-moe[lm-eval]'.")
    chosen = open_stages(run) if stage is None else {stage: open_stage(run, stage)[1]}
    check_label([*chosen.values()][-1], label, console)
    _stay_offline()
    from lifelong_moe.evaluation.tasks import load_tasks

    loaded = load_tasks(files, names)
    matrix = _measured(run, chosen, loaded, console, label=label, int8=int8)
    _show(console, run, loaded, matrix)
    if not int8:
        _record(require_head(ROOT, run), {name: one.key for name, one in chosen.items()}, matrix, console)
    return {
        "run": run,
        "stages": {name: one.key for name, one in chosen.items()},
        "tasks": {one.name: {"higher_is_better": dict(one.higher_is_better)} for one in loaded},
        "scores": {name: {task: asdict(scores) for task, scores in row.items()} for name, row in matrix.items()},
    }


def _named(tasks: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is asked for, each once: files, and names."""
    given = dict.fromkeys(one for several in tasks for one in several.split(",") if one)
    files = [one for one in given if one.endswith((".yaml", ".yml")) or "/" in one]
    for one in files:
        if not Path(one).is_file():
            raise ConfigError(f"--tasks={one}: no such file.")
    if not given:
        raise ConfigError("--tasks: names no task.")
    return files, [one for one in given if one not in files]


def _stay_offline() -> None:
    """Let libraries that would load datasets from a hub take files and their cache alone; they read this once."""
    for switch in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ.setdefault(switch, "1")
    # Bars show names of others, and redraw their line.
    for switch in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        os.environ.setdefault(switch, "1")


def _measured(
    run: str,
    stages: Mapping[str, CommittedStage],
    tasks: Sequence[LoadedTask],
    console: Console,
    *,
    label: str | None,
    int8: bool,
) -> Matrix:
    from lifelong_moe.evaluation.harness import HarnessModel, Reading
    from lifelong_moe.evaluation.tasks import TaskScores, measure_task
    from pipelines.inspect.harness import subject_of

    kept, store, matrix = EvaluationStore(ROOT), StageStore(ROOT), {}
    keys = {task.name: task.key({"label": label, "int8": int8}) for task in tasks}
    for name, stage in stages.items():
        row, model = {}, None
        for task in tasks:
            scores = kept.find(stage.key, keys[task.name], partial(from_plain, TaskScores))
            if scores is None:
                with console.status(f"{task.name}, stage {name}"):
                    # Loading costs more than most tasks: once a stage, and only if something is missing.
                    if model is None:
                        subject = subject_of(run, store, stage, label=label, int8=int8)
                        model = HarnessModel(subject, Reading(label=label))
                    scores = measure_task(model, task)
                kept.add(stage.key, keys[task.name], asdict(scores))
            row[task.name] = scores
        matrix[name] = row
    return matrix


def _show(console: Console, run: str, tasks: Sequence[LoadedTask], matrix: Matrix) -> None:
    table = Table(title=f"{run}: scores on tasks, ± a standard error", title_justify="left")
    for header in ("task", "metric", "better", *matrix):
        table.add_column(header)
    for task in tasks:
        rows = [row[task.name] for row in matrix.values()]
        for metric in dict.fromkeys(metric for scores in rows for metric in scores.scores):
            better = {True: "higher", False: "lower", None: "–"}[task.higher_is_better.get(metric.partition(",")[0])]
            table.add_row(task.name, metric, better, *(_cell(scores, metric) for scores in rows))
    show(console, table)


def _cell(scores: TaskScores, metric: str) -> str:
    if metric not in scores.scores:
        return "–"
    error = scores.standard_errors.get(metric)
    return f"{scores.scores[metric]:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _record(head: RunHead, keys: Mapping[str, str], matrix: Matrix, console: Console) -> None:
    """Log scores to the run's MLflow run at step = stage index, unless they are there already."""
    tracker, path = tracker_of(head), RunRecord(ROOT, head.run).path / "tasks.json"
    run_id = head.mlflow.run
    target = run_id if run_id and tracker.run_exists(run_id) else None
    try:
        known = read_stored(path, partial(from_plain, Recorded))
    except (FileNotFoundError, CorruptError):
        known = Recorded()
    # Once the run has another MLflow run, everything is logged to that one.
    points = {key: dict(logged) for key, logged in known.points.items()} if known.mlflow_run == target else {}
    for name, row in matrix.items():
        key = keys[name]
        found = {f"tasks/{task}/{metric}": value for task, one in row.items() for metric, value in one.scores.items()}
        logged = points.setdefault(key, {})
        rows = [(one, value, step_of(head, key)) for one, value in found.items() if logged.get(one) != value]
        # The run's page alone: a stage's begins with its training curves.
        tracker.log_metrics(target, rows)
        logged |= found
    if tracker.problem and tracking_of(head).enabled:
        console.print(tracker.problem, style="yellow")
    # Last: if the process dies before, the next one logs again rather than never.
    if target:
        write_atomic(path, canonical_json(asdict(Recorded(target, points))))
