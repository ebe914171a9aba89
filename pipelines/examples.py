"""Examples of each command, which its help and docs/commands.md show. A test parses them and reads what they name."""

from __future__ import annotations

from pipelines.exit_codes import epilog

EXAMPLES = {
    "init": ("init notes src", "init notes ~/articles --to articles.yaml"),
    "run": (
        "run configs/quickstart.yaml",
        "run configs/quickstart.yaml run=longer stage_defaults.tokens=500_000",
    ),
    "plan": ("plan configs/quickstart.yaml", "plan configs/quickstart.yaml model.experts=8 stages[1].grow.experts=4"),
    "prepare": ("prepare configs/quickstart.yaml",),
    "compare": ("compare configs/compare.yaml", "compare configs/compare.yaml seeds=[0,1,2] --only replay"),
    "retrain": ("retrain configs/retrain.yaml --dry-run", "retrain configs/retrain.yaml trigger.min_tokens=10_000"),
    "runs": ("runs", "runs --json"),
    "status": ("status quickstart",),
    "report": ("report quickstart", "report quickstart longer --json"),
    "lineage": ("lineage quickstart", "lineage quickstart --expert python_code/L0/E4"),
    "evaluate": (
        'evaluate quickstart --data "notes/*.txt" --stage python_code',
        "evaluate quickstart --tasks configs/tasks/arithmetic.yaml",
    ),
    "inspect": ("inspect quickstart", 'inspect quickstart --text "def main():" --html main.html'),
    "generate": ('generate quickstart "def main(" --temperature 0',),
    "ui": ("ui", "ui --port 5001 --no-browser"),
    "promote": ("promote quickstart", "promote quickstart --version 1 --reject"),
    "rollback": ("rollback quickstart", "rollback quickstart --to 0"),
    "drop": ("drop quickstart python_code gate.tolerance=0.02",),
    "consolidate": ("consolidate quickstart python_code --experts 2",),
    "export": ("export quickstart --to exported", "export quickstart --to generations --all"),
    "gc": ("gc", "gc --apply"),
    "sync": ("sync",),
}
"""Arguments by command, as a shell reads them."""


def help_end(command: str) -> str:
    """The end of a command's help: its examples, then a line for each exit code of its own."""
    # A blank line between any two: Typer joins lines that a single line break separates.
    return "\n\n".join([*(f"Example: lifelong-moe {one}" for one in EXAMPLES[command]), epilog(command)])
