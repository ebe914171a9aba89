"""Write docs/commands.md from the command line itself; run it after a change of an option, a help text or a code."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, get_args, get_type_hints

import typer

from pipelines.cli import GROUPS, app
from pipelines.examples import EXAMPLES
from pipelines.exit_codes import BESIDES, MEANINGS, OF_ALL

INTRODUCTION = """# Commands

Made from the code by `python docs/generate_commands.py`; a test keeps it true. What they are for: [usage.md](usage.md).
"""


def commands() -> dict[str, Any]:
    """The commands of ``lifelong-moe`` by name, in the order of the code."""
    return dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def groups() -> list[str]:
    """A line for each group of commands."""
    named = {group: ", ".join(f"`{command.__name__}`" for command in those) for group, those in GROUPS.items()}
    return [*(f"- {group}: {those}" for group, those in named.items()), ""]


def exit_codes() -> list[str]:
    """A table of what each exit code means, and which commands end with it."""
    rows = []
    for code, meaning in MEANINGS.items():
        who = ", ".join(f"`{name}`" for name, codes in BESIDES.items() if code in codes)
        rows.append(f"| {code} | {meaning} | {'all' if code in OF_ALL else who} |")
    return ["## Exit codes", "", "| exit code | meaning | commands |", "|---|---|---|", *rows, ""]


def placeholder(option: Any, kind: Any) -> str:
    """What stands for a value of an argument or option."""
    number = {int, float} & {kind, *get_args(kind)}
    return str(option.metavar or ("N" if number else option.name.upper()))


def parameter(option: Any, kind: Any) -> str:
    """A row: how it is written, its default, what it does."""
    if option.param_type_name == "argument":
        return f"| `{placeholder(option, kind)}` | {'required' if option.required else ''} | {option.help} |"
    value = "" if option.is_flag else f" {placeholder(option, kind)}"
    names = ", ".join(f"`{name}{value}`" for name in (*option.opts, *option.secondary_opts))
    if option.is_flag:
        default = option.opts[0] if option.default and option.secondary_opts else ""
    else:
        default = "" if option.default is None else str(option.default)
    default = f"`{default}`" if default else "required" if option.required else ""
    return f"| {names} | {default} | {option.help} |"


def section(name: str, command: Any) -> list[str]:
    """One command: how it is called, what it does, all arguments and options."""
    kinds = get_type_hints(command.callback)
    given = [one for one in command.params if one.name in kinds]
    called = [placeholder(one, kinds[one.name]) for one in given if one.param_type_name == "argument"]
    rows = [parameter(one, kinds[one.name]) for one in given]
    codes = ", ".join(str(code) for code in BESIDES[name])
    return [
        f"## `{' '.join(['lifelong-moe', name, *called])}`",
        "",
        inspect.cleandoc(command.help or ""),
        *(["", "| | default | |", "|---|---|---|", *rows] if rows else []),
        "",
        *(f"    lifelong-moe {example}" for example in EXAMPLES[name]),
        "",
        f"Exit codes besides those of all commands: {codes}.",
        "",
    ]


def page() -> str:
    """The whole page."""
    lines = [line for name, command in commands().items() for line in section(name, command)]
    return "\n".join([INTRODUCTION, *groups(), *exit_codes(), *lines]).rstrip() + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("commands.md").write_text(page(), encoding="utf-8")
