"""Write an export beside its place, compare it with the model, and give it its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from lifelong_moe.errors import CorruptError
from lifelong_moe.interop.adapter import apply_adapter, require_only_low_rank, write_adapter
from lifelong_moe.interop.agreement import compare, read_by_transformers
from lifelong_moe.interop.export import Source, write_folder, write_picker
from lifelong_moe.interop.single import config_of, single_architecture
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.storage.directories import new_directory
from lifelong_moe.storage.temporary import remove_dead, temporary
from lifelong_moe.training.restore import load_model
from pipelines.export.card import base_of, write_card, write_page
from pipelines.export.export import Order
from pipelines.export.target import clear, signature_of
from pipelines.shared.options import ExportFormat

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
    base: str | None = None
    """Where the checkpoint is that an adapter is for; None for a checkpoint."""
    difference: float | None = None
    """Largest of two logits; None if transformers is not installed."""
    ours: str | None = None
    """Greedy text after :data:`PROMPT`."""
    theirs: str | None = None


@dataclass(frozen=True)
class _Job:
    """An order under way."""

    order: Order
    source: Source
    model: LanguageModel
    console: Console
    compares: bool
    """Whether transformers is installed."""

    def is_adapter(self, generation: int | None) -> bool:
        """Whether a generation goes out as a change of the first one."""
        return self.order.asked.format == ExportFormat.peft and bool(generation)


def write(order: Order, console: Console) -> Mapping[str, Any]:
    """Carry out an order; see :func:`pipelines.export.export.export_run`."""
    tensors = order.store.tensors(order.stage)
    texts = [one.text for one in order.store.tokenizers(order.stage)]
    source = Source(order.stage.architecture, tensors, texts, order.kept)
    model = load_model(order.store, order.stage)
    job = _Job(order, source, model, console, find_spec("transformers") is not None)
    for generation in filter(job.is_adapter, order.generations):
        require_only_low_rank(source, generation or 0)
    if not job.compares:
        console.print("not compared: transformers is not installed (pip install 'lifelong-moe[transformers]')")
    # A killed export leaves all that it has written, which may be as large as the model.
    remove_dead(order.target.parent)
    with new_directory(order.target) as work:
        exported = [_one(job, generation, work) for generation in order.generations]
        if order.asked.every:
            picks = write_picker(source, [one.folder for one in exported], work)
            write_page(order, exported, work, picks=picks)
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


def _one(job: _Job, generation: int | None, work: Path) -> Exported:
    """Write a generation, or a whole model, and compare it."""
    order, source = job.order, job.source
    name = None if generation is None else source.architecture.generations[generation].stage
    folder = work / str(name) if order.asked.every else work
    folder.mkdir(exist_ok=True)
    with job.console.status(f"{name or order.run}: writing"):
        if job.is_adapter(generation):
            config: Mapping[str, Any] = config_of(single_architecture(source.architecture, 0), source.kept.config)
            write_adapter(source, generation or 0, config, base_of(order), folder)
        else:
            config = write_folder(source, generation, folder)
    base = base_of(order) if job.is_adapter(generation) else None
    found = Exported(name, str(folder.relative_to(work)), config["architectures"][0], config["dtype"], base)
    if job.compares:
        with job.console.status(f"{name or order.run}: comparing"):
            found = _compared(job, found, generation or 0, folder)
        _tell(job.console, found)
    write_card(order, found, folder)
    return found


def _compared(job: _Job, found: Exported, generation: int, folder: Path) -> Exported:
    """The same with what a comparison found.

    Raises:
        CorruptError: If both sides differ.
    """
    number = job.source.architecture.vocabulary(generation)
    tokenizer = job.order.store.tokenizers(job.order.stage)[number]
    prompt_ids = [tokenizer.bos_id, *tokenizer.encode(PROMPT)]
    if found.base is None:
        with read_by_transformers(folder) as theirs:
            agreement = compare(job.model, generation, theirs, prompt_ids)
    else:
        with temporary(job.order.target.parent) as base:
            write_folder(job.source, 0, base)
            with read_by_transformers(base) as theirs:
                apply_adapter(theirs, folder)
                agreement = compare(job.model, generation, theirs, prompt_ids)
    # Written so that NaN is refused as well.
    if not agreement.difference <= agreement.allowed:
        raise CorruptError(
            f"--to={job.order.asked.to}: transformers computes logits of it that differ by up to "
            f"{agreement.difference:.1e} from the model's; at most {agreement.allowed:.0e} is rounding. It was removed."
        )
    ours, text = (tokenizer.decode(ids) for ids in (agreement.ours, agreement.theirs))
    return replace(found, difference=agreement.difference, ours=ours, theirs=text)


def _tell(console: Console, found: Exported) -> None:
    console.print(f"{found.generation or found.architecture}: largest difference of logits {found.difference:.1e}")
    for side, text in (("ours", found.ours), ("transformers", found.theirs)):
        console.print(Text(f"  {side}: {PROMPT + (text or '')!r}"))
