"""The commands: parse arguments, run the checks that need no torch, then call the function that does the work.

Each command imports that function after its checks. Importing torch takes seconds, so mistakes are reported before
that, and ``status`` never does it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lifelong_moe.config.routing.own import allow_router
from lifelong_moe.errors import ConfigError, as_ours, one_line
from pipelines.exit_codes import OUTCOMES
from pipelines.shared import completion, threads
from pipelines.shared.options import (
    AsJson,
    ComparisonOverrides,
    ConfigPath,
    DocumentHash,
    EvaluationRequest,
    ExpertName,
    ExportRequest,
    GateSettings,
    Glossary,
    InspectionRequest,
    Label,
    LoadingOptions,
    Overrides,
    OwnRouter,
    Replace,
    RetrainingOverrides,
    RunName,
    RunNames,
    SamplingOptions,
    StageName,
    TextOutput,
    with_options,
)
from pipelines.shared.output import console, finish
from pipelines.shared.places import opens_store, require_plain_store
from pipelines.shared.quiet import silence_libraries


@opens_store
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    replace: Replace = False,
    as_json: AsJson = False,
) -> None:
    """Train the stages that are not committed, evaluate each, and report."""
    from pipelines.preflight import check_memory, read_run

    loaded = read_run(config, overrides or [])
    check_memory(loaded.config)
    from pipelines.run.nodes import on_nodes
    from pipelines.run.run import run as run_stages

    silence_libraries()
    threads.say()
    shown = console(as_json)
    on_nodes(loaded.config.trainer, lambda: finish(run_stages(loaded, replace, shown).to_json(), as_json), shown)


@opens_store
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    time: Annotated[
        bool, typer.Option("--time", help="Take a few steps where no earlier stage tells how long training takes.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a run would do and what it would cost; train nothing."""
    from pipelines.preflight import check_memory, read_run

    loaded = read_run(config, overrides or [])
    check_memory(loaded.config)
    from pipelines.run.plan import plan as show_plan

    finish(show_plan(loaded, console(as_json), time), as_json)


@opens_store
def init(
    folders: Annotated[list[str], typer.Argument(metavar="FOLDERS...", help="Folders of text, in the order to learn.")],
    to: Annotated[str, typer.Option("--to", metavar="FILE", help="The file to write; it must not exist.")] = "own.yaml",
    as_json: AsJson = False,
) -> None:
    """Write a commented configuration that learns your own folders of text, one after the other."""
    from pipelines.run.init import init as write_config

    finish(write_config(folders, to, console(as_json)), as_json)


@opens_store
def compare(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, such as configs/compare.yaml.")],
    overrides: ComparisonOverrides = None,
    only: Annotated[list[str] | None, typer.Option("--only", metavar="ARM", help="Run only this arm or grid.")] = None,
    replace: Replace = False,
    as_json: AsJson = False,
) -> None:
    """Train several arms with several seeds and compare them; started twice, two processes share the work."""
    from lifelong_moe.plan.comparison import load_comparison
    from pipelines.preflight import begun

    comparison = load_comparison(config, overrides or [], begun)
    # Only for its errors: an unknown --only is reported before torch is imported.
    comparison.select(only or [])
    from pipelines.compare.compare import compare as run_comparison

    silence_libraries()
    threads.say()
    finish(run_comparison(comparison, only or [], replace, console(as_json)), as_json)


@opens_store
def prepare(
    config: ConfigPath,
    overrides: Overrides = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all text and tokens again, also what nothing has touched.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Fetch and tokenize everything that a run reads, so that training needs no network; train nothing."""
    from pipelines.preflight import check_memory, read_run

    loaded = read_run(config, overrides or [])
    check_memory(loaded.config)
    from pipelines.run.prepare import prepare as prepare_data

    finish(prepare_data(loaded, console(as_json), verify=verify), as_json)


def retrain(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, such as configs/retrain.yaml.")],
    overrides: RetrainingOverrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write and print the plan, then stop.")] = False,
    plan_path: Annotated[
        str | None, typer.Option("--plan", metavar="FILE", help="Carry out this plan; refused if it is stale.")
    ] = None,
    reopen: Annotated[
        str | None, typer.Option("--reopen", metavar="BATCH", help="Consider a skipped or rejected batch again.")
    ] = None,
) -> None:
    """One tick of scheduled retraining: look at the inbox, decide, train, gate, promote; the last line is JSON."""
    try:
        # Here and not around the command: that the store is refused stands in the last line too.
        require_plain_store()
        from pipelines.preflight import read_retraining, run_lock
        from pipelines.retrain.plan_file import read_plan

        # A file that is not a plan is refused before the lock, which the tick holds from its first look to its end.
        if plan_path is not None:
            read_plan(Path(plan_path))
        retraining = read_retraining(config, overrides or [])
        with run_lock(retraining.run):
            from pipelines.retrain.retrain import retrain as run_tick

            silence_libraries()
            threads.say()
            result = run_tick(retraining, dry_run, plan_path, console(), reopen)
    # After a bug or Ctrl-C too, a script finds JSON in the last line.
    except BaseException as error:
        told = as_ours(error) or error
        failure = {"outcome": "failed", "error": type(told).__name__, "reason": one_line(str(told))}
        finish(failure, as_json=True)
        raise
    finish(result.to_json(), as_json=True)
    # Outside the try: typer.Exit is an exception too, and would be reported as a failure.
    raise typer.Exit(OUTCOMES.get(result.outcome, 0))


@opens_store
def runs(as_json: AsJson = False) -> None:
    """Show all runs of this directory, the newest first: how far each is, when it changed, how large and how good."""
    from pipelines.inspect.runs import show_runs

    finish(show_runs(console(as_json)), as_json)


@opens_store
def report(runs: RunNames, glossary: Glossary = False, as_json: AsJson = False) -> None:
    """Show the tables of runs side by side, and what they have shown in words."""
    from pipelines.inspect.report import show_report

    finish(show_report(runs, console(as_json)), as_json)


@opens_store
def status(
    run: RunName,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all files of the stages again, also those that nothing has touched.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show which stages are committed, under way and to do."""
    from pipelines.inspect.status import show_status

    finish(show_status(run, console(as_json), verify=verify), as_json)


@opens_store
def lineage(
    run: RunName,
    expert: ExpertName = None,
    document: DocumentHash = None,
    as_json: AsJson = False,
) -> None:
    """Show which stage created which experts, and from what data, with hashes."""
    if expert is not None and document is not None:
        raise ConfigError("--expert and --document exclude each other; give one.")
    if expert is not None or document is not None:
        from pipelines.inspect import trace

        asked = trace.expert(run, expert, console(as_json)) if expert else None
        finish(asked or trace.document(run, str(document), console(as_json)), as_json)
        return
    from pipelines.inspect.lineage import show_lineage

    finish(show_lineage(run, console(as_json)), as_json)


@opens_store
def rollback(
    run: RunName,
    to: Annotated[int | None, typer.Option("--to", help="A version; by default the one before the champion.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make an earlier version serve again, by swapping one pointer."""
    from pipelines.versions.rollback import rollback as roll_back

    finish(roll_back(run, to, console(as_json)), as_json)


@opens_store
def promote(
    run: RunName,
    version: Annotated[
        int | None, typer.Option("--version", help="The version meant; by default the one that awaits approval.")
    ] = None,
    reject: Annotated[bool, typer.Option("--reject", help="Refuse it: the champion serves on.")] = False,
    config: Annotated[
        str | None, typer.Option("--config", metavar="FILE", help="The retraining file, whose hooks are told.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Let a candidate serve that has passed the gate, where retraining has `promote: manual`."""
    told = None
    if config is not None:
        from lifelong_moe.plan.retraining import load_retraining

        retraining = load_retraining(config)
        if retraining.run != run:
            raise ConfigError(f"--config={config} retrains run {retraining.run}, not {run}.")
        told = retraining.settings.hooks
    from pipelines.retrain.promote import promote as let_serve

    finish(let_serve(run, version, console(as_json), reject=reject, told=told), as_json)


@opens_store
def drop(
    run: RunName,
    stage: Annotated[
        str,
        typer.Argument(metavar="STAGE", help="Name of a stage of the champion.", autocompletion=completion.stages),
    ],
    gate: GateSettings = None,
    ungated: Annotated[bool, typer.Option("--no-gate", help="Promote without asking the gate.")] = False,
    router: OwnRouter = None,
    as_json: AsJson = False,
) -> None:
    """Promote a version without STAGE and report what the model retains of its data."""
    from pipelines.preflight import check_stage

    settings = check_stage(run, stage, gate)
    allow_router(router)
    from pipelines.versions.drop import drop as drop_stage

    result = drop_stage(run, stage, console(as_json), settings, ungated=ungated)
    finish(result, as_json)
    raise typer.Exit(OUTCOMES.get(result["outcome"], 0))


@opens_store
def consolidate(
    run: RunName,
    stage: Annotated[
        str,
        typer.Argument(
            metavar="STAGE", help="Stage of the champion whose experts are merged.", autocompletion=completion.stages
        ),
    ],
    gate: GateSettings = None,
    experts: Annotated[int, typer.Option(help="Experts to remove from each layer.", min=1)] = 1,
    router: OwnRouter = None,
    as_json: AsJson = False,
) -> None:
    """Merge similar, little used experts of each layer; promoted if the gate accepts the result."""
    from pipelines.preflight import check_stage

    settings = check_stage(run, stage, gate)
    allow_router(router)
    from pipelines.versions.consolidate import consolidate as consolidate_stage

    silence_libraries()
    threads.say()
    result = consolidate_stage(run, stage, experts, console(as_json), settings)
    finish(result, as_json)
    raise typer.Exit(OUTCOMES.get(result["outcome"], 0))


@opens_store
def gc(
    apply: Annotated[bool, typer.Option("--apply", help="Remove the files; otherwise they are only shown.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show files to which no run, version or live plan refers and that are at least a day old.

    Tokenized text, and domains that were kept of it, are included once they were not opened for 30 days. --apply also
    removes half-written files of killed processes, those of other machines once they are a day old.
    """
    from pipelines.upkeep.gc import gc as collect_garbage

    finish(collect_garbage(apply, console(as_json)), as_json)


@opens_store
@with_options
def evaluate(
    run: RunName,
    *,
    asked: EvaluationRequest,
    stage: StageName = None,
    label: Label = None,
    loading: LoadingOptions,
    as_json: AsJson = False,
) -> None:
    """Measure loss and bits per byte of any stage on any text, or all stages on tasks of lm-evaluation-harness."""
    allow_router(loading.router)
    if (asked.data is None) == (not asked.tasks):
        raise ConfigError("give either --data or --tasks.")
    if asked.data is not None:
        from pipelines.inspect.evaluate import evaluate_text

        finish(evaluate_text(run, stage, asked.data, label, console(as_json), int8=loading.int8), as_json)
        return
    from pipelines.inspect.tasks import evaluate_tasks

    silence_libraries()
    threads.say()
    finish(evaluate_tasks(run, stage, asked.tasks or [], label, console(as_json), int8=loading.int8), as_json)


@opens_store
@with_options
def generate(
    run: RunName,
    prompt: Annotated[str, typer.Argument(help="Text to continue; for a fine-tuned stage, a prompt to answer.")],
    *,
    stage: StageName = None,
    sampling: SamplingOptions,
    label: Label = None,
    loading: LoadingOptions,
    printing: TextOutput,
) -> None:
    """Continue a text, or answer it as a prompt if the stage was fine-tuned."""
    allow_router(loading.router)
    from pipelines.inspect.generate import generate_text

    people = console(printing.as_json, raw=printing.raw)
    result = generate_text(run, stage, prompt, sampling, people, label=label, int8=loading.int8)
    finish(result, printing.as_json)


@opens_store
@with_options
def inspect(
    run: RunName,
    *,
    stage: StageName = None,
    asked: InspectionRequest,
    router: OwnRouter = None,
    as_json: AsJson = False,
) -> None:
    """Show what the experts specialize in, on held-out text, or which expert takes which token of a text."""
    allow_router(router)
    from pipelines.inspect.inspect import inspect_stage

    silence_libraries()
    threads.say()
    finish(inspect_stage(run, stage, asked, console(as_json)), as_json)


@opens_store
@with_options
def export(run: RunName, *, asked: ExportRequest, as_json: AsJson = False) -> None:
    """Write a model as a checkpoint that transformers, vLLM and llama.cpp's converter read, and compare both sides."""
    from pipelines.export.export import export_run

    finish(export_run(run, asked, console(as_json)), as_json)


@opens_store
def sync(as_json: AsJson = False) -> None:
    """Send to MLflow what was recorded while it was unreachable; exit code 75 if it still is."""
    from pipelines.upkeep.sync import sync as send_spooled

    finish(send_spooled(console(as_json)), as_json)


@opens_store
def ui(
    port: Annotated[int, typer.Option(help="Port on this machine.", min=1, max=65535)] = 5000,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    browser: Annotated[bool, typer.Option(help="Open a browser.")] = True,
    experiment: Annotated[str, typer.Option(help="MLflow experiment.")] = "lifelong-moe",
) -> None:
    """Start the MLflow UI on our database, opened at the comparison of runs; ends with the server's exit code."""
    from pipelines.upkeep.ui import ui as serve_ui

    raise typer.Exit(serve_ui(port, host, browser, experiment, console()))
