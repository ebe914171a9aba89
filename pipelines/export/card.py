"""The card of an exported folder, its ``README.md``: where the model comes from, and how to load it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lifelong_moe.errors import LifelongError
from lifelong_moe.interop.adapter import unread_adapter
from lifelong_moe.reports.report import BEFORE, Report
from lifelong_moe.storage.keys import SHORT
from lifelong_moe.store.lineage import expert_names
from lifelong_moe.store.runs import RunRecord
from pipelines.export.export import Order
from pipelines.export.target import CARD, MARK
from pipelines.shared.markdown import plain, table_row
from pipelines.shared.places import ROOT

if TYPE_CHECKING:
    from pipelines.export.write import Exported

LOADING = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = AutoModelForCausalLM.from_pretrained("{folder}")
ids = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=32)[0]))
```"""

LOADING_ADAPTER = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "{folder}")
```"""
PICKING = """`python pick.py TEXT` prints the folder whose model best goes on with a text, by its tokens' frequencies.
In Python it is `Picker(folder).pick(text)`, and `chunks(text)` for each chunk. The page needs numpy, safetensors and
tokenizers alone. Pick again as a text grows. lifelong-moe itself weighs the predictions of all of these models, unless
`routing.mixture` is null; it then picks as the page does, every few tokens."""
TOLD = """The model is told which generation reads a text by the name of its distribution: `labels` of
`generations.json`."""


def write_card(order: Order, exported: Exported, folder: Path) -> None:
    """Write the card of a checkpoint."""
    name = order.asked.to if exported.folder == "." else f"{order.asked.to}/{exported.folder}"
    what = "" if exported.generation is None else f", generation {exported.generation}"
    lines = [
        *_header(order, exported),
        f"# {plain(order.run)}{plain(what)}",
        "",
        MARK,
        "",
        f"{_kind(exported)}, written by lifelong-moe from stage {plain(order.stage.name)} (`{order.stage.key}`).",
        *_agreement(exported),
        "",
        *(line for said in _unread(order, exported) for line in (said, "")),
        "## Loading it",
        "",
        (LOADING if exported.base is None else LOADING_ADAPTER).format(folder=_quotable(name), base=base_of(order)),
        "",
        *origin(order),
    ]
    (folder / CARD).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _unread(order: Order, exported: Exported) -> list[str]:
    if exported.base is None:
        return []
    names = [one.stage for one in order.stage.architecture.generations]
    return [
        f"{plain(said[0].upper() + said[1:])}"
        for said in unread_adapter(order.stage.architecture, names.index(str(exported.generation)))
    ]


def _kind(exported: Exported) -> str:
    kind = f"{exported.architecture}, {exported.dtype}"
    return kind if exported.base is None else f"A PEFT adapter (LoRA) of {kind}, which is the first generation"


def _quotable(path: str) -> str:
    """A path that stands in code; one that could end it is left out."""
    return path if path.isascii() and path.isprintable() and not {'"', "`", "\\"} & {*path} else "FOLDER"


def base_of(order: Order) -> str:
    """Where the checkpoint of the first generation is, or else its name."""
    first = order.stage.architecture.generations[0].stage
    return _quotable(f"{order.asked.to}/{first}") if order.asked.every else first


def write_page(order: Order, exported: Sequence[Exported], folder: Path, *, picks: bool) -> None:
    """Write the card of an export of all generations.

    Args:
        order: What was asked for.
        exported: What was written.
        folder: Where it goes.
        picks: Whether there is a page that picks a generation.
    """
    lines = [
        *_header(order),
        f"# {plain(order.run)}",
        "",
        MARK,
        "",
        f"All generations of stage {plain(order.stage.name)} (`{order.stage.key}`), written by lifelong-moe, each with "
        f"a card of its own. A text is read by one of them.",
        "",
        PICKING if picks else TOLD,
        "",
        "| folder | architecture | largest difference of logits |",
        "|---|---|---|",
    ]
    for one in exported:
        lines.append(table_row([one.folder, one.architecture, _measured(one)]))
    (folder / CARD).write_text("\n".join([*lines, "", *origin(order)]) + "\n", encoding="utf-8")


def _measured(exported: Exported) -> str:
    return "not compared" if exported.difference is None else f"{exported.difference:.1e}"


def _header(order: Order, exported: Exported | None = None) -> list[str]:
    licensed = [] if order.kept.license is None else [f"license: {order.kept.license}"]
    library = "transformers" if exported is None or exported.base is None else "peft"
    return ["---", f"library_name: {library}", "pipeline_tag: text-generation", *licensed, "---", ""]


def _agreement(exported: Exported) -> list[str]:
    if exported.difference is None:
        return ["", "It was not compared with the model: transformers was not installed."]
    return [
        "",
        f"Largest difference of two logits, as transformers reads it: {exported.difference:.1e}.",
    ]


def origin(order: Order) -> list[str]:
    """Lineage, data and losses of an export's stage, and the checkpoint that it grew from."""
    return [*_base(order), "## Lineage", "", *_lineage(order), "", *_losses(order)]


def _base(order: Order) -> list[str]:
    first = order.store.chain(order.stage.key)[0]
    if first.derived is None or not first.is_imported:
        return []
    licensed = order.kept.license
    said = "its card names no licence" if licensed is None else f"licence of its card: {plain(licensed)}"
    return ["## Base", "", f"Grown from a checkpoint with the hash `{first.derived.get('sha256')}`; {said}.", ""]


def _lineage(order: Order) -> Iterator[str]:
    yield "| stage | key | trained on (SHA-256 of the documents, 16 digits) | added experts | weights SHA-256 |"
    yield "|---|---|---|---|---|"
    for stage in order.store.chain(order.stage.key):
        data = ", ".join(f"{name} {digest[:SHORT]}" for name, digest in stage.data.items()) or "–"
        names = expert_names(stage.architecture, stage.name)
        yield table_row([stage.name, stage.key[:SHORT], data, names, stage.weights_hash[:SHORT]])


def _losses(order: Order) -> list[str]:
    """Bits per byte after each stage up to this one, as the run's report has them."""
    try:
        report = RunRecord(ROOT, order.run).report(Report.from_json)
    except LifelongError:
        # Damaged: a card without losses is better than no export.
        report = None
    if report is None:
        return []
    keys = [stage.key for stage in report.stages]
    if order.stage.key not in keys:
        return []
    last = keys.index(order.stage.key) + 1
    rows = [(BEFORE, report.bits_per_byte_at_init)]
    rows += [(stage.name, row) for stage, row in zip(report.stages[:last], report.bits_per_byte, strict=False)]
    head = ["## Held-out loss, bits per byte", ""]
    if None not in order.generations and len(order.stage.architecture.generations) > 1:
        head += ["Of all generations together, as lifelong-moe reads texts. One of them alone loses more.", ""]
    head.append(table_row(["after", *report.distributions]))
    head.append("|---" * (len(report.distributions) + 1) + "|")
    return head + [table_row([name, *(f"{value:.3f}" for value in row)]) for name, row in rows] + [""]
