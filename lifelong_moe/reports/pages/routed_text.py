"""A text whose tokens are coloured and numbered by their experts, as a page."""

from __future__ import annotations

from lifelong_moe.evaluation.routed_text import RoutedText, describe
from lifelong_moe.reports.pages.shell import BLACK, Html, document, tag


def text_page(routed: RoutedText, title: str) -> str:
    """A page of the text, with experts and gate weights on pointing at a token, and a legend on top.

    The number of a token's owner stands where the owner changes, so that no colour needs to be told from another.
    """
    # Classes, not inline styles: a page has thousands of tokens and few owners.
    rules = f".token{{color:{BLACK};border-radius:3px;padding:1px 0}}sup{{font-size:.65em;color:var(--quiet)}}"
    rules += ".legend li{margin:.2rem 0}.legend .token{padding:2px 8px}"
    rules += "".join(f".o{i}{{background:{colour}}}" for i, colour in enumerate(routed.colours))
    legend = (
        tag("li", tag("span", name, class_=f"token o{i}"), f" ({count})", value=str(i + 1))
        for i, (name, count) in enumerate(zip(routed.owners, routed.counts, strict=True))
        if count
    )
    first = "the generations that predict what follows it with their weights, then " if routed.is_mixture else ""
    hint = f"Point at a token to see {first}its experts and their gate weights, a line a layer."
    parts: list[Html] = []
    for token, begins in zip(routed.tokens, routed.begins(), strict=True):
        if begins:
            parts.append(tag("sup", str(token.owner + 1)))
        parts.append(tag("span", token.text, class_=f"token o{token.owner}", title=describe(routed, token)))
    body = (
        tag("p", f"{routed.rule} It has the colour of its owner, whose number stands where it takes over. {hint}"),
        tag("h2", "Legend"),
        tag("ol", *legend, class_="legend"),
        tag("h2", "Text"),
        # The first line end after the tag belongs to the markup.
        tag("pre", Html("\n"), *parts),
    )
    return document(title, body, rules=rules)
