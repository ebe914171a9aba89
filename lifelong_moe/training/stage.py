"""One stage from beginning to end: restore, assign, grow, freeze, train, commit."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lifelong_moe.config.growth import FrozenWeights
from lifelong_moe.data.tokens.prepare import PreparedData
from lifelong_moe.data.tokens.shards import ShardDocuments
from lifelong_moe.errors import TryAgainError
from lifelong_moe.growth.clusters import fit_clusters
from lifelong_moe.model.int8 import hold_in_int8, make_whole
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.phase import Trains
from lifelong_moe.plan.planned import PlannedStage
from lifelong_moe.storage.locks import locked
from lifelong_moe.store.stages import CommittedStage
from lifelong_moe.training.callbacks.checkpoint import newest_checkpoint, set_earlier_aside
from lifelong_moe.training.commit import commit_stage
from lifelong_moe.training.loop.context import PhaseRun, StageEnvironment, StageRun
from lifelong_moe.training.loop.data import text_sample
from lifelong_moe.training.loop.measure import PhaseMeasures, stage_metrics
from lifelong_moe.training.loop.module import StageModule
from lifelong_moe.training.loop.phase import train_phase
from lifelong_moe.training.loop.rollback import NonfiniteStepsError, read_rollbacks, roll_back
from lifelong_moe.training.preparation import prepare_models

REVIEW_SEED = 500
"""Added to a stage's seed for the order of its review, which mixes its text anew."""


def train_stage(
    planned: PlannedStage, parent: CommittedStage | None, data: PreparedData, environment: StageEnvironment
) -> CommittedStage:
    """Train one stage and commit it; continue from its newest step checkpoint if there is one.

    Args:
        planned: What to train.
        parent: The committed stage that it continues.
        data: Tokenized text and its tokenizer.
        environment: Where and how to run.

    Raises:
        TryAgainError: If another process trains this stage, or SIGTERM came; a checkpoint is committed by then.
        DivergedError: If loss or gradient stays non-finite although the stage rolled back.
        ResourceError: If disk or the device's memory does not suffice.
    """
    run = StageRun(planned, parent, data, environment)
    with locked(run.work / ".lock", f"stage {run.spec.name}"):
        if (committed := environment.store.find(planned.key)) is not None:
            return committed  # another process committed it while we were on our way here
        set_earlier_aside(run.work)
        trained = None
        while trained is None:
            try:
                trained = _train_phases(run)
            except NonfiniteStepsError as error:
                roll_back(run.work, error, environment.checkpoint.every_steps)
        model, metrics = trained
        stage = commit_stage(run, model, metrics)
        # Whoever takes a new lock from now on finds the stage committed.
        shutil.rmtree(run.work, ignore_errors=True)
    return stage


def _train_phases(run: StageRun) -> tuple[LanguageModel, dict[str, Any]]:
    """Begin, or go on from the work that is there, and train to the end; the model and what the stage reports."""
    spec, models = run.spec, prepare_models(run)
    in_int8 = spec.grow is not None and spec.grow.frozen_weights == FrozenWeights.int8
    if in_int8:
        hold_in_int8(models.model, models.teacher)
    resumed, rollbacks = newest_checkpoint(run.work), read_rollbacks(run.work)
    measured, first_step, order_step = [], 0, 0
    for number, phase in enumerate(spec.phases()):
        order_step = order_step if phase.follows else 0
        if resumed is None or number >= resumed[0]:
            resume = resumed[1] if resumed is not None and number == resumed[0] else None
            if phase.fits_clusters and resume is None:
                _fit_clusters(models.model, run)
            seed = run.seed if phase.trains == Trains.stage else run.seed + REVIEW_SEED
            part = PhaseRun(run, number, phase, first_step, order_step, seed, resume, rollbacks)
            module = StageModule(models.model, spec, phase, models.teacher, models.anchor)
            train_phase(module, models, part).save(run.work, number)
        measured.append(PhaseMeasures.load(run.work, number))
        first_step += phase.steps
        order_step += phase.steps + rollbacks.shift(number, phase.steps)
    metrics = stage_metrics(models.model, run, measured, rollbacks.count)
    if in_int8 and run.parent is not None:
        make_whole(models.model, run.environment.store.tensors(run.parent))
    return models.model, metrics


def clear_abandoned(work: Path) -> None:
    """Remove what a process left that was killed right after its commit, unless one is at work there."""
    if work.exists():
        with suppress(TryAgainError), locked(work / ".lock", "a stage"):
            shutil.rmtree(work, ignore_errors=True)


def _fit_clusters(model: LanguageModel, run: StageRun) -> None:
    """Fit the stage's centroids on what it learns; of several distributions each gives as much to the sample."""
    spec, corpora = run.spec, [run.corpora[name] for name in run.spec.learns]
    share = spec.routing.sample_tokens // len(corpora)
    samples = [text_sample(model, spec, corpus, share) for corpus in corpora]
    sample = {name: torch.cat([one[name] for one in samples]) for name in samples[0]}
    documents = ShardDocuments([corpus.train for corpus in corpora])
    heads, rests = [c.train.tokens[:share] for c in corpora], [c.train.tokens[share:] for c in corpora]
    fit_clusters(model, documents, np.concatenate([*heads, *rests]), sample, run.seed)
