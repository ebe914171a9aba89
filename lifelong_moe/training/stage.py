"""One stage from beginning to end: restore, assign, grow, freeze, train, commit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from lifelong_moe.data.shards import ShardDocuments, TokenizedCorpus
from lifelong_moe.data.tokenizer import Tokenizer
from lifelong_moe.errors import DivergedError, TryAgainError
from lifelong_moe.growth.clusters import fit_clusters
from lifelong_moe.growth.config import FrozenWeights
from lifelong_moe.growth.grow import grow
from lifelong_moe.growth.shallow import shallow_student
from lifelong_moe.model.int8 import hold_in_int8, make_whole
from lifelong_moe.model.transformer import LanguageModel, initialize
from lifelong_moe.plan.architecture import Architecture
from lifelong_moe.plan.phase import Trains
from lifelong_moe.plan.spec import SCHEMA, StageSpec
from lifelong_moe.retention.generated import generate_blocks
from lifelong_moe.retention.penalty import WeightAnchor, fisher_diagonal, make_anchor, mean_fisher
from lifelong_moe.retention.teacher import make_teacher
from lifelong_moe.routing.config import Bundles, Centroids
from lifelong_moe.stages.record import StageRecord, TokenizerIdentity
from lifelong_moe.stages.store import CommittedStage, StageStore, load_weights
from lifelong_moe.storage.directories import verify_directory, write_directory
from lifelong_moe.storage.files import write_atomic
from lifelong_moe.storage.keys import SHORT
from lifelong_moe.storage.locks import locked
from lifelong_moe.training.checkpoint import newest_checkpoint
from lifelong_moe.training.data import text_sample, written_sample
from lifelong_moe.training.first_centroids import FIRST_CENTROIDS, first_centroids
from lifelong_moe.training.measure import stage_metrics
from lifelong_moe.training.module import StageModule
from lifelong_moe.training.optimizer import freeze_for_finetuning, freeze_trunk
from lifelong_moe.training.phase import PhaseRun, StageEnvironment, train_phase
from lifelong_moe.training.rollback import NonfiniteStepsError, read_rollbacks, roll_back

REVIEW_SEED = 500
"""Added to a stage's seed for the order of its review, which mixes its text anew."""


def load_model(store: StageStore, stage: CommittedStage) -> LanguageModel:
    """The model as a stage committed it, on the CPU."""
    return build_model(stage.architecture, store.tensors(stage))


def build_model(architecture: Architecture, tensors: Mapping[str, Tensor]) -> LanguageModel:
    """A model of stored tensors, on the CPU."""
    model = LanguageModel(architecture)
    model.load_state_dict(tensors, strict=True)
    return model


def initial_model(architecture: Architecture, seed: int) -> LanguageModel:
    """The untrained model that a first stage begins with."""
    model = LanguageModel(architecture)
    initialize(model, seed)
    return model


def train_stage(
    spec: StageSpec,
    key: str,
    index: int,
    parent: CommittedStage | None,
    corpora: Mapping[str, TokenizedCorpus],
    tokenizer: Tokenizer,
    recipe: Mapping[str, Any],
    environment: StageEnvironment,
) -> CommittedStage:
    """Train one stage and commit it; continue from its newest step checkpoint if there is one.

    Args:
        spec: What to train.
        key: Its content address.
        index: Its position in the stream; seeds of growth, clustering and sample order depend on it.
        parent: The committed stage that it continues.
        corpora: Tokenized text by distribution.
        tokenizer: That made the corpora's tokens.
        recipe: What it was made by.
        environment: Where and how to run.

    Raises:
        TryAgainError: If another process trains this stage, or SIGTERM came; a checkpoint is committed by then.
        DivergedError: If loss or gradient stays non-finite although the stage rolled back.
        ResourceError: If disk or the device's memory does not suffice.
    """
    work = environment.work / key[:SHORT]
    with locked(work / ".lock", f"stage {spec.name}"):
        if (committed := environment.store.find(key)) is not None:
            return committed  # another process committed it while we were on our way here
        seed, trained = _stage_seed(spec, index), None
        while trained is None:
            try:
                trained = _train_phases(spec, seed, parent, corpora, tokenizer, environment, work)
            except NonfiniteStepsError as error:
                roll_back(work, error, environment.checkpoint.every_steps)
        model, metrics = trained
        record = StageRecord(
            schema=SCHEMA,
            key=key,
            name=spec.name,
            parent=parent.key if parent else None,
            spec=spec,
            architecture=model.architecture,
            data={name: corpora[name].train_hash for name in spec.uses},
            split={name: corpora[name].split_hash for name in spec.uses},
            tokenizer=TokenizerIdentity(dict(recipe), tokenizer.hash),
        )
        stage = _commit(record, parent, model, metrics, environment.store, None if parent else tokenizer.text)
        # Whoever takes a new lock from now on finds the stage committed.
        shutil.rmtree(work, ignore_errors=True)
    return stage


def _train_phases(
    spec: StageSpec,
    seed: int,
    parent: CommittedStage | None,
    corpora: Mapping[str, TokenizedCorpus],
    tokenizer: Tokenizer,
    environment: StageEnvironment,
    work: Path,
) -> tuple[LanguageModel, dict[str, Any]]:
    """Begin, or go on from what is in ``work``, and train to the end; the model and what the stage reports."""
    model, teacher, anchor, generated = _prepare(spec, seed, parent, corpora, tokenizer, environment, work)
    in_int8 = spec.grow is not None and spec.grow.frozen_weights == FrozenWeights.int8
    if in_int8:
        hold_in_int8(model, teacher)
    resumed, rollbacks = newest_checkpoint(work), read_rollbacks(work)
    measured, first_step, order_step = [], 0, 0
    for number, phase in enumerate(spec.phases()):
        order_step = order_step if phase.follows else 0
        if resumed is None or number >= resumed[0]:
            resume = resumed[1] if resumed is not None and number == resumed[0] else None
            if phase.fits_clusters and resume is None:
                _fit_clusters(model, spec, seed, [corpora[name] for name in spec.learns])
            order_seed = seed if phase.trains == Trains.stage else seed + REVIEW_SEED
            run = PhaseRun(number, phase, first_step, order_step, order_seed, work, resume, rollbacks)
            module = StageModule(model, spec, phase, teacher, anchor)
            done = train_phase(module, teacher, run, corpora, generated, environment)
            write_atomic(work / f"phase-{number}.json", json.dumps(done))
        measured.append(json.loads((work / f"phase-{number}.json").read_text(encoding="utf-8")))
        first_step += phase.steps
        order_step += phase.steps + rollbacks.shift(number, phase.steps)
    metrics = stage_metrics(
        model, spec, measured, corpora[spec.data], rollbacks.count, parent.architecture if parent else None
    )
    if in_int8 and parent is not None:
        make_whole(model, environment.store.tensors(parent))
    return model, metrics


def clear_abandoned(work: Path) -> None:
    """Remove what a process left that was killed right after its commit, unless one is at work there."""
    if work.exists():
        with suppress(TryAgainError), locked(work / ".lock", "a stage"):
            shutil.rmtree(work, ignore_errors=True)


def _prepare(
    spec: StageSpec,
    seed: int,
    parent: CommittedStage | None,
    corpora: Mapping[str, TokenizedCorpus],
    tokenizer: Tokenizer,
    environment: StageEnvironment,
    work: Path,
) -> tuple[LanguageModel, LanguageModel | None, WeightAnchor | None, NDArray[np.int64] | None]:
    """Restore or begin; keep the teacher, the old weights and what the old model writes; grow and freeze."""
    vocab_size, bos_id = tokenizer.vocab_size, tokenizer.bos_id
    if parent is None:
        return initial_model(spec.architecture(None, vocab_size, bos_id), spec.seed), None, None, None
    model = _continued(spec, parent, corpora, environment.store)
    written = _generated_text(model, spec, seed, work, environment.console) if any(spec.written_blocks) else None
    generated = written[: spec.written_blocks[0]] if written is not None and spec.generates else None
    if spec.continues is not None:
        model.freeze_generations(model.architecture.born_in(spec.continues))
    freeze_trunk(model, spec.trunk)
    freeze_for_finetuning(model, spec.finetune)
    importances = _importances(model, spec, corpora, written) if spec.fisher_measured_tokens else None
    old = {name: p.detach().clone() for name, p in model.named_parameters()} if spec.penalty else {}
    if spec.student is not None:
        return shallow_student(model, spec.student), model.requires_grad_(False).eval(), None, generated
    teacher = make_teacher(model, _unchanging(model, spec)) if spec.distill else None
    generation = spec.generation()
    if spec.grow and generation:
        sample = text_sample(model, spec, corpora[spec.data], spec.grow.sample_tokens)
        near_ties = grow(model, generation, spec.grow, sample, seed)
        if near_ties:
            environment.console.print(f"{spec.name}: near ties in growth's check, decided by rounding: {near_ties}")
    model.architecture = spec.architecture(parent.architecture, vocab_size, bos_id)
    anchor = make_anchor(model, old, spec.penalty.factor, importances) if spec.penalty else None
    return model, teacher, anchor, generated


def _continued(
    spec: StageSpec, parent: CommittedStage, corpora: Mapping[str, TokenizedCorpus], store: StageStore
) -> LanguageModel:
    """The parent's model, which a stage goes on with.

    What tells generations apart is this stage's to say while there is one: the parent may have been trained without
    bundles, or left centroids that nothing needs. Losses are always this stage's: an earlier version's coefficients
    were factors of a mean over layers.
    """
    architecture, tensors = parent.architecture, store.tensors(parent)
    was, now = architecture.routing.with_losses_of(spec.routing), spec.routing
    if len(architecture.generations) > 1 or was.effective(grown=True) == now.effective(grown=True):
        return build_model(replace(architecture, routing=was), tensors)
    fits_alike = all(
        getattr(was, key) == getattr(now, key) for key in ("bundles", "centroids", "clusters", "feature_width")
    )
    if was.bundles == Bundles.cluster and not fits_alike:
        tensors.pop(FIRST_CENTROIDS, None)
    if now.bundles == Bundles.cluster and FIRST_CENTROIDS not in tensors:
        if now.centroids == Centroids.random:
            tensors[FIRST_CENTROIDS] = torch.zeros(now.clusters_of(1), architecture.vocab_size)
        else:
            tensors |= store.tensors(first_centroids(store, store.chain(parent.key)[0], now, corpora))
    return build_model(replace(architecture, routing=now), tensors)


def _unchanging(model: LanguageModel, spec: StageSpec) -> list[Tensor]:
    """Tensors that this stage will not train; the teacher shares them."""
    freezes, places = spec.grow is not None and spec.grow.freezes, model.places()
    return [p for name, p in model.named_parameters() if not p.requires_grad or (freezes and not places[name].is_trunk)]


def _importances(
    model: LanguageModel,
    spec: StageSpec,
    corpora: Mapping[str, TokenizedCorpus],
    written: NDArray[np.int64] | None,
) -> dict[str, Tensor]:
    """Mean Fisher information on what is kept of the earlier distributions, or on what the old model wrote."""
    assert spec.penalty is not None
    if spec.measures_generated and written is not None:
        return fisher_diagonal(model, written_sample(model, written[spec.written_blocks[0] :]))
    tokens, kept = spec.penalty.fisher_tokens, spec.buffer_blocks
    samples = (text_sample(model, spec, corpora[name], tokens, kept) for name in spec.fisher_data)
    return mean_fisher([fisher_diagonal(model, sample) for sample in samples])


def _generated_text(
    model: LanguageModel, spec: StageSpec, seed: int, work: Path, console: Console
) -> NDArray[np.int64]:
    """Text that the parent's model writes, each block for one use, those to be replayed first; kept with the work."""
    path = work / "generated"
    if not path.exists():
        context, blocks = spec.model.context, sum(spec.written_blocks)
        clusters = model.document_clusters
        with console.status(f"{spec.name}: the previous stage's model writes {blocks * context:,} tokens"):
            rows = generate_blocks(
                model,
                blocks,
                context=context,
                seed=seed,
                group_ids_of=None if clusters is None else clusters.group_ids,
            )
        write_directory(path, {"blocks.safetensors": partial(save_file, {"blocks": torch.from_numpy(rows)})})
    verify_directory(path)
    return load_weights(path / "blocks.safetensors")["blocks"].numpy()


def _stage_seed(spec: StageSpec, index: int) -> int:
    return spec.seed + 1000 * index


def _fit_clusters(model: LanguageModel, spec: StageSpec, seed: int, corpora: list[TokenizedCorpus]) -> None:
    """Fit the stage's centroids on what it learns; of several distributions each gives as much to the sample."""
    share = spec.routing.sample_tokens // len(corpora)
    samples = [text_sample(model, spec, corpus, share) for corpus in corpora]
    sample = {name: torch.cat([one[name] for one in samples]) for name in samples[0]}
    documents = ShardDocuments([corpus.train for corpus in corpora])
    heads, rests = [c.train.tokens[:share] for c in corpora], [c.train.tokens[share:] for c in corpora]
    fit_clusters(model, documents, np.concatenate([*heads, *rests]), sample, seed)


def _commit(
    record: StageRecord,
    parent: CommittedStage | None,
    model: LanguageModel,
    metrics: Mapping[str, Any],
    store: StageStore,
    tokenizer: str | None,
) -> CommittedStage:
    """Commit what this stage changed; what it did not change is borrowed, and proved to be the same bits."""
    state, name = model.state_dict(), record.name
    trained = model.stored_names(trained=True)
    borrowed: dict[str, str] = {}
    if parent is not None:
        old = store.tensors(parent)
        same = (n for n in old if n in state and n not in trained and torch.equal(old[n], state[n].cpu()))
        borrowed = {n: store.holder(parent, n) for n in same}
        if changed := sorted(model.stored_names(trained=False) & set(old) - set(borrowed)):
            raise RuntimeError(f"stage {name}: frozen tensor {changed[0]} changed in training")
    own = {n: tensor for n, tensor in state.items() if n not in borrowed}
    for n, tensor in own.items():
        if not bool(torch.isfinite(tensor).all()):
            raise DivergedError(f"stage {name}: {n} holds values that are not finite; nothing was committed.")
    return store.commit(replace(record, borrowed=borrowed), metrics, own, tokenizer)
