"""The gate's verdict on a terminal."""

from __future__ import annotations

from rich.console import Console

from lifelong_moe.retraining.checks import Verdict


def print_verdict(console: Console, verdict: Verdict) -> None:
    """Print each check and note."""
    for check in verdict.checks:
        console.print(f"{'✓' if check.passed else '✗'} {check.sentence}")
    for sentence in verdict.notes:
        console.print(f"· {sentence}")
