"""Tables of a run for the terminal, and Markdown notes for MLflow."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lifelong_moe.evaluation.routing import dead_experts
from lifelong_moe.measures import MEASURES
from lifelong_moe.plan.planned import PlannedStage
from lifelong_moe.plan.spec import StageSpec
from lifelong_moe.reports.report import BEFORE, Report
from lifelong_moe.reports.verdict import report_verdict
from lifelong_moe.store.stages import CommittedStage
from pipelines.shared.markdown import plain, table_row
from pipelines.shared.tables import show

# Both import torch, and `status`, which shares this file, answers without it.
if TYPE_CHECKING:
    from lifelong_moe.evaluation.evaluation import Evaluation
    from pipelines.shared.workspace import Prepared


def data_table(console: Console, prepared: Prepared) -> None:
    """Print the distributions with sizes, bytes per token and fingerprints."""
    table = Table(title="Data", title_justify="left")
    for column in ("distribution", "documents", "train tokens", "held-out tokens", "bytes/token", "fingerprint"):
        table.add_column(column, justify="left" if column in ("distribution", "fingerprint") else "right")
    data = prepared.data
    for name, record in data.records.items():
        table.add_row(
            name,
            f"{record.documents:,} + {record.heldout_documents:,}",
            f"{record.tokens:,}",
            f"{record.heldout_tokens:,}",
            f"{record.bytes_per_token:.2f}",
            f"{record.train_hash[:12]} / {record.heldout_hash[:12]}",
        )
    show(console, table)
    for name, record in data.records.items():
        if name in data.gone:
            console.print(_gone(name, is_measured=name in data.heldout))
        if record.duplicates:
            console.print(f"{name}: {_documents(record.duplicates, 'a duplicate', 'duplicates')} and left out")
        if record.left_out:
            console.print(
                f"{name}: {_documents(len(record.left_out), 'a near copy', 'near copies')} of held-out text and left "
                f"out of training",
            )
    tokenizer = data.tokenizer
    console.print(f"tokenizer: {tokenizer.vocab_size:,} entries, {tokenizer.hash[:12]}")
    for number, (stage, added) in enumerate(data.identity.added.items(), start=1):
        name = prepared.config.stages[stage].learns[0]
        there = data.later.corpora.get((name, number))
        read = "" if there is None else f"; {name} has {there.train.bytes_per_token:.2f} bytes/token with them"
        console.print(f"stages[{stage}] adds {added.number:,} tokens to it, {added.tokenizer.hash[:12]}{read}")


def _gone(name: str, *, is_measured: bool) -> str:
    """Say that a distribution's text is gone, and what is left of it."""
    if is_measured:
        return f"{name}: its text is gone; its committed stages no longer need it, and the held-out text was kept"
    return (
        f"{name}: its text is gone; its committed stages no longer need it, but the held-out text was not kept, so "
        f"new stages are not measured on it"
    )


def stage_line(
    console: Console,
    planned: PlannedStage,
    stage: CommittedStage,
    shared: bool,
    evaluations: Mapping[str, Evaluation],
) -> None:
    """Print one line about a committed stage."""
    losses = ", ".join(f"{name} {found.bits_per_byte:.3f}" for name, found in evaluations.items())
    how = "shared with another run" if shared else f"{stage.metrics['tokens_per_second']:,.0f} tokens/s"
    console.print(f"{planned.spec.name}: committed as {planned.key[:16]} ({how}); bits per byte: {losses}")
    if passes := stage.metrics.get("epochs_by_distribution"):
        console.print(mixture_sentence(planned.spec, passes))


def mixture_sentence(spec: StageSpec, passes: Mapping[str, float]) -> str:
    """Shares of a stage's mixture, and how often it goes through each distribution."""
    whole = sum(spec.shares)
    parts = (
        f"{name} {share / whole:.1%} ({passes[name]:.2f} epochs)"
        for name, share in zip(spec.new, spec.shares, strict=True)
    )
    return f"{spec.name}: a mixture of {', '.join(parts)}"


def report(console: Console, reports: list[Report]) -> None:
    """Print each run's loss matrix and stages, then all runs side by side."""
    for one in reports:
        show(console, _matrix_table(one))
        if one.not_measured:
            console.print(f"{one.run}: no longer measured: {', '.join(one.not_measured)}")
        show(console, _stages_table(one))
    show(console, _summary_table(reports))


def verdict(console: Console, reports: list[Report]) -> None:
    """Print what runs have shown, in words."""
    tell(console, report_verdict(reports))
    if len(reports) == 1:
        console.print(f"Beside another run: lifelong-moe report {reports[0].run} OTHER", style="dim")


def tell(console: Console, sentences: Iterable[str]) -> None:
    """Print sentences of a verdict, and where their words are explained."""
    for sentence in sentences:
        console.print(sentence, style="bold")
    console.print("What the words mean: lifelong-moe report --glossary", style="dim")


def _documents(number: int, one: str, many: str) -> str:
    return f"1 document is {one}" if number == 1 else f"{number:,} documents are {many}"


def _matrix_table(one: Report) -> Table:
    table = Table(title=f"{one.run} ({one.method}): held-out bits per byte", title_justify="left")
    table.add_column("after stage")
    for name in one.distributions:
        table.add_column(name, justify="right")
    table.add_row(BEFORE, *(f"{value:.3f}" for value in one.bits_per_byte_at_init), style="dim")
    for stage, row in zip(one.stages, one.bits_per_byte, strict=True):
        cells = (
            Text(f"{value:.3f}", style="bold" if name in stage.learns else "")
            for name, value in zip(one.distributions, row, strict=True)
        )
        table.add_row(stage.name, *cells)
    return table


def _stages_table(one: Report) -> Table:
    table = Table(title=f"{one.run}: stages", title_justify="left")
    headers = ("stage", "routing", "experts", "total", "active", "trainable", "tokens", "epochs", "tokens/s", "seconds")
    for header in headers:
        table.add_column(header, justify="left" if header in ("stage", "routing") else "right")
    for stage in one.stages:
        table.add_row(
            stage.name + (" (shared)" if stage.shared else ""),
            stage.routing,
            str(stage.experts_per_layer),
            millions(stage.parameters_total),
            millions(stage.parameters_active),
            millions(stage.parameters_trainable),
            f"{stage.tokens:,}",
            f"{stage.epochs:.2f}",
            f"{stage.tokens_per_second:,.0f}",
            f"{stage.seconds:.0f}",
        )
    return table


def summary_lines(one: Report) -> list[tuple[str, str]]:
    """Names and values of a run's summary, ready to print."""
    last, final = one.stages[-1], one.bits_per_byte[-1]
    # Right after each stage, without the first: plasticity is about what comes later.
    learned = [
        one.bits_per_byte[i][one.distributions.index(name)]
        for i, stage in enumerate(one.stages)
        for name in stage.learns
        if i > 0 and name in one.distributions
    ]
    lines = [("method", one.method), ("routing", last.routing), ("seed", str(one.seed))]
    lines += _forgetting_lines(one)
    lines += [
        _line("forward_transfer_bits_per_byte", one.forward_transfer_bits_per_byte),
        ("newly learned, mean (bits/byte)", f"{sum(learned) / len(learned):.3f}" if learned else "–"),
        _line("final_mean_bits_per_byte", sum(final) / len(final) if final else None),
        ("experts per layer", str(last.experts_per_layer)),
        ("parameters total / active", f"{millions(last.parameters_total)} / {millions(last.parameters_active)}"),
        ("tokens", f"{sum(stage.tokens for stage in one.stages):,}"),
        ("active FLOPs", f"{sum(stage.active_flops for stage in one.stages):.2e}"),
        ("training seconds", f"{sum(stage.seconds for stage in one.stages):.0f}"),
    ]
    if one.mixture:
        for name, use in one.mixture.items():
            shares = ", ".join(f"{stage} {share:.1%}" for stage, share in use.shares.items())
            lines.append((f"generations that predict {name}", shares))
        readers = [use.readers for use in one.mixture.values()]
        cost = f"{sum(readers) / len(readers):.2f}, {max(readers):.2f}"
        lines.append(("generations a token, mean and worst", cost))
    else:
        shown = MEASURES["leak"]
        lines += [(f"{shown.words} of {name} ({shown.unit})", shown.show(leak)) for name, leak in one.leaks().items()]
    churn = [s.training["assignment_churn"] for s in one.stages if "assignment_churn" in s.training]
    if churn:
        lines.append(("churn of assignments, by stage", ", ".join(f"{value:.0%}" for value in churn)))
    # Counted anew: reports of earlier versions also counted experts that only other distributions use.
    lines.append(("experts that no distribution uses", str(dead_experts(one.expert_counts.values()))))
    return lines


def _forgetting_lines(one: Report) -> list[tuple[str, str]]:
    """Forgetting of each old distribution, then the worst and the mean: bits per byte, and the rise of perplexity."""
    lost, rises = one.forgetting_bits_per_byte, one.forgetting_rise()
    measure, rise = MEASURES["forgetting_bits_per_byte"], MEASURES["forgetting_rise"]

    def cell(bits: float, risen: float) -> str:
        return f"{measure.show(bits)} ({rise.show(risen)} %)"

    lines = [(f"{measure.words} of {name} ({measure.unit})", cell(lost[name], rises[name])) for name in lost]
    if len(lost) > 1:  # of one distribution it would say the same
        worst, mean = (MEASURES[f"forgetting_{kind}_bits_per_byte"].title for kind in ("max", "mean"))
        means = [sum(values.values()) / len(values) for values in (lost, rises)]
        lines += [(worst, cell(max(lost.values()), max(rises.values()))), (mean, cell(*means))]
    return lines


def _line(key: str, value: float | None) -> tuple[str, str]:
    return MEASURES[key].title, "–" if value is None else MEASURES[key].show(value)


def _summary_table(reports: list[Report]) -> Table:
    table = Table(title="Side by side" if len(reports) > 1 else "Summary", title_justify="left")
    table.add_column("")
    for one in reports:
        table.add_column(one.run, justify="right")
    columns = [dict(summary_lines(one)) for one in reports]
    # Runs on different distributions have different lines: all of them, in order of first appearance.
    for key in dict.fromkeys(key for column in columns for key in column):
        table.add_row(key, *(column.get(key, "–") for column in columns))
    return table


def run_note(one: Report) -> str:
    """Markdown for the run's MLflow page."""
    lines = [*(plain(sentence) for sentence in report_verdict([one])), ""]
    lines += [f"**{plain(one.run)}** · {plain(one.method)} · seed {one.seed}", "", "Held-out bits per byte:", ""]
    lines += _markdown_matrix(one)
    lines += ["", "| | |", "|---|---|", *map(table_row, summary_lines(one))]
    return "\n".join(lines)


def stage_note(one: Report, index: int, origin: str) -> str:
    """Markdown for a stage's MLflow page and model version; ``origin`` says who trained it, if another run did."""
    stage = one.stages[index]
    lines = [
        f"Stage {index} {plain(stage.name)} of {plain(one.run)} · `{stage.key[:16]}`"
        + (f" · trained by {origin} and shared" if origin else ""),
        "",
        "So far: " + plain(" ".join(report_verdict([one]))),
        "",
        f"{stage.experts_per_layer} experts a layer · {millions(stage.parameters_total)} parameters, "
        f"{millions(stage.parameters_active)} active, {millions(stage.parameters_trainable)} trained · "
        f"{stage.tokens:,} tokens",
        "",
        "Held-out bits per byte so far:",
        "",
        *_markdown_matrix(one),
    ]
    return "\n".join(lines)


def _markdown_matrix(one: Report) -> list[str]:
    lines = [table_row(["after", *one.distributions]), "|---|" + "---:|" * len(one.distributions)]
    for stage, row in zip(one.stages, one.bits_per_byte, strict=True):
        lines.append(table_row([stage.name, *(f"{value:.3f}" for value in row)]))
    return lines


def report_json(one: Report) -> str:
    """The report as ``report.json`` holds it."""
    return json.dumps(one.to_json(), indent=1, ensure_ascii=False)


def millions(count: int) -> str:
    """Format a count in millions, such as ``1.23M``."""
    return f"{count / 1e6:.2f}M"
