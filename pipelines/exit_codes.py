"""What each command's exit code means: the help, docs/commands.md and the command line itself take it from here."""

from __future__ import annotations

MEANINGS = {
    0: "done, or nothing to do",
    1: "a fault of ours, with a traceback",
    2: "a mistake in the configuration, the data or the arguments; one line says which, and nothing was written",
    3: "the gate rejected a candidate; the champion serves on",
    4: "a tick would exceed its limits; no stage was trained, and no probe of what they forbid",
    5: "the plan (`--plan`) is stale: another champion, other data or settings, its files are gone, or it expired",
    6: "training diverged: it was rolled back twice and failed again; nothing of the stage was committed",
    7: "a committed file no longer matches its hash; the line names it and both hashes",
    8: "disk or memory do not suffice; what was committed is intact",
    75: "try again later: another process works on it, a server cannot be reached, or SIGTERM came (training has then "
    "committed a checkpoint)",
    130: "Ctrl-C; what was committed is intact",
}
OF_ALL = (0, 1, 2, 8, 130)
"""Any command ends with these: a disk fills up, and arguments are mistyped, everywhere."""
BESIDES = {
    "run": (6, 7, 75),
    "plan": (7, 75),
    "compare": (6, 7, 75),
    "prepare": (7, 75),
    "retrain": (3, 4, 5, 6, 7, 75),
    "report": (7,),
    "status": (7,),
    "lineage": (7, 75),
    "rollback": (7, 75),
    "drop": (3, 7, 75),
    "consolidate": (3, 7, 75),
    "gc": (7, 75),
    "evaluate": (7,),
    "generate": (7,),
    "inspect": (7, 75),
    "sync": (7, 75),
    "ui": (75,),
}
"""By command, what else it ends with."""
OUTCOMES = {"rejected": 3, "over budget": 4}
"""Of outcomes that are no success; 0 for all others."""


def epilog(command: str) -> str:
    """The end of a command's help: a line for each exit code that not every command has."""
    return "\n\n".join(f"Exit code {code}: {MEANINGS[code].replace('`', '')}." for code in BESIDES[command])
