"""Tables and coloured text of an inspection, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lifelong_moe.errors import visible
from lifelong_moe.evaluation.routed_text import RoutedText
from lifelong_moe.reports.figures.specialization import can_leak
from pipelines.shared.tables import show

ANSI = [f"bright_{name}" for name in ("red", "green", "yellow", "blue", "magenta", "cyan")]
ANSI += ["white", "green", "yellow", "magenta", "cyan", "red"]
"""Backgrounds for terminals of 16 colours, which would show every light hue as white."""
MOST_EXPERTS = 48
"""Experts whose top tokens are shown, about a screenful; ``inspection.json`` has all."""
SHOWN_TOKENS = 5


def text(console: Console, routed: RoutedText) -> None:
    """Print the text once, each token in the colour of its owner; where there are too few colours, with its number.

    The experts of each token are in the page of ``--html``, the table of ``--save`` and ``--json``.
    """
    few = console.color_system in ("standard", "windows")
    colours = ANSI if few else routed.colours
    plain = console.color_system is None or len(routed.owners) > len(colours)
    legend, body = Text(), Text()
    for index, (name, count) in enumerate(zip(routed.owners, routed.counts, strict=True)):
        if count:
            shown = f"{_number(index)} {visible(name)}" if plain else f" {visible(name)} "
            legend.append("  " if legend else "")
            legend.append(shown, style="" if plain else f"black on {colours[index]}").append(f" {count}")
    for token, begins in zip(routed.tokens, routed.begins(), strict=True):
        # A bare line end has no background to colour.
        shown = visible(token.text) if plain else visible(token.text).replace("\n", "⏎\n")
        body.append(_number(token.owner) if plain and begins else "")
        body.append(shown, style="" if plain else f"black on {colours[token.owner]}")
    how = "Its number stands where it takes over." if plain else "Colours tell whose a token is."
    console.print(f"{routed.rule} {how} Each token's experts: --html FILE, --save FILE.parquet or --json")
    console.print(legend, soft_wrap=True)
    console.print()
    console.print(body, soft_wrap=True)


def _number(owner: int) -> str:
    """The mark of an owner in a text without colours."""
    return f"⟨{owner + 1}⟩"


def heldout(console: Console, result: Mapping[str, Any]) -> None:
    """Print the tables of an inspection on held-out text."""
    show(console, _layers(result))
    show(console, _by_distribution(result))
    if result["saturation"]:
        show(console, _saturation(result))
    show(console, _top_tokens(result))


def _layers(result: Mapping[str, Any]) -> Table:
    headers = ("experts", "with token", "shuffled", "with distribution", "shuffled", "mean cosine", "unused")
    title = f"{result['run']}, stage {result['stage']}: mutual information of experts, in nats"
    table = _table(title, "layer", *headers)
    for layer in result["layers"]:
        table.add_row(
            f"L{layer['layer']}",
            str(len(layer["experts"])),
            *_information(layer["token"]),
            *_information(layer["distribution"]),
            _mean_cosine(layer["similarity"]),
            ", ".join(layer["dead"]) or "–",
        )
    return table


def _information(information: Mapping[str, float] | None) -> tuple[str, str]:
    if information is None:
        return "–", "–"
    return f"{information['nats']:.4f}", f"{information['null_mean']:.4f} (95 %: {information['null_95']:.4f})"


def _mean_cosine(similarity: Sequence[Sequence[float]]) -> str:
    """Mean over all pairs of different experts."""
    matrix = np.array(similarity)  # shape: (E, E)
    # Without the diagonal, where every expert agrees with itself.
    pairs = matrix[~np.eye(len(matrix), dtype=bool)]
    return f"{pairs.mean():+.3f}" if pairs.size else "–"


def _by_distribution(result: Mapping[str, Any]) -> Table:
    # With one generation no expert is newer than the text, so the columns would all be 0.
    leaky = result["layers"] if can_leak(result) else ()
    layers = [f"leak L{layer['layer']}" for layer in leaky]
    table = _table(
        "The first tokens of each held-out text (--tokens)",
        "distribution",
        "tokens",
        "nats/token",
        "experts shuffled",
        *layers,
    )
    for name, losses in result["shuffled"].items():
        loss, shuffled = losses["nats_per_token"], losses["shuffled_nats_per_token"]
        leak = (f"{layer['leak'][name]:.1%}" for layer in leaky)
        cost = f"{shuffled:.3f} ({shuffled - loss:+.3f})"
        table.add_row(name, f"{result['tokens'][name]:,}", f"{loss:.3f}", cost, *leak)
    return table


def _saturation(result: Mapping[str, Any]) -> Table:
    names = list(result["tokens"])
    table = _table(
        f"Share of chosen experts that {result['stage']} also chooses, mean over layers", "after stage", *names
    )
    for stage, agreed in result["saturation"].items():
        table.add_row(stage, *(f"{np.mean(agreed[name]):.1%}" for name in names))
    return table


def _top_tokens(result: Mapping[str, Any]) -> Table:
    title = "Tokens that experts prefer (× how often the expert gets the token, relative to all tokens)"
    table = _table(title, "expert", "tokens")
    rows = [row for layer in result["layers"] for row in layer["top_tokens"].items()]
    for name, tokens in rows[:MOST_EXPERTS]:
        shown = "  ".join(f"{_named(token)} ×{token['lift']:.1f}" for token in tokens[:SHOWN_TOKENS])
        table.add_row(name, shown or "–")
    if len(rows) > MOST_EXPERTS:
        table.caption = f"{len(rows) - MOST_EXPERTS} more experts in inspection.json"
    return table


def _named(token: Mapping[str, Any]) -> str:
    """A token's text, or its id if it is part of a character and has no text of its own."""
    return f"#{token['token_id']}" if "\N{REPLACEMENT CHARACTER}" in token["text"] else repr(token["text"])


def _table(title: str, first: str, *headers: str) -> Table:
    table = Table(title=title, title_justify="left")
    for header in (first, *headers):
        table.add_column(header)
    return table
