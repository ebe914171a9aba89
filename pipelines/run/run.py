"""`lifelong-moe run`: train the stages that are not committed yet, evaluate each, and report."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from lifelong_moe.config.load import LoadedConfig, written_config
from lifelong_moe.config.run import RunConfig
from lifelong_moe.config.training import TrainerConfig
from lifelong_moe.data.formats.progress import telling
from lifelong_moe.data.tokens.prepare import PreparedData
from lifelong_moe.errors import TryAgainError
from lifelong_moe.evaluation.evaluation import Evaluation
from lifelong_moe.evaluation.measurements import Measurements
from lifelong_moe.plan.advice import beginning, idle_retention, noncausal_routing, other_separator, unheld
from lifelong_moe.plan.methods import RECIPES
from lifelong_moe.plan.planned import PlannedStage
from lifelong_moe.plan.spec import BASE, BASE_NAME, own_text
from lifelong_moe.plan.stages import chain
from lifelong_moe.reports.report import Report, RunResults, ScratchReport, StageReport, build_report
from lifelong_moe.reports.verdict import report_verdict
from lifelong_moe.storage.keys import SHORT, content_key
from lifelong_moe.storage.locks import locked
from lifelong_moe.store.evaluations import EvaluationStore
from lifelong_moe.store.readings import ReadingCache
from lifelong_moe.store.runs import OpenRun, RunRecord
from lifelong_moe.store.stages import CommittedStage, StageStore
from lifelong_moe.tracking.tracker import Tracker
from lifelong_moe.training.abandoned import clear_abandoned
from lifelong_moe.training.callbacks.interrupt import Interrupt, handling_signals
from lifelong_moe.training.callbacks.own import allow_own
from lifelong_moe.training.first_centroids import first_centroids, needs_first_centroids
from pipelines.run import render
from pipelines.run.compared import Compared
from pipelines.run.file_list import show_data
from pipelines.run.opening import open_run
from pipelines.run.record import RECORD, MlflowRecord
from pipelines.shared.output import silent
from pipelines.shared.places import remove_abandoned
from pipelines.shared.training import train_stage
from pipelines.shared.workspace import CACHE, ROOT, Prepared, prepare, require_room

if TYPE_CHECKING:
    from lifelong_moe.model.transformer import LanguageModel
    from lifelong_moe.training.loop.context import Outlook

log = logging.getLogger(__name__)


def run(
    loaded: LoadedConfig,
    replace: bool,
    console: Console,
    *,
    memory: dict[str, PreparedData] | None = None,
    compared: Compared | None = None,
) -> Report:
    """Run or continue a run; returns its report.

    Args:
        loaded: Its configuration.
        replace: Let the run's name refer to other stages than before.
        console: Where people read.
        memory: Data that was read before; see :func:`pipelines.shared.workspace.prepare`.
        compared: Its place in a comparison, if it belongs to one.

    Raises:
        ConfigError: If the run's name belongs to another configuration.
        TryAgainError: If another process works on this run, or SIGTERM came.
        KeyboardInterrupt: After Ctrl-C; a checkpoint is committed by then.
        ResourceError: If disk or memory does not suffice.
    """
    with handling_signals() as interrupt:
        remove_abandoned()
        allow_own(loaded.config.trainer)  # its user gave the configuration to this command
        # Once, before a model is loaded.
        ready = cache(partial(_require_trainer, loaded.config.trainer))
        if not _is_finished(loaded):
            ready()  # a device that this machine lacks is refused before anything is written
        with console.status("reading and tokenizing the distributions") as status, telling(status.update):
            prepared = prepare(loaded, memory)
        record, store = RunRecord(ROOT, prepared.config.run), StageStore(ROOT)
        todo = [planned for planned in prepared.plan if store.find(planned.key) is None]
        require_room(todo, prepared.config)
        if todo:
            ready()
        with locked(record.lock_path, f"run {record.run}"):
            opened = open_run(record, prepared, replace)
            # A comparison shows the data once, and its arms differ on purpose.
            _announce(console if compared is None else silent(), prepared, record.path)
            report = _run_stages(prepared, store, opened, interrupt, console, compared, ready)
            # Stages that were there may have been committed before there was a key.
            store.sign(*opened.head.stages, opened.head.centroids)
    if compared is not None:  # a comparison ends with the tables of all its arms
        console.print(" ".join(report_verdict([report])))
        return report
    render.report(console, [report])
    if not todo:
        console.print(f"Nothing to train: all {len(prepared.plan)} stages of {record.run} are committed.")
    render.verdict(console, [report])
    return report


def _is_finished(loaded: LoadedConfig) -> bool:
    """Whether all stages of a run are committed that was begun with the same configuration: it may need no torch."""
    store, head = StageStore(ROOT), RunRecord(ROOT, loaded.config.run).head()
    return (
        head is not None
        and head.config == written_config(loaded.raw)
        and all(store.find(key) is not None for key in head.plan)
    )


def _require_trainer(config: TrainerConfig) -> None:
    from lifelong_moe.training.loop.device import require_trainer

    require_trainer(config)


def _announce(console: Console, prepared: Prepared, folder: Path) -> None:
    """Print the data, and warnings about settings without the effect that they suggest; list files in ``folder``."""
    show_data(console, prepared, folder)
    for sentence in beginning(prepared.config, prepared.data.tokenizer.bos_id, prepared.data.tokenizer.bos_name):
        console.print(sentence)
    for sentence in (
        *prepared.loaded.left_behind,
        *noncausal_routing(prepared.config),
        *idle_retention(prepared.config),
        *other_separator(prepared.config, prepared.data.tokenizer.bos_id),
        *unheld(prepared.config, written_config(prepared.loaded.raw)),
    ):
        console.print(sentence, style="yellow")


def _connect(prepared: Prepared, console: Console) -> Tracker:
    """Connect to MLflow, and print at once why it does not answer."""
    tracker = Tracker.connect(prepared.config.tracking, ROOT)
    if tracker.problem:
        console.print(tracker.problem, style="yellow")
    return tracker


def _run_stages(
    prepared: Prepared,
    store: StageStore,
    opened: OpenRun,
    interrupt: Interrupt,
    console: Console,
    compared: Compared | None,
    ready: Callable[[], None],
) -> Report:
    """Restore or train, evaluate, record: stage after stage; ``ready`` comes before a model. Returns the report."""
    config = prepared.config
    tracker = _connect(prepared, console)
    keys = [planned.key for planned in prepared.plan]
    measurements = _measurements(prepared, store, ready)
    distributions = measurements.known([_init_key(prepared), *keys])
    content = content_key([RECORD, keys, [measurements.key(name) for name in distributions]])
    trains = any(store.find(key) is None for key in keys)
    mlflow = MlflowRecord(tracker, prepared, opened, content, trains, compared)
    report: Report | None = None
    try:
        committed = _begun(prepared, store, opened, console)
        # Forward transfer is measured against the untrained model, or the checkpoint as it came.
        with _evaluating("before training", console) as told:
            init = measurements.evaluations(_init_key(prepared), distributions, told)
        results = _no_results(config, distributions, init)
        for planned in prepared.plan:
            stage = store.find(planned.key)
            shared = stage is not None and planned.key not in opened.head.trained
            if stage is None:
                require_room([planned], config)
                with _claimed(planned.key, opened, interrupt):
                    stage = _train(planned, committed, prepared, mlflow, store, interrupt, console)
            # Checkpoints of a committed stage: a process killed right after its commit left them.
            clear_abandoned(ROOT / "work" / planned.key[:SHORT])
            committed[planned.index] = stage
            # While the text is there: centroids that a later stage needs cannot be fitted once it is gone.
            if planned.index == 0 and prepared.base is None:
                _fit_first(stage, prepared, store, opened)
            with _evaluating(planned.spec.name, console) as told:
                measured = measurements.evaluations(planned.key, distributions, told)
            render.stage_line(console, planned, stage, shared, measured)
            if planned.is_from_scratch:
                mlflow.scratch_done(planned, stage, _add_scratch(results, planned, measured))
                _note_commit(opened, planned)
                continue
            results.evaluations.append(measured)
            results.stages.append(_stage_row(planned, stage, shared, _learned(results)))
            report = build_report(results, stage_births(stage, prepared.plan))
            # Files before MLflow: the report is complete even if MLflow is unreachable.
            _note_commit(opened, planned, report)
            mlflow.stage_done(planned, stage, report, shared)
        assert report is not None, "every plan has a stage on its chain"
        opened.record.set_report(report.to_json())
        mlflow.run_done(report, console)
    # After Ctrl-C and SIGTERM too: MLflow would show an unfinished run as running for ever.
    except BaseException as error:
        mlflow.ended_by(error)
        raise
    return report


@contextmanager
def _evaluating(what: str, console: Console) -> Iterator[Callable[[str], None]]:
    """Say what is evaluated, and on which text."""
    with console.status(f"{what}: evaluating") as status:
        yield lambda text: status.update(f"{what}: evaluating {text}")


def _begun(prepared: Prepared, store: StageStore, opened: OpenRun, console: Console) -> dict[int, CommittedStage]:
    """What is there before the first stage: the checkpoint's model, if the run begins with one."""
    if prepared.base is None:
        return {}
    from lifelong_moe.training.imported import imported_stage

    with console.status("checkpoint: reading"):
        base = imported_stage(store, prepared.base, prepared.config, prepared.data)
    todo = (planned.spec.routing for planned in prepared.plan if store.find(planned.key) is None)
    if (routing := next(filter(needs_first_centroids, todo), None)) is not None:
        with console.status(f"checkpoint: writes {routing.sample_tokens:,} tokens, by which its text is recognized"):
            fitted = first_centroids(store, base, routing, prepared.data.corpora, prepared.config.trainer)
        opened.save(dataclasses.replace(opened.head, centroids=fitted.key))
    return {BASE: base}


def _no_results(config: RunConfig, distributions: list[str], init: dict[str, Evaluation]) -> RunResults:
    """The results of a run before its first stage."""
    return RunResults(
        run=config.run,
        method=config.method.value,
        seed=config.seed,
        distributions=distributions,
        # Their held-out text is gone, and no stored evaluation replaces it.
        not_measured=[name for name in config.evaluated if name not in distributions],
        init=init,
    )


@contextmanager
def _claimed(key: str, opened: OpenRun, interrupt: Interrupt) -> Iterator[None]:
    """Mark a stage in the head as trained by this run; undone if another run trains it."""
    # Saved first: a stage whose process is killed right after the commit still counts as this run's, not as shared.
    if key not in opened.head.trained:
        opened.save(opened.head.with_trained(key))
    try:
        yield
    except TryAgainError:
        # Without a SIGTERM of our own, another run holds the stage's lock and will have trained it.
        if not interrupt.requested:
            opened.save(opened.head.without_trained(key))
        raise


def _train(
    planned: PlannedStage,
    committed: dict[int, CommittedStage],
    prepared: Prepared,
    mlflow: MlflowRecord,
    store: StageStore,
    interrupt: Interrupt,
    console: Console,
) -> CommittedStage:
    from lifelong_moe.training.loop.context import StageEnvironment

    config, data, spec = prepared.config, prepared.data, planned.spec
    run_id = mlflow.stage_begins(planned)
    environment = StageEnvironment(
        store=store,
        work=ROOT / "work",
        trainer=config.trainer,
        checkpoint=config.checkpoint,
        frozen=config.frozen,
        interrupt=interrupt,
        console=console,
        send=lambda points: mlflow.curves(run_id, points),
        run_id=run_id,
        watch=config.evaluate.watch,
        outlook=_outlook(planned, prepared.plan, store),
    )
    parent = None if spec.parent is None else committed[spec.parent]
    return train_stage(planned, parent, data, environment)


def _outlook(planned: PlannedStage, plan: list[PlannedStage], store: StageStore) -> Outlook:
    """A stage's place, and what the stages cost that are trained after it."""
    from lifelong_moe.training.loop.context import Outlook

    place = plan.index(planned)
    later = [one.flops for one in plan[place + 1 :] if store.find(one.key) is None]
    return Outlook(place + 1, len(plan), sum(later))


def _fit_first(stage: CommittedStage, prepared: Prepared, store: StageStore, opened: OpenRun) -> None:
    """Fit the centroids that tell the first stage's text from later text, if a later stage needs them."""
    routing = next((p.spec.routing for p in prepared.plan if needs_first_centroids(p.spec.routing)), None)
    # A stage may be appended later, when this text is gone, so the centroids are fitted if there is enough text.
    if routing is None and RECIPES[prepared.config.method].grow:
        one_day, texts = (
            prepared.config.routing.effective(grown=True),
            [prepared.data.corpora.get(d) for d in stage.split],
        )
        documents = 0 if None in texts else sum(text.train.num_documents for text in texts if text is not None)
        experts = prepared.plan[0].architecture.generations[0].experts
        if needs_first_centroids(one_day) and documents >= one_day.num_clusters(experts):
            routing = one_day
    if routing is not None:
        fitted = first_centroids(store, stage, routing, prepared.data.corpora, prepared.config.trainer)
        opened.save(dataclasses.replace(opened.head, centroids=fitted.key))


def _measurements(prepared: Prepared, store: StageStore, ready: Callable[[], None]) -> Measurements:
    """What measures the run's stages and its model before training."""
    architectures = {planned.key: planned.architecture for planned in prepared.plan}
    architectures[_init_key(prepared)] = (prepared.base or prepared.plan[0]).architecture
    load = partial(_model, prepared, store, ready)
    return Measurements(
        prepared.config, prepared.data, EvaluationStore(ROOT), load, architectures.__getitem__, ReadingCache(CACHE)
    )


def _model(prepared: Prepared, store: StageStore, ready: Callable[[], None], key: str) -> LanguageModel:
    """The model of a committed stage by its key, or the untrained one, on the device of evaluation."""
    from lifelong_moe.training.loop.device import on_configured_device
    from lifelong_moe.training.restore import initial_model, load_model

    ready()
    if prepared.base is None and key == _init_key(prepared):
        model = initial_model(prepared.plan[0].architecture, prepared.config.seed)
    else:
        model = load_model(store, store.get(key))
    return on_configured_device(model, prepared.config.trainer)


def _init_key(prepared: Prepared) -> str:
    """The key under which evaluations of the untrained model, or of the checkpoint, are stored."""
    if prepared.base is not None:
        return prepared.base.key
    # No stage has it: the untrained model is a function of its architecture and the seed.
    architecture = prepared.plan[0].architecture
    return content_key({"init": architecture.to_json(), "seed": prepared.config.seed})


def stage_births(stage: CommittedStage, plan: list[PlannedStage]) -> list[list[int]]:
    """For each layer, the place in the chain of each expert's birth stage; a checkpoint's is before the first."""
    place = {BASE_NAME: -1} | {planned.spec.name: i for i, planned in enumerate(chain(plan))}
    layers = range(stage.architecture.model.layers)
    return [[place[name] for name in stage.architecture.expert_births(layer)] for layer in layers]


def _learned(results: RunResults) -> set[str]:
    """The distributions that the stages so far have learned."""
    return {name for stage in results.stages for name in stage.learns}


def _add_scratch(
    results: RunResults, planned: PlannedStage, measured: Mapping[str, Evaluation]
) -> dict[str, Evaluation]:
    """Add what a model from scratch learned to the results; its evaluation by distribution."""
    own = own_text(planned.spec.learns, _learned(results))
    found = {name: measured[name] for name in own if name in measured}
    results.from_scratch |= {name: _scratch_row(planned, name, one) for name, one in found.items()}
    return found


def _scratch_row(planned: PlannedStage, name: str, own: Evaluation) -> ScratchReport:
    """The report on a model that learned one distribution from scratch; of a mixture, a distribution's part in it."""
    share = Fraction(planned.spec.shares[planned.spec.new.index(name)], sum(planned.spec.shares))
    return ScratchReport(
        nats_per_token=own.nats_per_token,
        bits_per_byte=own.bits_per_byte,
        tokens=round(planned.tokens * share),
        active_flops=round(planned.flops * share),
    )


def _stage_row(planned: PlannedStage, stage: CommittedStage, shared: bool, earlier: Collection[str]) -> StageReport:
    """A stage's entry in the report; ``earlier`` is what the stages before it learned."""
    metrics = dict(stage.metrics)
    return StageReport(
        name=planned.spec.name,
        data=planned.spec.data,
        learns=list(own_text(planned.spec.learns, earlier)),
        key=planned.key,
        routing=planned.routing,
        experts_per_layer=planned.architecture.num_experts,
        parameters_total=planned.parameters.total,
        parameters_active=planned.parameters.active,
        parameters_trainable=metrics.pop("trainable_parameters"),
        tokens=metrics.pop("tokens"),
        # Stages of earlier versions did not record it.
        active_flops=metrics.pop("active_flops", planned.flops),
        tokens_per_second=metrics.pop("tokens_per_second"),
        seconds=metrics.pop("seconds"),
        epochs=metrics.pop("epochs"),
        shared=shared,
        weights_sha256=stage.weights_hash,
        training=metrics,
    )


def _note_commit(opened: OpenRun, planned: PlannedStage, report: Report | None = None) -> None:
    """Record a commit in report, ledger and head."""
    if planned.key not in opened.head.stages:
        if report is not None:
            opened.record.set_report(report.to_json())
        # The ledger before the head: killed in between, the next start repeats its line, which would else be lost.
        opened.record.log("stage", name=planned.spec.name, key=planned.key)
        opened.save(opened.head.with_committed(planned.key))
