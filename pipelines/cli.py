"""The command line. Nothing heavy is imported before a command's own arguments and configuration are known good."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from lifelong_moe.errors import ConfigError, as_ours, one_line
from pipelines.exit_codes import OUTCOMES, epilog
from pipelines.shared import output, threads
from pipelines.shared.options import (
    AsJson,
    ConfigPath,
    GateSettings,
    InspectionRequest,
    Int8,
    Label,
    Overrides,
    RunName,
    SamplingOptions,
    StageName,
    with_options,
)
from pipelines.shared.quiet import silence_libraries

ABOUT = "Keep one mixture-of-experts language model learning along a stream of data distributions."
app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def console(as_json: bool = False) -> Console:
    """Where people read; with ``--json`` standard output is for the program that asked."""
    terminal = (sys.stderr if as_json else sys.stdout).isatty()
    return Console(stderr=as_json, soft_wrap=not terminal, width=None if terminal else 140)


def finish(result: Any, as_json: bool) -> None:
    """Print the result for a script, if one asked."""
    if as_json:
        print(json.dumps(result, ensure_ascii=not (sys.stdout.encoding or "utf-8").lower().startswith("utf")))


def print_version(asked: bool) -> None:
    """Print what is installed, and stop."""
    if asked:
        from importlib.metadata import version

        print(f"lifelong-moe {version('lifelong-moe')}")
        raise typer.Exit


@app.callback(help=ABOUT)
def without_command(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=print_version)
    ] = False,
) -> None:
    """Options that need no command."""


@app.command(epilog=epilog("run"))
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    replace: Annotated[bool, typer.Option("--replace", help="Let the run's name refer to other stages.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train the stages that are not committed yet, evaluate each, and report."""
    from lifelong_moe.config.load import read_config

    loaded = read_config(config, overrides or [])  # a mistake is told before torch is imported, which takes seconds
    from pipelines.run.run import run as story

    silence_libraries()
    threads.say()
    finish(story(loaded, replace, console(as_json)).to_json(), as_json)


@app.command(epilog=epilog("plan"))
def plan(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Show what a run would do and what it would cost; trains nothing."""
    from lifelong_moe.config.load import read_config

    loaded = read_config(config, overrides or [])  # a mistake is told before torch is imported, which takes seconds
    from pipelines.run.plan import plan as story

    finish(story(loaded, console(as_json)), as_json)


@app.command(epilog=epilog("compare"))
def compare(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, such as configs/compare.yaml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Of the comparison, such as seeds=[0] or budget=flops; else of every arm."
        ),
    ] = None,
    only: Annotated[list[str] | None, typer.Option("--only", metavar="ARM", help="Run this arm or grid only.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Let the runs' names refer to other stages.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train several arms with several seeds and put them side by side; started twice, two processes share the work."""
    from lifelong_moe.plan.comparison import load_comparison

    comparison = load_comparison(config, overrides or [])
    comparison.select(only or [])
    from pipelines.compare.compare import compare as story

    silence_libraries()
    threads.say()
    finish(story(comparison, only or [], replace, console(as_json)), as_json)


@app.command(epilog=epilog("prepare"))
def prepare(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Fetch and tokenize everything that a run reads, away from the GPUs; trains nothing."""
    from lifelong_moe.config.load import read_config

    loaded = read_config(config, overrides or [])  # a mistake is told before torch is imported, which takes seconds
    from pipelines.run.prepare import prepare as story

    finish(story(loaded, console(as_json)), as_json)


@app.command(epilog=epilog("retrain"))
def retrain(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, such as configs/retrain.yaml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Of the file, such as trigger.min_tokens=1; else of its base."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write and print the plan, and stop.")] = False,
    plan_path: Annotated[
        str | None, typer.Option("--plan", metavar="FILE", help="Carry out this plan, or refuse it if it is stale.")
    ] = None,
    reopen: Annotated[
        str | None, typer.Option("--reopen", metavar="BATCH", help="Look again at a skipped or rejected batch.")
    ] = None,
) -> None:
    """One tick for a scheduler: look at the inbox, decide, train, gate, promote or reject; the last line is JSON."""
    try:
        from lifelong_moe.plan.retraining import load_retraining
        from pipelines.preflight import run_lock
        from pipelines.retrain.plan_file import read_plan

        if plan_path is not None:
            read_plan(Path(plan_path))
        retraining = load_retraining(config, overrides or [])
        with run_lock(retraining.run):
            from pipelines.retrain.retrain import retrain as story

            silence_libraries()
            threads.say()
            result = story(retraining, dry_run, plan_path, console(), reopen)
    except BaseException as error:  # a bug or Ctrl-C as well: who reads the last line always finds JSON
        told = as_ours(error) or error
        failure = {"outcome": "failed", "error": type(told).__name__, "reason": one_line(str(told))}
        finish(failure, as_json=True)
        raise
    finish(result.to_json(), as_json=True)
    raise typer.Exit(OUTCOMES.get(result.outcome, 0))


@app.command(epilog=epilog("report"))
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Names of runs.")], as_json: AsJson = False
) -> None:
    """Show the tables of runs side by side."""
    from pipelines.inspect.inspectors import report as story

    finish(story(runs, console(as_json)), as_json)


@app.command(epilog=epilog("status"))
def status(run: RunName, as_json: AsJson = False) -> None:
    """Show which stages are committed, under way and to do."""
    from pipelines.inspect.inspectors import status as story

    finish(story(run, console(as_json)), as_json)


@app.command(epilog=epilog("lineage"))
def lineage(
    run: RunName,
    expert: Annotated[
        str | None, typer.Option("--expert", metavar="STAGE/L3/E7", help="What made this expert.")
    ] = None,
    document: Annotated[
        str | None, typer.Option("--document", metavar="HASH", help="What learned from the document of this SHA-256.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show which stage, on which data, bore which experts, with hashes."""
    if expert is not None and document is not None:
        raise ConfigError("--expert and --document are two questions; ask one.")
    if expert is not None or document is not None:
        from pipelines.inspect import trace

        asked = trace.expert(run, expert, console(as_json)) if expert else None
        finish(asked or trace.document(run, str(document), console(as_json)), as_json)
        return
    from pipelines.inspect.inspectors import lineage as story

    finish(story(run, console(as_json)), as_json)


@app.command(epilog=epilog("rollback"))
def rollback(
    run: RunName,
    to: Annotated[int | None, typer.Option("--to", help="A version; by default the one before the champion.")] = None,
    as_json: AsJson = False,
) -> None:
    """Let an earlier version serve again: one pointer is swapped, and no stage is touched."""
    from pipelines.versions.rollback import rollback as story

    finish(story(run, to, console(as_json)), as_json)


@app.command(epilog=epilog("drop"))
def drop(
    run: RunName,
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="Name of a stage of the champion.")],
    gate: GateSettings = None,
    ungated: Annotated[bool, typer.Option("--no-gate", help="Let it serve whatever becomes worse.")] = False,
    as_json: AsJson = False,
) -> None:
    """Let a version without a stage serve, and say what of its text remains in the model."""
    from pipelines.preflight import check_stage

    settings = check_stage(run, stage, gate)
    from pipelines.versions.drop import drop as story

    result = story(run, stage, console(as_json), settings, ungated=ungated)
    finish(result, as_json)
    raise typer.Exit(OUTCOMES.get(result["outcome"], 0))


@app.command(epilog=epilog("consolidate"))
def consolidate(
    run: RunName,
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="Stage of the champion whose experts become fewer.")],
    gate: GateSettings = None,
    experts: Annotated[int, typer.Option(help="By so many experts in each layer.", min=1)] = 1,
    as_json: AsJson = False,
) -> None:
    """Merge experts that are alike and little used into others; what comes of it serves if nothing gets worse."""
    from pipelines.preflight import check_stage

    settings = check_stage(run, stage, gate)
    from pipelines.versions.consolidate import consolidate as story

    silence_libraries()
    threads.say()
    result = story(run, stage, experts, console(as_json), settings)
    finish(result, as_json)
    raise typer.Exit(OUTCOMES.get(result["outcome"], 0))


@app.command(epilog=epilog("gc"))
def gc(
    apply: Annotated[bool, typer.Option("--apply", help="Remove it; otherwise it is only shown.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what no run, version or live plan refers to any more; nothing less than a day old is removed.

    Tokenized text counts once nothing has opened it for 30 days. What a killed process left half written goes with it,
    but for another machine's processes only after a day.
    """
    from pipelines.upkeep.gc import gc as story

    finish(story(apply, console(as_json)), as_json)


@app.command(epilog=epilog("evaluate"))
def evaluate(
    run: RunName,
    data: Annotated[str, typer.Option("--data", help="Path or glob of .jsonl, .txt or .parquet files.")],
    stage: StageName = None,
    label: Label = None,
    int8: Int8 = False,
    as_json: AsJson = False,
) -> None:
    """Loss and bits per byte of any stage on any text."""
    from pipelines.inspect.inspectors import evaluate as story

    finish(story(run, stage, data, label, console(as_json), int8=int8), as_json)


@app.command(epilog=epilog("generate"))
@with_options
def generate(
    run: RunName,
    prompt: Annotated[str, typer.Argument(help="Text to continue, or, of a fine-tuned stage, a prompt to answer.")],
    *,
    stage: StageName = None,
    sampling: SamplingOptions,
    label: Label = None,
    int8: Int8 = False,
    as_json: AsJson = False,
) -> None:
    """Continue a text; a fine-tuned stage answers it as a prompt."""
    from pipelines.inspect.inspectors import generate as story

    finish(story(run, stage, prompt, sampling, console(as_json), label=label, int8=int8), as_json)


@app.command(epilog=epilog("inspect"))
@with_options
def inspect(
    run: RunName,
    *,
    stage: StageName = None,
    asked: InspectionRequest,
    as_json: AsJson = False,
) -> None:
    """Show what the experts specialize in, on held-out text or token by token on a text."""
    from pipelines.inspect.inspectors import inspect as story

    silence_libraries()
    threads.say()
    finish(story(run, stage, asked, console(as_json)), as_json)


@app.command(epilog=epilog("sync"))
def sync(as_json: AsJson = False) -> None:
    """Deliver to MLflow what was recorded while it was absent; exit code 75 if it still is."""
    from pipelines.upkeep.sync import sync as story

    finish(story(console(as_json)), as_json)


@app.command(epilog=epilog("ui"))
def ui(
    port: Annotated[int, typer.Option(help="Port on this machine.", min=1, max=65535)] = 5000,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    browser: Annotated[bool, typer.Option(help="Open a browser.")] = True,
    experiment: Annotated[str, typer.Option(help="MLflow experiment.")] = "lifelong-moe",
) -> None:
    """Start the MLflow UI on our database, at the comparison of runs; ends with the server's exit code."""
    from pipelines.upkeep.ui import ui as story

    raise typer.Exit(story(port, host, browser, experiment, console()))


def main() -> None:
    """Entry point: a person's mistake costs one line and its exit code; only our own bugs show a traceback."""
    output.make_robust()
    threads.configure()
    sys.exit(exit_code(app))


def exit_code(command: Callable[[], Any]) -> int:
    """Run a command and turn our errors into one line on standard error and their exit code."""
    try:
        command()
    except Exception as error:
        if (told := as_ours(error)) is None:
            raise
        print(f"{type(told).__name__}: {told}", file=sys.stderr)
        return told.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return 0


if __name__ == "__main__":
    main()
