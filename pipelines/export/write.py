"""Write an export beside its place, compare it with the model, and give it its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from lifelong_moe.errors import CorruptError
from lifelong_moe.interop.agreement import MOST, Agreement, compare, read_by_transformers
from lifelong_moe.interop.export import Source, write_folder
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.storage.directories import new_directory
from lifelong_moe.training.restore import build_model
from pipelines.export.card import write_card, write_page
from pipelines.export.export import Order
from pipelines.export.target import clear, signature_of

PROMPT = "The"


@dataclass(frozen=True)
class Exported:
    """A checkpoint that was written."""

    generation: str | None
    """Name of the stage that added it; None for a whole model."""
    folder: str
    """Relative to the export."""
    architecture: str
    """Class of transformers."""
    dtype: str
    difference: float | None = None
    """Largest of two logits; None if transformers is not installed."""
    ours: str | None = None
    """Greedy text after :data:`PROMPT`."""
    theirs: str | None = None


def write(order: Order, console: Console) -> Mapping[str, Any]:
    """Carry out an order; see :func:`pipelines.export.export.export_run`."""
    tensors = order.store.tensors(order.stage)
    architecture = order.stage.architecture
    source = Source(architecture, tensors, order.store.tokenizer(order.stage).text, order.kept)
    model = build_model(architecture, tensors)
    has_transformers = find_spec("transformers") is not None
    if not has_transformers:
        console.print("not compared: transformers is not installed (pip install 'lifelong-moe[transformers]')")
    exported = []
    with new_directory(order.target) as work:
        for generation in order.generations:
            name = None if generation is None else architecture.generations[generation].stage
            folder = work / str(name) if order.asked.every else work
            folder.mkdir(exist_ok=True)
            with console.status(f"{name or order.run}: writing"):
                config = write_folder(source, generation, folder)
            found = Exported(name, str(folder.relative_to(work)), config["architectures"][0], config["dtype"])
            if has_transformers:
                with console.status(f"{name or order.run}: comparing"):
                    found = _compared(found, order, model, generation or 0, folder)
                _tell(console, found)
            write_card(order, found, folder)
            exported.append(found)
        if order.asked.every:
            write_page(order, exported, work)
        order.store.keys.sign(work, signature_of(order.target))
        clear(order.target)
    console.print(f"wrote {order.asked.to}")
    return {
        "run": order.run,
        "stage": order.stage.name,
        "key": order.stage.key,
        "to": order.asked.to,
        "exported": [asdict(one) for one in exported],
        "warnings": list(order.warnings),
    }


def _compared(found: Exported, order: Order, model: LanguageModel, generation: int, folder: Path) -> Exported:
    """The same with what a comparison found.

    Raises:
        CorruptError: If both sides differ.
    """
    tokenizer = order.store.tokenizer(order.stage)
    with read_by_transformers(folder) as theirs:
        agreement = compare(model, generation, theirs, [tokenizer.bos_id, *tokenizer.encode(PROMPT)])
    _require_equal(agreement, order)
    ours, text = (tokenizer.decode(ids) for ids in (agreement.ours, agreement.theirs))
    return Exported(found.generation, found.folder, found.architecture, found.dtype, agreement.difference, ours, text)


def _require_equal(agreement: Agreement, order: Order) -> None:
    # Written so that NaN is refused as well.
    if not agreement.difference <= MOST:
        raise CorruptError(
            f"--to={order.asked.to}: transformers computes logits of it that differ by up to "
            f"{agreement.difference:.1e} from the model's; at most {MOST:.0e} is rounding. It was removed."
        )


def _tell(console: Console, found: Exported) -> None:
    console.print(f"{found.generation or found.architecture}: largest difference of logits {found.difference:.1e}")
    for side, text in (("ours", found.ours), ("transformers", found.theirs)):
        console.print(Text(f"  {side}: {PROMPT}{text!r}"))
