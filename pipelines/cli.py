"""The command line: its commands, and how their errors become exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn, cast

import typer
from typer.core import TyperGroup

from lifelong_moe.errors import as_ours, one_line
from lifelong_moe.storage.signing import SigningKeys
from pipelines import commands
from pipelines.examples import help_end
from pipelines.shared import output, threads

ABOUT = "Keep one mixture-of-experts language model learning along a stream of data distributions."
GROUPS = {
    "Train": (commands.init, commands.run, commands.plan, commands.prepare, commands.compare, commands.retrain),
    "Look": (
        commands.runs,
        commands.status,
        commands.report,
        commands.lineage,
        commands.evaluate,
        commands.inspect,
        commands.generate,
        commands.ui,
    ),
    "Serve": (commands.promote, commands.rollback, commands.drop, commands.consolidate, commands.export),
    "Keep": (commands.gc, commands.sync),
}
"""All commands by what they are for, in the order in which the help lists them."""
COMMANDS = tuple(command for group in GROUPS.values() for command in group)

ASKS_JSON = "lifelong_moe.asks_json"
USAGE_ERROR = cast(type[Exception], typer.BadParameter.__mro__[1])
"""The base of all errors in a command's use, to which Typer gives no name of its own."""


class Commands(TyperGroup):
    """All commands; errors in their use quote arguments, which may be names of files that somebody else has made."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Parse what stands before a command."""
        # Before the parser takes them: an error in a command's options comes before it has any.
        asks_json = "--json" in args[: args.index("--") if "--" in args else None]
        with _visible_mistakes(), _told_as_json(asks_json):
            context = super().make_context(info_name, args, parent, **extra)
        context.meta[ASKS_JSON] = asks_json
        return context

    def invoke(self, ctx: Any) -> Any:
        """Parse the command's arguments, and run it."""
        with _visible_mistakes(), _told_as_json(ctx.meta[ASKS_JSON]):
            try:
                return super().invoke(ctx)
            # Typer would end without a word.
            except KeyboardInterrupt as error:
                output.finish(failure(error) | {"exit_code": 130}, ctx.meta[ASKS_JSON])
                raise typer.Exit(interrupted(error)) from error


@contextmanager
def _visible_mistakes() -> Iterator[None]:
    try:
        yield
    except USAGE_ERROR as error:
        # Typer prints it in a frame, by a console of its own.
        error.message = one_line(error.message)  # type: ignore[attr-defined]
        raise


@contextmanager
def _told_as_json(asked: bool) -> Iterator[None]:
    """With ``--json``, let an error be the one object on standard output; it is told on standard error as ever."""
    try:
        yield
    except typer.Exit:  # what there was to print is printed, or it was Ctrl-C
        raise
    except BaseException as error:
        output.finish(failure(error), asked)
        raise


def failure(error: BaseException) -> dict[str, str | int]:
    """What ``--json`` prints in place of a result."""
    told = as_ours(error) or error
    # Typer's own errors have a code as well; what has none is a bug of ours.
    code = getattr(told, "exit_code", 1)
    return {"error": type(told).__name__, "reason": one_line(str(told)), "exit_code": code}


app = typer.Typer(
    cls=Commands,
    add_completion=True,
    no_args_is_help=True,
    # `exit_code` prints errors on one line, and a bug's traceback stays plain text for reports and logs.
    pretty_exceptions_enable=False,
)


def print_version(asked: bool) -> None:
    """Print the installed version, and stop."""
    if asked:
        from importlib.metadata import version

        output.console().print(f"lifelong-moe {version('lifelong-moe')}")
        raise typer.Exit


@app.callback(help=ABOUT)
def without_command(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=print_version)
    ] = False,
) -> None:
    """Options that need no command, and a check that every command needs."""
    # Before a command writes anything: unusable keys would else be found when the first stage is to be signed.
    SigningKeys.from_environment()


for group, grouped in GROUPS.items():
    for command in grouped:
        app.command(epilog=help_end(command.__name__), rich_help_panel=group)(command)


def main() -> None:
    """Entry point: a user's mistake prints one line and sets an exit code; only our own bugs show a traceback."""
    run(app)


def run(command: Callable[[], object]) -> NoReturn:
    """Carry out a command as this process, and end it with the exit code."""
    output.make_robust()
    # Ours are narrower by themselves; MLflow and others write files as wide as the umask allows.
    os.umask(os.umask(0o077) | 0o007)
    # Before a command imports torch: OpenMP reads these settings once.
    threads.configure()
    sys.exit(exit_code(command))


def interrupted(error: KeyboardInterrupt) -> int:
    """Say on standard error that Ctrl-C ended a command, and how to go on where that is known; returns the code."""
    output.tell(f"interrupted: {error}" if str(error) else "interrupted")
    return 130


def exit_code(command: Callable[[], object]) -> int:
    """Run a command; our errors become one line on standard error and an exit code."""
    try:
        command()
    except Exception as error:
        # Anything else is a bug of ours: Python prints its traceback.
        if (told := as_ours(error)) is None:
            raise
        output.tell(f"{type(told).__name__}: {told}")
        return told.exit_code
    except KeyboardInterrupt as error:
        return interrupted(error)
    # Typer ends every command with SystemExit; a code that is not a number is a message.
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return 0


if __name__ == "__main__":
    main()
