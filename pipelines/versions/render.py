"""The gate's verdict on a terminal."""

from __future__ import annotations

from rich.console import Console

from lifelong_moe.retraining.checks import Verdict


def print_verdict(console: Console, judged: Verdict) -> None:
    """Print each check and note."""
    for check in judged.checks:
        console.print(f"{'✓' if check.passed else '✗'} {check.sentence}", highlight=False, markup=False)
    for sentence in judged.notes:
        console.print(f"· {sentence}", highlight=False, markup=False)
