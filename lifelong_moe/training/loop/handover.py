"""A phase as plain data: what its steps depend on, for processes that share no memory with the one that prepared them.

The folder holds JSON, the tensors of all models in one safetensors file, where each stands once however many models
share it, and the text in another; text that is mapped from the disk is named, not copied. A number in the JSON of a
tensor is its place in the file.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lifelong_moe.clustering.chunks import ChunkDomains, DomainFile
from lifelong_moe.config.routing.own import allow_router
from lifelong_moe.config.routing.topk import CustomRouterConfig
from lifelong_moe.config.training import CheckpointConfig, FrozenConfig, TrainerConfig
from lifelong_moe.data.tokens.blocks import BlockSource, Domains, RowSource
from lifelong_moe.data.tokens.shards import TokenShard
from lifelong_moe.errors import TryAgainError
from lifelong_moe.model.int8 import hold_as, how_held
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.ops.initializers import without_memory
from lifelong_moe.plan.architecture import Architecture
from lifelong_moe.plan.phase import Phase
from lifelong_moe.plan.spec import StageSpec
from lifelong_moe.retention.penalty import WeightAnchor
from lifelong_moe.storage.directories import write_directory
from lifelong_moe.storage.plain import from_plain
from lifelong_moe.storage.stored import read_json
from lifelong_moe.training.callbacks.own import allow_own, only_allowed
from lifelong_moe.training.loop.context import Outlook
from lifelong_moe.training.loop.rollback import Rollbacks

JOB, TENSORS, TEXT = "phase.json", "tensors.safetensors", "text.safetensors"
EXPERTS, ANCHORS = ".moe.banks.", ("anchors", "importances")
Plain = dict[str, Any]
"""JSON data."""


@dataclass(frozen=True)
class PhaseJob:
    """What the steps of a phase depend on besides models and text."""

    spec: StageSpec
    phase: Phase
    number: int
    """Of the phase in its stage."""
    first_step: int
    """Steps of the stage before it."""
    order_step: int
    """Steps before it that share its order of samples."""
    seed: int
    """Of that order."""
    work: Path
    """Folder of step checkpoints."""
    resume: Path | None
    """Step checkpoint to continue from."""
    rollbacks: Rollbacks
    """Of the stage so far."""
    trainer: TrainerConfig
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    frozen: FrozenConfig = dataclasses.field(default_factory=FrozenConfig)
    run_id: str | None = None
    outlook: Outlook | None = None
    """The stage's place in the run that trains it; None where it stands alone."""

    def to_json(self) -> Plain:
        """As plain JSON data, without classes of the user's that this process must not build."""
        trainer = only_allowed(self.trainer)
        paths = {"work": str(self.work), "resume": None if self.resume is None else str(self.resume)}
        replaced = {"spec": self.spec.to_json(), "trainer": dataclasses.asdict(trainer), **paths}
        return dataclasses.asdict(dataclasses.replace(self, trainer=trainer)) | replaced

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PhaseJob:
        """The inverse of :meth:`to_json`; lets this process build the user's classes that it names."""
        resume = None if data["resume"] is None else Path(data["resume"])
        job = from_plain(cls, {**data, "work": Path(data["work"]), "resume": resume})
        allow_own(job.trainer)
        return job


@dataclass(frozen=True)
class PhaseModels:
    """The models of a phase, frozen as the stage freezes them."""

    model: LanguageModel
    teacher: LanguageModel | None
    anchor: WeightAnchor | None
    assignments_before: Tensor | None
    """Clusters of a sample at the beginning of the phase."""
    random_state: Tensor
    """Of the CPU's generator, before the first step."""


@dataclass(frozen=True)
class PhaseText:
    """The text of a phase."""

    sources: Sequence[BlockSource | RowSource]
    """New text first."""
    watched: Mapping[str, TokenShard]
    """Excerpts of held-out text by distribution."""


def hand_over(folder: Path, job: PhaseJob, models: PhaseModels, text: PhaseText, more: Plain) -> None:
    """Write a phase to a folder, in place of what is there.

    Args:
        folder: On a disk that all processes of the phase see.
        job: The phase.
        models: Its models.
        text: Its text.
        more: Further plain data.

    Raises:
        ResourceError: If the disk is full.
    """
    shutil.rmtree(folder, ignore_errors=True)
    tensors, arrays = _Tensors(), _Arrays()
    anchor = models.anchor
    plain = {
        "job": job.to_json(),
        "model": _model_plain(models.model, tensors),
        "teacher": None if models.teacher is None else _model_plain(models.teacher, tensors),
        "anchor": None
        if anchor is None
        else {
            "weight": anchor.weight,
            "anchors": tensors.table(anchor.anchors),
            "importances": None if anchor.importances is None else tensors.table(anchor.importances),
        },
        "assignments_before": None if models.assignments_before is None else tensors.place(models.assignments_before),
        "random_state": tensors.place(models.random_state),
        "sources": [_source_plain(source, arrays) for source in text.sources],
        "watched": {name: _shard_plain(shard, arrays) for name, shard in text.watched.items()},
        "more": more,
    }
    # Which of them train is known once all models have named theirs.
    written = json.dumps({**plain, "trained": tensors.trained})
    write_directory(
        folder,
        {
            TENSORS: partial(save_file, tensors.by_place),
            TEXT: partial(save_arrays, arrays.by_place),
            JOB: lambda path: path.write_text(written, encoding="utf-8"),
        },
    )


def take_over(folder: Path) -> tuple[PhaseJob, PhaseModels, PhaseText, Plain]:
    """Read what :func:`hand_over` wrote, with copies of the tensors on the CPU.

    Of a model of which each process will hold a part, parameters stay mapped from the file: that part is copied alone.
    """
    plain = read_json(folder / JOB, finite=False)
    mapped, parted = load_file(folder / TENSORS), _parted(plain)
    # Copied: what safetensors maps from the file begins anywhere, and the rounding of products depends on alignment.
    stored = {place: tensor if place in parted else tensor.clone() for place, tensor in mapped.items()}
    trained, arrays = set(plain["trained"]), load_arrays(folder / TEXT)
    # One object each, so that what models shared they share again.
    shared = {p: nn.Parameter(t, requires_grad=p in trained) for p, t in stored.items() if t.is_floating_point()}
    shared |= {p: nn.Parameter(t, requires_grad=False) for p, t in stored.items() if not t.is_floating_point()}
    anchor = plain["anchor"]
    models = PhaseModels(
        _model(plain["model"], stored, shared),
        None if plain["teacher"] is None else _model(plain["teacher"], stored, shared),
        None
        if anchor is None
        else WeightAnchor(
            anchor["weight"],
            {name: stored[place] for name, place in anchor["anchors"].items()},
            anchor["importances"] and {name: stored[place] for name, place in anchor["importances"].items()},
        ),
        None if plain["assignments_before"] is None else stored[plain["assignments_before"]],
        stored[plain["random_state"]],
    )
    sources = [_source(one, arrays) for one in plain["sources"]]
    text = PhaseText(sources, {name: _shard(one, arrays) for name, one in plain["watched"].items()})
    return PhaseJob.from_json(plain["job"]), models, text, plain["more"]


def _parted(plain: Plain) -> set[str]:
    """Places of the tensors of which each process will copy its part, and which nothing computes with before."""
    trainer = from_plain(TrainerConfig, plain["job"]["trainer"])
    if not trainer.is_divided:
        return set()
    model, teacher, anchor = plain["model"], plain["teacher"] or {}, plain["anchor"] or {}
    found = {place for name, place in model["parameters"].items() if trainer.is_sharded or EXPERTS in name}
    # A teacher is whole in each process, and may share parameters with the model.
    whole = model["buffers"], teacher.get("parameters"), teacher.get("buffers"), *map(anchor.get, ANCHORS)
    return found.difference(*(table.values() for table in whole if table))


class _Tensors:
    """Tensors by place, each once."""

    def __init__(self) -> None:
        self.by_place: dict[str, Tensor] = {}
        self.trained: list[str] = []
        """Places of those that have gradients."""
        # The objects beside their places: an id is another's once its object is gone.
        self._places: dict[int, tuple[str, Tensor]] = {}

    def place(self, tensor: Tensor) -> str:
        """Where a tensor stands in the file."""
        if id(tensor) not in self._places:
            place = str(len(self._places))
            self._places[id(tensor)] = place, tensor
            if tensor.requires_grad:
                self.trained.append(place)
            whole = tensor.detach().cpu().contiguous()
            # Views of one storage, such as matrices side by side, are refused by safetensors where they overlap.
            self.by_place[place] = whole if whole.untyped_storage().nbytes() == whole.nbytes else whole.clone()
        return self._places[id(tensor)][0]

    def table(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Places by name."""
        return {name: self.place(tensor) for name, tensor in tensors.items()}


def _model_plain(model: LanguageModel, tensors: _Tensors) -> Plain:
    return {
        "architecture": model.architecture.to_json(),
        "held": how_held(model),
        "parameters": tensors.table(dict(model.named_parameters(remove_duplicate=False))),
        "buffers": tensors.table(dict(model.named_buffers(remove_duplicate=False))),
        "numbers": {name: numbers for name, module in model.named_modules() if (numbers := _numbers(module))},
    }


def _numbers(module: nn.Module) -> dict[str, bool | int | float]:
    """What a module knows beside its tensors, such as whether it trains, or hashes until its centroids are fitted."""
    kinds = (bool, int, float)
    return {n: v for n, v in vars(module).items() if type(v) in kinds and not n.startswith("_")}


def _model(plain: Plain, stored: Mapping[str, Tensor], shared: Mapping[str, nn.Parameter]) -> LanguageModel:
    architecture = Architecture.from_json(plain["architecture"])
    # The user's own router may need numbers to be built. This process builds what the main process has built.
    own = isinstance(architecture.routing, CustomRouterConfig)
    allow_router(architecture.routing.mode if own else None)
    with nullcontext() if own else without_memory():
        model = LanguageModel(architecture)
    hold_as(model, {name: (held, computed) for name, (held, computed) in plain["held"].items()})
    for name, place in plain["parameters"].items():
        module, leaf = _owner(model, name)
        module._parameters[leaf] = shared[place]
    for name, place in plain["buffers"].items():
        module, leaf = _owner(model, name)
        module._buffers[leaf] = stored[place]
    for name, numbers in plain["numbers"].items():
        vars(model.get_submodule(name)).update(numbers)
    return model


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, leaf = name.rpartition(".")
    return model.get_submodule(owner), leaf


class _Arrays:
    """Arrays by place; those that are whole files are named instead."""

    def __init__(self) -> None:
        self.by_place: dict[str, NDArray[Any]] = {}

    def plain(self, array: NDArray[Any] | None) -> str | Plain | None:
        """Where an array stands: its place, a file and the type of its numbers, or the number that it repeats."""
        if array is None:
            return None
        # As :func:`lifelong_moe.model.domains.same_domain` makes it: to write it would fill the disk with one number.
        if array.size and not any(array.strides):
            return {"value": array.flat[0].item(), "shape": list(array.shape), "dtype": array.dtype.str}
        path = getattr(array, "filename", None)
        # A part of a mapped file remembers the file's name, too.
        if path is not None and Path(path).stat().st_size == array.nbytes:
            return {"path": str(path), "dtype": array.dtype.str}
        place = str(len(self.by_place))
        self.by_place[place] = np.ascontiguousarray(array)
        return place


def _array(plain: str | Plain | None, arrays: Mapping[str, NDArray[Any]]) -> Any:
    if isinstance(plain, dict) and "value" in plain:
        return np.broadcast_to(np.array(plain["value"], plain["dtype"]), plain["shape"])
    if isinstance(plain, dict):
        return np.memmap(plain["path"], dtype=plain["dtype"], mode="r")
    return None if plain is None else arrays[plain]


SHARD = ("tokens", "offsets", "text_bytes", "answer_bytes")


def _shard_plain(shard: TokenShard, arrays: _Arrays) -> Plain:
    return {"separator": shard.separator} | {name: arrays.plain(getattr(shard, name)) for name in SHARD}


def _shard(plain: Plain, arrays: Mapping[str, NDArray[Any]]) -> TokenShard:
    found = {name: _array(plain[name], arrays) for name in SHARD}
    return TokenShard(**found, separator=plain["separator"])


DOMAINS = ("domain_ids", "teacher_domain_ids")


def _source_plain(source: BlockSource | RowSource, arrays: _Arrays) -> Plain:
    plain = {name: _domains_plain(getattr(source, name), arrays) for name in DOMAINS} | {"bos_id": source.bos_id}
    if isinstance(source, RowSource):
        return plain | {"rows": arrays.plain(source.rows)}
    return plain | {"shard": _shard_plain(source.shard, arrays), "context": source.context, "limit": source.limit}


def _domains_plain(domains: Domains | None, arrays: _Arrays) -> str | Plain | None:
    if not isinstance(domains, ChunkDomains):
        return arrays.plain(domains)
    file = domains.file
    ids = arrays.plain(domains.ids_C) if file is None else None
    kept = None if file is None else dataclasses.asdict(file) | {"folder": str(file.folder.absolute())}
    return {"chunk": domains.chunk, "first": domains.first, "ids": ids, "file": kept}


def _domains(plain: str | Plain | None, arrays: Mapping[str, NDArray[Any]], offsets: NDArray[np.int64]) -> Any:
    if not isinstance(plain, dict) or "chunk" not in plain:
        return _array(plain, arrays)
    if plain["file"] is None:
        return ChunkDomains(offsets, plain["chunk"], _array(plain["ids"], arrays), plain["first"])
    file = DomainFile(**plain["file"] | {"folder": Path(plain["file"]["folder"])})
    if (ids_C := file.find()) is None:
        raise TryAgainError(f"{file.path}: changed or removed while a stage trained; start again.")
    return ChunkDomains(offsets, plain["chunk"], ids_C, plain["first"], file)


def _source(plain: Plain, arrays: Mapping[str, NDArray[Any]]) -> BlockSource | RowSource:
    if "rows" in plain:
        domains = {name: _array(plain[name], arrays) for name in DOMAINS}
        return RowSource(_array(plain["rows"], arrays), plain["bos_id"], **domains)
    shard = _shard(plain["shard"], arrays)
    domains = {name: _domains(plain[name], arrays, shard.offsets) for name in DOMAINS}
    return BlockSource(shard, plain["context"], plain["bos_id"], **domains, limit=plain["limit"])
