"""What a person sees of an inspection on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lifelong_moe.evaluation.routed_text import RoutedText, visible

MOST_EXPERTS = 48
"""Rows of top tokens shown; ``inspection.json`` has them all."""
SHOWN_TOKENS = 5


def text(console: Console, routed: RoutedText) -> None:
    """The text in its owners' colours under a legend; without colours, a line a token."""
    legend, body = Text(), Text()
    for name, colour, count in zip(routed.owners, routed.colours, routed.counts, strict=True):
        if count:
            legend.append(f" {name} ", style=f"black on {colour}").append(f" {count}  ")
    if console.color_system is None:
        console.print(legend, soft_wrap=True)
        _token_table(console, routed)
        return
    for token in routed.tokens:
        shown = visible(token.text).replace("\n", "⏎\n")  # or else the owner of a line's end would not be seen
        body.append(shown, style=f"black on {routed.colours[token.owner]}")
    console.print(legend)
    console.print()
    console.print(body, soft_wrap=True)


def heldout(console: Console, result: Mapping[str, Any]) -> None:
    """Tables of an inspection on held-out text."""
    console.print(_layers(result))
    console.print(_by_distribution(result))
    if result["saturation"]:
        console.print(_saturation(result))
    console.print(_top_tokens(result))


def _token_table(console: Console, routed: RoutedText) -> None:
    table = _table("Tokens", "token", "sent to", *(f"L{layer}" for layer in routed.layers))
    for token in routed.tokens:
        chosen = (", ".join(f"{name} {weight:.2f}" for name, weight in layer) for layer in token.experts)
        table.add_row(*(Text(cell) for cell in (repr(token.text), routed.owners[token.owner], *chosen)))
    console.print(table)


def _layers(result: Mapping[str, Any]) -> Table:
    headers = ("experts", "token: nats", "by chance", "distribution: nats", "by chance", "cosine", "dead")
    table = _table(f"{result['run']}, stage {result['stage']}: what experts know of", "layer", *headers)
    for layer in result["layers"]:
        table.add_row(
            f"L{layer['layer']}",
            str(len(layer["experts"])),
            *_information(layer["token"]),
            *_information(layer["distribution"]),
            _mean_cosine(layer["similarity"]),
            Text(", ".join(layer["dead"]) or "–"),
        )
    return table


def _information(information: Mapping[str, float] | None) -> tuple[str, str]:
    if information is None:
        return "–", "–"
    return f"{information['nats']:.4f}", f"{information['null_mean']:.4f} (95 %: {information['null_95']:.4f})"


def _mean_cosine(similarity: Sequence[Sequence[float]]) -> str:
    """Over all pairs of different experts."""
    matrix = np.array(similarity)
    pairs = matrix[~np.eye(len(matrix), dtype=bool)]
    return f"{pairs.mean():+.3f}" if pairs.size else "–"


def _by_distribution(result: Mapping[str, Any]) -> Table:
    layers = [f"leak L{layer['layer']}" for layer in result["layers"]]
    table = _table("Held-out text", "distribution", "tokens", "nats/token", "experts shuffled", *layers)
    for name, losses in result["shuffled"].items():
        loss, shuffled = losses["nats_per_token"], losses["shuffled_nats_per_token"]
        leak = (f"{layer['leak'][name]:.1%}" for layer in result["layers"])
        cost = f"{shuffled:.3f} ({shuffled - loss:+.3f})"
        table.add_row(name, f"{result['tokens'][name]:,}", f"{loss:.3f}", cost, *leak)
    return table


def _saturation(result: Mapping[str, Any]) -> Table:
    names = list(result["tokens"])
    table = _table(f"Chosen experts that {result['stage']} chooses too, mean over layers", "after stage", *names)
    for stage, agreed in result["saturation"].items():
        table.add_row(stage, *(f"{np.mean(agreed[name]):.1%}" for name in names))
    return table


def _top_tokens(result: Mapping[str, Any]) -> Table:
    table = _table("Tokens that experts prefer (times as often as by chance)", "expert", "tokens")
    rows = [row for layer in result["layers"] for row in layer["top_tokens"].items()]
    for name, tokens in rows[:MOST_EXPERTS]:
        shown = "  ".join(f"{token['text']!r} ×{token['lift']:.1f}" for token in tokens[:SHOWN_TOKENS])
        table.add_row(name, Text(shown or "–"))
    if len(rows) > MOST_EXPERTS:
        table.caption = f"{len(rows) - MOST_EXPERTS} more experts in inspection.json"
    return table


def _table(title: str, first: str, *headers: str) -> Table:
    table = Table(title=title, title_justify="left")
    for header in (first, *headers):
        table.add_column(header)
    return table
