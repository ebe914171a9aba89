"""Exit codes of each command: the source of the help, of docs/commands.md and of the command line itself."""

from __future__ import annotations

OF_EXPORT = ". Or an export does not compute what the model does, and was removed"
"""What 7 also means, for `export` alone."""
MEANINGS = {
    0: "done, or nothing to do",
    # Python's own code after an uncaught exception.
    1: "a bug of lifelong-moe, with a traceback",
    # Click ends with it too if arguments are wrong.
    2: "a mistake in the configuration, the data or the arguments; one line says which, and nothing was written",
    3: "the gate rejected a candidate; the champion serves on",
    4: "a tick would exceed its limits; no stage was trained, nor any probe that the limits forbid",
    5: "the plan (`--plan`) is stale: champion, data or settings have changed, its files are gone, it has "
    "expired, or it allows what the configuration does not",
    6: "training diverged: it was rolled back twice and failed again; the stage was not committed",
    7: "the store is damaged or not one of ours: a file no longer matches its hash or a trusted signature, says "
    "what no such file says, or is a link; the line names it" + OF_EXPORT,
    8: "not enough disk or memory; committed stages are intact",
    # EX_TEMPFAIL of sysexits.h: schedulers and mailers know it as "retry".
    75: "try again later: another process holds the lock, a server cannot be reached, or SIGTERM arrived (training has "
    "then saved a checkpoint)",
    # 128 + SIGINT, as shells report it.
    130: "Ctrl-C; committed stages are intact, and training has saved a checkpoint unless it was pressed twice",
}
OF_ALL = (0, 1, 2, 8, 130)
"""Any command can end with these: disks fill up and arguments are mistyped everywhere."""
BESIDES = {
    "init": (7,),
    "run": (6, 7, 75),
    "plan": (7, 75),
    "prepare": (7, 75),
    "compare": (6, 7, 75),
    "retrain": (3, 4, 5, 6, 7, 75),
    "runs": (7,),
    "status": (7,),
    "report": (7,),
    "lineage": (7, 75),
    "evaluate": (7,),
    "inspect": (7, 75),
    "generate": (7,),
    "ui": (7, 75),
    "promote": (7, 75),
    "rollback": (7, 75),
    "drop": (3, 7, 75),
    "consolidate": (3, 7, 75),
    "export": (7,),
    "gc": (7, 75),
    "sync": (7, 75),
}
"""Further exit codes by command, in the order of the help."""
OUTCOMES = {"rejected": 3, "over budget": 4}
"""Exit codes of unsuccessful outcomes; all others end with 0."""


def epilog(command: str) -> str:
    """A line for each exit code of a command's own."""
    # A blank line between codes: Typer joins lines that a single line break separates. Backticks are Markdown for
    # docs/commands.md, and a terminal would show them.
    said = {
        code: MEANINGS[code] if command == "export" else MEANINGS[code].removesuffix(OF_EXPORT) for code in MEANINGS
    }
    return "\n\n".join(f"Exit code {code}: {said[code].replace('`', '')}." for code in BESIDES[command])
