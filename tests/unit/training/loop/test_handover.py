"""A phase that is written and read again is the same: models by their tensors and outputs, text by its samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lifelong_moe.clustering.chunks import ChunkDomains, DomainFile
from lifelong_moe.config.growth import FrozenWeights
from lifelong_moe.config.run import RunConfig
from lifelong_moe.config.training import OwnClass, TrainerConfig
from lifelong_moe.data.tokens.blocks import BlockSource, RowSource
from lifelong_moe.data.tokens.shards import TokenShard
from lifelong_moe.data.tokens.windows import evaluation_windows
from lifelong_moe.errors import TryAgainError
from lifelong_moe.model.domains import same_domain
from lifelong_moe.model.int8 import hold_frozen
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.architecture import Generation
from lifelong_moe.plan.methods import stage_specs
from lifelong_moe.retention.penalty import make_anchor
from lifelong_moe.retention.teacher import make_teacher, shared_blocks
from lifelong_moe.training.callbacks import own
from lifelong_moe.training.callbacks.watch import ForgettingWatch, Watched
from lifelong_moe.training.loop.context import Outlook
from lifelong_moe.training.loop.fit import _watch, _watch_plain
from lifelong_moe.training.loop.handover import TENSORS, PhaseJob, PhaseModels, PhaseText, hand_over, take_over
from lifelong_moe.training.loop.rollback import Rollbacks, Skip

Make = Callable[..., LanguageModel]
NO_TEXT = PhaseText([], {})


@pytest.fixture
def job(make_run: Callable[..., RunConfig]) -> PhaseJob:
    spec = stage_specs(make_run())[1]
    phase, rollbacks = spec.phases()[0], Rollbacks(1, (Skip(0, 4, 2),))
    return PhaseJob(spec, phase, 0, 3, 4, 5, Path("work"), Path("work/step-0-00000004"), rollbacks, TrainerConfig())


def handed_over(folder: Path, job: PhaseJob, model: LanguageModel, **more: Any) -> PhaseModels:
    """Models as another process has them."""
    given = {"teacher": None, "anchor": None, "assignments_before": None, "random_state": torch.get_rng_state()} | more
    hand_over(folder / "phase", job, PhaseModels(model, **given), NO_TEXT, {})
    return take_over(folder / "phase")[1]


def tensors(model: LanguageModel) -> dict[str, Tensor]:
    named = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    return dict(named)


def require_same(one: LanguageModel, other: LanguageModel, batch: dict[str, Tensor]) -> None:
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]) and tensor.requires_grad == theirs[name].requires_grad, name
    assert [m.training for m in one.modules()] == [m.training for m in other.modules()]
    outputs = []
    for model in (one, other):
        torch.manual_seed(0)
        outputs.append(model(TokenBatch.of(batch)).hidden_BSD)
    assert torch.equal(*outputs)


def test_models_of_each_kind(
    make_model: Make, make_batch: Callable[..., dict[str, Tensor]], job: PhaseJob, any_router_kind: str, tmp_path: Path
) -> None:
    model = make_model(any_router_kind, (4, 2)).train()
    before = torch.get_rng_state()
    found = handed_over(tmp_path, job, model)
    assert torch.equal(found.random_state, before)
    require_same(found.model, model, make_batch(domains=2 if "bundles" in any_router_kind else 1))


@pytest.mark.parametrize("kind", [FrozenWeights.half, FrozenWeights.int8])
def test_held_weights_changes_and_tied_heads(
    make_model: Make, make_batch: Callable[..., dict[str, Tensor]], job: PhaseJob, kind: FrozenWeights, tmp_path: Path
) -> None:
    born = (Generation("s0", 4), Generation("s1", 2, delta_rank=2), Generation("s2", 2, delta_rank=2))
    model = make_model("labelled_bundles", born, model={"tie_embeddings": True})
    for tensor in tensors(model).values():
        if kind == FrozenWeights.half and tensor.is_floating_point():
            tensor.data = tensor.data.bfloat16().float()
    assert hold_frozen(model, kind) > 0
    found = handed_over(tmp_path, job, model).model
    assert found.head.weight is found.embedding.weight
    require_same(found, model, make_batch(domains=3))


def test_a_teacher_is_held_though_its_architecture_freezes_nothing(
    make_model: Make, make_batch: Callable[..., dict[str, Tensor]], job: PhaseJob, tmp_path: Path
) -> None:
    teacher = make_teacher(make_model("learned", (4,)), [])
    assert hold_frozen(teacher, FrozenWeights.int8) > 0
    found = handed_over(tmp_path, job, make_model("learned", (4, 2)), teacher=teacher).teacher
    assert found is not None
    require_same(found, teacher, make_batch())


def test_a_teacher_shares_what_it_shared(
    make_model: Make, make_batch: Callable[..., dict[str, Tensor]], job: PhaseJob, tmp_path: Path
) -> None:
    model = make_model("learned", (4, 2))
    for parameter in model.trunk_parameters().values():
        parameter.requires_grad_(False)
    anchor = make_anchor(model, {n: p.detach() + 1 for n, p in model.named_parameters()}, 0.5)
    teacher = make_teacher(model, [p for p in model.parameters() if not p.requires_grad])
    number = torch.tensor([[3, 1]])
    found = handed_over(tmp_path, job, model, teacher=teacher, anchor=anchor, assignments_before=number)
    assert found.teacher is not None and found.anchor is not None and found.assignments_before is not None
    require_same(found.teacher, teacher, make_batch())
    ours, theirs = tensors(found.model), tensors(found.teacher)
    shared = {name for name, tensor in tensors(model).items() if tensor is tensors(teacher)[name]}
    assert shared == {name for name in ours if ours[name] is theirs[name]} != set()
    assert shared_blocks(found.model, found.teacher) == shared_blocks(model, teacher)
    assert torch.equal(found.anchor.value(found.model), anchor.value(model))
    assert torch.equal(found.assignments_before, number)


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor lies in the file of a phase that was handed over."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(TENSORS)]
    ranges = [[int(end, 16) for end in line[0].split("-")] for line in lines]
    return any(begin <= tensor.data_ptr() < end for begin, end in ranges)


@pytest.mark.parametrize(
    ("settings", "part"), [({}, "nothing"), ({"strategy": "fsdp"}, ""), ({"expert_parallel": 2}, ".moe.banks.")]
)
@pytest.mark.parametrize("teaches", [False, True])
def test_what_processes_divide_stays_in_the_file(
    make_model: Make, job: PhaseJob, tmp_path: Path, settings: dict[str, Any], part: str, teaches: bool
) -> None:
    model = make_model("learned", (4, 2))
    shared = [*next(model.moe_layers()).parameters()] if teaches else []
    teacher = make_teacher(model, shared) if teaches else None
    job = replace(job, trainer=TrainerConfig(accelerator="cpu", devices=2, **settings))
    anchor = make_anchor(model, {n: p.detach() + 1 for n, p in model.named_parameters()}, 0.5)
    found = handed_over(tmp_path, job, model, teacher=teacher, anchor=anchor)
    mapped = {name for name, parameter in found.model.named_parameters() if is_mapped(parameter)}
    whole = {name for name, parameter in model.named_parameters() if any(parameter is one for one in shared)}
    assert mapped == {name for name, _ in model.named_parameters() if part in name} - whole
    assert not teaches or whole
    assert found.teacher is None or not any(map(is_mapped, found.teacher.parameters()))
    assert found.anchor is not None and not any(map(is_mapped, found.anchor.anchors.values()))


def test_text_is_named_where_it_is_a_file(make_model: Make, job: PhaseJob, tmp_path: Path) -> None:
    np.arange(60, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    mapped = np.memmap(tmp_path / "tokens.bin", dtype=np.uint16, mode="r")
    offsets, sizes = np.array([0, 25, 60]), np.array([30, 40])
    whole = BlockSource(TokenShard(mapped, offsets, sizes, separator=7), 40, 0, np.arange(60, dtype=np.uint8), limit=2)
    part = BlockSource(TokenShard(mapped[:25], offsets[:2], sizes[:1]), 40, 0, None, np.arange(25))
    rows = RowSource(np.arange(34).reshape(2, 17), 0, None, np.ones((2, 17), dtype=np.int64))
    model = make_model()
    models = PhaseModels(model, None, None, None, torch.get_rng_state())
    given = PhaseText([whole, part, rows], {"english": part.shard})
    hand_over(tmp_path / "phase", job, models, given, {"a": 1})
    _, _, text, more = take_over(tmp_path / "phase")
    assert more == {"a": 1} and len(text.sources) == 3
    for ours, theirs in zip(text.sources, given.sources, strict=True):
        assert len(ours) == len(theirs)
        for n in range(len(ours)):
            assert all(torch.equal(value, theirs.block(n)[name]) for name, value in ours.block(n).items())
    found = text.sources[0]
    assert isinstance(found, BlockSource) and isinstance(found.shard.tokens, np.memmap)
    assert not isinstance(text.watched["english"].tokens, np.memmap)
    assert np.array_equal(text.watched["english"].tokens, mapped[:25])


def test_domains_are_named_where_they_are_a_file_and_checked_again(
    make_model: Make, job: PhaseJob, tmp_path: Path
) -> None:
    (tmp_path / "tokens.bin").write_bytes(b"tokens")
    shard = TokenShard(np.arange(60, dtype=np.uint16), np.array([0, 25, 60]), np.array([30, 40]))
    file = DomainFile(tmp_path, "a" * 64, 9, 3)
    file.write([np.array([0, 1, 2, 1, 0, 2, 2, 1, 1])])
    ids = file.find()
    assert ids is not None
    kept = ChunkDomains(shard.offsets, 8, ids, 2, file)
    alone = ChunkDomains(shard.offsets, 8, np.array(ids))
    zeros, label = ChunkDomains(shard.offsets, 8, same_domain(0, 9), 1), same_domain(3, 60)
    sources = [BlockSource(shard, 40, 0, kept, alone), BlockSource(shard, 40, 0, zeros, label)]
    models = PhaseModels(make_model(), None, None, None, torch.get_rng_state())
    hand_over(tmp_path / "phase", job, models, PhaseText(sources, {}), {})
    found = take_over(tmp_path / "phase")[2].sources
    for ours, theirs in zip(found, sources, strict=True):
        for n in range(2):
            assert all(torch.equal(value, theirs.block(n)[name]) for name, value in ours.block(n).items())
    first, second = found
    assert isinstance(first.domain_ids, ChunkDomains) and isinstance(first.domain_ids.ids_C, np.memmap)
    assert isinstance(second.domain_ids, ChunkDomains) and second.domain_ids.ids_C.strides == (0,)
    assert isinstance(second.teacher_domain_ids, np.ndarray) and second.teacher_domain_ids.strides == (0,)
    # The ranks read what the main process has checked.
    data = file.path.read_bytes()
    file.path.unlink()
    file.path.write_bytes(b"\x01" + data[1:])
    with pytest.raises(TryAgainError, match="changed or removed"):
        take_over(tmp_path / "phase")


def test_a_job_is_plain_data_without_code_that_nobody_allowed(
    job: PhaseJob, make_model: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(own, "_allowed", set())
    ours, theirs = OwnClass(class_path="a.B", init_args={"x": [1, 0.5]}), OwnClass(class_path="c.D")
    own.allow_own(TrainerConfig(callbacks=[ours]))
    job = replace(job, trainer=TrainerConfig(callbacks=[ours, theirs]), outlook=Outlook(1, 2, 3.0), resume=None)
    monkeypatch.setattr(own, "_allowed", {*own._allowed})
    hand_over(tmp_path / "phase", job, PhaseModels(make_model(), None, None, None, torch.zeros(1)), NO_TEXT, {})
    monkeypatch.setattr(own, "_allowed", set())
    found = take_over(tmp_path / "phase")[0]
    assert (
        found == replace(job, trainer=TrainerConfig(callbacks=[ours]))
        and own.only_allowed(found.trainer) == found.trainer
    )


def test_a_watch_looks_at_the_same_excerpts(job: PhaseJob, make_model: Make, tmp_path: Path) -> None:
    shard = TokenShard(np.arange(40, dtype=np.uint16), np.array([0, 18, 40]), np.array([30, 40]))
    windows = evaluation_windows(shard, job.spec.model.context, shard.num_tokens)
    watched = Watched(
        stage="two", own=("english",), texts={"english": windows}, steps=9, after=frozenset({3, 6}), batch_tokens=64
    )
    watch = ForgettingWatch(watched, job.first_step, tmp_path / "watch-256")
    models = PhaseModels(make_model(), None, None, None, torch.get_rng_state())
    given = PhaseText([], {"english": windows.shard})
    hand_over(tmp_path / "phase", job, models, given, {"watch": _watch_plain(watch)})
    job, _, text, more = take_over(tmp_path / "phase")
    found = _watch(more["watch"], text, job)
    assert (found.path, found.first_step) == (watch.path, watch.first_step)
    assert replace(found.watched, texts={}) == replace(watched, texts={})
    ours, theirs = (one.batch(slice(None)) for one in (found.watched.texts["english"], windows))
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
