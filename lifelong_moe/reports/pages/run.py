"""A run's page: its verdict, losses, cost, experts and lineage, and how to go on."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence

from lifelong_moe.measures import MEASURES
from lifelong_moe.reports.pages.shell import Html, beginning, cell, document, joined, picture, put, table, tag
from lifelong_moe.reports.report import BEFORE, Report
from lifelong_moe.reports.verdict import CLEAR, GLOSSARY, report_verdict
from lifelong_moe.storage.keys import SHORT, content_key
from lifelong_moe.store.lineage import LineageRow

LAYOUT = 1
"""Raised where the same report makes another page."""
SECTIONS = ("Verdict", "Losses", "Curves", "Cost", "Experts", "Lineage", "How to continue")
CURVES, LOAD = "curves.png", "expert_load.png"
"""Pictures that the page shows, by their names in the run's folder."""


def page_begins(report: Report) -> str:
    """The beginning of a report's page, which no other report's page has."""
    return beginning(content_key([LAYOUT, report.to_json()]))


def run_page(report: Report, lineage: Sequence[LineageRow], images: Mapping[str, bytes]) -> str:
    """Make a run's page.

    Args:
        report: Of the run.
        lineage: Its stages, oldest first.
        images: PNG files by name; the page needs :data:`CURVES` and :data:`LOAD`.
    """
    made = (
        _verdict(report),
        [_losses(report)],
        [_curves(report, images[CURVES])],
        [_cost(report)],
        _experts(report, images[LOAD]),
        [_lineage(lineage)],
        [_continue(report.run)],
    )
    what = f"Method {report.method}, seed {report.seed}, {_number(len(report.stages), 'stage')}."
    body: list[str] = [tag("p", what, class_="quiet"), _contents()]
    for title, parts in zip(SECTIONS, made, strict=True):
        name = _anchor(title)
        heading = tag("h2", title, id=f"{name}-title")
        body.append(tag("section", heading, joined(parts), id=name, aria_labelledby=f"{name}-title"))
    key = content_key([LAYOUT, report.to_json()])
    return document(f"Run {report.run}", body, key=key)


def _contents() -> Html:
    items = (tag("li", tag("a", title, href=f"#{_anchor(title)}")) for title in SECTIONS)
    return tag("nav", tag("ul", *items), aria_label="Contents")


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _verdict(report: Report) -> Iterator[Html]:
    for sentence in report_verdict([report]):
        yield tag("p", sentence, class_="verdict")
    words = [part for word, meaning in GLOSSARY.items() for part in (tag("dt", word), tag("dd", meaning))]
    yield tag("details", tag("summary", "What the words mean"), tag("dl", *words))


def _losses(report: Report) -> Html:
    """The loss matrix, with the change since each distribution was last learned."""
    columns, learned = list(enumerate(report.distributions)), report.learned_last()
    rows: list[list[str]] = [[BEFORE, *(f"{value:.3f}" for value in report.bits_per_byte_at_init)]]
    for i, (stage, losses) in enumerate(zip(report.stages, report.bits_per_byte, strict=True)):
        row: list[str] = [stage.name]
        for j, name in columns:
            last = learned.get(name, len(report.stages))
            row.append(_loss(losses[j], report.bits_per_byte[last][j] if i > last else None, name in stage.learns))
        rows.append(row)
    lost, rise, shown = report.forgetting_bits_per_byte, report.forgetting_rise(), MEASURES["forgetting_bits_per_byte"]
    if lost:
        rises = MEASURES["forgetting_rise"]
        ends = (
            joined([shown.show(lost[n]), tag("small", f"({rises.show(rise[n])} %)")]) if n in lost else "–"
            for n in report.distributions
        )
        rows.append([shown.title, *ends])
    caption = (
        "Held-out loss in bits per byte after each stage; lower is better. Bold: the stage learned this text. Below a "
        f"loss: the change since the text was last learned, coloured from {CLEAR} on."
    )
    found = table(caption, ["after stage", *report.distributions], rows, feet=1 if lost else 0)
    if not report.not_measured:
        return found
    return joined([found, tag("p", f"No longer measured: {', '.join(report.not_measured)}.")])


def _loss(value: float, then: float | None, learns: bool) -> Html:
    shown = f"{value:.3f}"
    if learns:
        return cell(shown, "own", "learned here")
    if then is None:
        return cell(shown)
    change = value - then
    kind = "" if abs(change) < CLEAR else "worse" if change > 0 else "better"
    told = MEASURES["forgetting_bits_per_byte"].show(change)
    return cell(Html(f"{put(shown)}{tag('small', f'({told})')}"), kind, kind)


def _curves(report: Report, image: bytes) -> Html:
    alt = (
        f"Lines of held-out loss over {_number(len(report.stages), 'stage')}, one for each of "
        f"{_number(len(report.distributions), 'distribution')}. The table of losses has the same numbers."
    )
    return picture(image, alt, "Held-out loss of each distribution over the stages.")


def _cost(report: Report) -> Html:
    rows = [
        [
            stage.name + (" (shared)" if stage.shared else ""),
            f"{stage.tokens:,}",
            f"{stage.active_flops:.2e}",
            f"{stage.seconds:,.0f}",
            f"{stage.tokens_per_second:,.0f}",
            f"{stage.epochs:.2f}",
            _millions(stage.parameters_trainable),
            _millions(stage.parameters_active),
            _millions(stage.parameters_total),
        ]
        for stage in report.stages
    ]
    sums = (sum(getattr(stage, name) for stage in report.stages) for name in ("tokens", "active_flops", "seconds"))
    tokens, flops, seconds = sums
    rows.append(["all stages", f"{tokens:,}", f"{flops:.2e}", f"{seconds:,.0f}", *["–"] * 5])
    headers = ["stage", "tokens", "active FLOPs", "seconds", "tokens/s", "epochs", "trainable", "active", "parameters"]
    caption = "Cost of training, and parameters in millions: trained in the stage, used by one token, and all."
    if any(stage.shared for stage in report.stages):
        caption += " Shared stages were trained by another run."
    return table(caption, headers, rows, feet=1)


def _experts(report: Report, image: bytes) -> Iterator[Html]:
    total = report.stages[-1].experts_per_layer
    alt = (
        f"Heat map of the share of each layer's tokens that each of {total} experts gets, for each of "
        f"{_number(len(report.distributions), 'distribution')}. The table below sums it up."
    )
    yield picture(image, alt, "Load of the experts by distribution and layer, after the last stage.")
    leaks = report.leaks()
    busiest, unused = MEASURES["max_over_mean"], MEASURES["unused_experts"]
    headers = ["distribution", f"{busiest.title}, load over the mean", unused.title]
    if leaks:
        headers.append(MEASURES["leak"].title)
    if report.mixture:
        headers += [MEASURES["readers"].title, "predicted by"]
    rows = []
    for name in report.distributions:
        found = report.routing[name]
        row = [name, busiest.show(found.max_over_mean), str(found.unused_experts)]
        if leaks:
            row.append(MEASURES["leak"].show(leaks[name]) if name in leaks else "–")
        if report.mixture:
            use = report.mixture.get(name)
            row += ["–", "–"] if use is None else [MEASURES["readers"].show(use.readers), _shares(use.shares)]
        rows.append(row)
    caption = "How each distribution uses the experts after the last stage: mean load, and unused ones of all layers."
    yield table(caption, headers, rows, texts=(len(headers) - 1,) if report.mixture else ())


def _shares(shares: Mapping[str, float]) -> str:
    """The generations that weigh in a prediction, the heaviest first."""
    heaviest = sorted(shares.items(), key=lambda one: -one[1])
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in heaviest if share >= 0.005)


def _lineage(rows: Sequence[LineageRow]) -> Html:
    cells = []
    for row in rows:
        data = [f"{name} {digest[:12]}" for name, digest in row.data.items()]
        if row.checkpoint is not None:
            data = [f"{row.checkpoint['architecture']}, files {row.checkpoint['sha256'][:12]}"]
        cells.append([row.name, row.key[:SHORT], (row.parent or "–")[:SHORT], ", ".join(data), row.experts])
        cells[-1].append(row.weights_sha256[:SHORT])
    headers = ["stage", "key", "parent", "trained on", "created experts", "weights SHA-256"]
    return table("Which stage created which experts, and from what data.", headers, cells, texts=range(1, 6))


def _continue(run: str) -> Html:
    name = shlex.quote(run)
    ways = {
        "Learn something new": (
            "Add a distribution and a stage at the end of the configuration, and start the same command again. Stages "
            "that are committed are not trained again."
        ),
        "Compare it with another run": tag("code", f"lifelong-moe report {name} OTHER"),
        "See what its experts do": tag("code", f"lifelong-moe inspect {name}"),
        "Let it write": tag("code", f"lifelong-moe generate {name} PROMPT"),
        "Measure it on other text": tag("code", f"lifelong-moe evaluate {name} --data FILES"),
        "Take it elsewhere": tag("code", f"lifelong-moe export {name} --to FOLDER"),
    }
    return tag("dl", *(part for what, how in ways.items() for part in (tag("dt", what), tag("dd", how))))


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f}"


def _number(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")
