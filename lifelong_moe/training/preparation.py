"""Prepare a stage's models: restore the parent, record what it knows, freeze, and grow."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from lifelong_moe.data.tokens.merges import pieces_of
from lifelong_moe.growth.grow import grow
from lifelong_moe.growth.shallow import shallow_student
from lifelong_moe.model.experts import LowRankExperts
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.spec import StageSpec
from lifelong_moe.retention.average import old_trainable
from lifelong_moe.retention.generated import generate_blocks
from lifelong_moe.retention.penalty import WeightAnchor, fisher_diagonal, make_anchor, mean_fisher
from lifelong_moe.retention.teacher import make_teacher
from lifelong_moe.storage.directories import write_directory
from lifelong_moe.storage.tensors import load_weights
from lifelong_moe.storage.verified import verify_directory
from lifelong_moe.training.continuing import continued_model
from lifelong_moe.training.loop.context import StageModels, StageRun
from lifelong_moe.training.loop.data import new_text_sample, text_sample, written_sample
from lifelong_moe.training.loop.optimizer import freeze_for_finetuning, freeze_trunk
from lifelong_moe.training.restore import initial_model


def prepare_models(run: StageRun) -> StageModels:
    """The stage's models before its first step, the same after every interruption."""
    spec, parent, environment = run.spec, run.parent, run.environment
    if parent is None:
        return StageModels(environment.place(initial_model(run.architecture, spec.seed)))
    model = continued_model(environment.store, parent, spec.routing, run.corpora_before, environment.trainer)
    model = environment.place(model)
    model.tokenizer_size = environment.store.tokenizer(parent).vocab_size
    written = _written_blocks(model, run) if any(spec.written_blocks) else None
    generated = written[: spec.written_blocks[0]] if written is not None and spec.generates else None
    _freeze(model, spec)
    holds = spec.penalty is not None or spec.average
    # After freezing, since Fisher information of frozen weights is not needed; before growth, which moves the weights.
    old_weights = {name: p.detach().clone() for name, p in model.named_parameters()} if holds else {}
    importances = _importances(model, run, written) if spec.fisher_measured_tokens else None
    if spec.student is not None:
        student = environment.place(shallow_student(model, spec.student))
        return StageModels(student, model.requires_grad_(False).eval(), generated=generated)
    # Before growth: the teacher has no new experts. It shares every tensor that this stage leaves alone.
    teacher = make_teacher(model, unchanging_tensors(model, spec)) if spec.distill else None
    _grow(model, run)
    # Also without growth: a stage that continues an older generation freezes others, and labels get a new entry.
    model.architecture = run.architecture
    start = old_trainable(model, old_weights) if spec.average else {}
    return StageModels(model, teacher, _anchor(model, spec, old_weights, importances), generated, start)


def _freeze(model: LanguageModel, spec: StageSpec) -> None:
    """Freeze everything that the stage must not change; :func:`grow` freezes older generations itself."""
    if spec.continues is not None:
        model.freeze_generations(model.architecture.born_in(spec.continues))
    freeze_trunk(model, spec.trunk)
    freeze_for_finetuning(model, spec.finetune)


def unchanging_tensors(model: LanguageModel, spec: StageSpec) -> list[Tensor]:
    """Tensors that this stage will not train; the teacher shares them."""
    freezes, places = spec.grow is not None and spec.grow.freezes, model.places()
    kept = [p for name, p in model.named_parameters() if not p.requires_grad or (freezes and not places[name].is_trunk)]
    # What low-rank experts change is fixed at their birth.
    return kept + [g.base for layer in model.moe_layers() for g in layer.banks.born if isinstance(g, LowRankExperts)]


def _grow(model: LanguageModel, run: StageRun) -> None:
    """Add the stage's generation, if it has one, initialized by what the model makes of the new text."""
    spec, tokens = run.spec, run.planned.tokens_added
    generation = spec.generation(tokens)
    if spec.grow is None or generation is None:
        return
    sample = new_text_sample(model, spec, run.corpora_before, spec.grow.sample_tokens)
    added = run.data.added[run.planned.index] if tokens else None
    pieces = pieces_of(added, added.vocab_size - tokens) if added is not None else []
    near_ties = grow(model, generation, spec.grow, sample, run.seed, pieces)
    if near_ties:
        run.environment.console.print(
            f"{spec.name}: the check that growth changes nothing met {near_ties} near ties, which rounding decides"
        )


def _anchor(
    model: LanguageModel, spec: StageSpec, old_weights: dict[str, Tensor], importances: dict[str, Tensor] | None
) -> WeightAnchor | None:
    """The pull to the old weights; of the grown model, whose new experts have none."""
    return make_anchor(model, old_weights, spec.penalty.factor, importances) if spec.penalty else None


def _importances(model: LanguageModel, run: StageRun, written: NDArray[np.int64] | None) -> dict[str, Tensor]:
    """Mean Fisher information on the stored text of earlier distributions, or on text that the old model wrote."""
    spec = run.spec
    assert spec.penalty is not None
    if spec.measures_generated and written is not None:
        return fisher_diagonal(model, written_sample(model, written[spec.written_blocks[0] :]))
    tokens, kept = spec.penalty.fisher_tokens, spec.buffer_blocks
    samples = (text_sample(model, spec, run.corpora_before[name], tokens, kept) for name in spec.fisher_data)
    return mean_fisher([fisher_diagonal(model, sample) for sample in samples])


def _written_blocks(model: LanguageModel, run: StageRun) -> NDArray[np.int64]:
    """Text that the parent's model writes: first the blocks to be replayed, then those to measure the penalty on."""
    path, spec = run.work / "generated", run.spec
    # Written once a stage and kept with its work: sampling is the slowest part, and another device rounds differently.
    if not path.exists():
        context, blocks = spec.model.context, sum(spec.written_blocks)
        clusters = model.document_clusters
        console = run.environment.console
        with console.status(f"{spec.name}: the previous stage's model writes {blocks * context:,} tokens"):
            rows = generate_blocks(
                model,
                blocks,
                context=context,
                seed=run.seed,
                ends=spec.text_ends,
                domain_ids_of=None if clusters is None else clusters.domain_ids,
            )
        write_directory(path, {"blocks.safetensors": partial(save_file, {"blocks": torch.from_numpy(rows)})})
    return load_weights(verify_directory(path), "blocks.safetensors")["blocks"].numpy()
