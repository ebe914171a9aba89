"""FLOPs of a stage, phase by phase. Torch-free.

Counted are matrix products, multiply-adds times two, from the model's shape. Padding, unscored prompts, dropped tokens
and a document mask make the real number smaller, recomputation makes it larger.
"""

from __future__ import annotations

from lifelong_moe.config.parts import Part
from lifelong_moe.config.retention import WRITTEN_AT_ONCE, DistillText
from lifelong_moe.config.routing.topk import LearnedConfig
from lifelong_moe.plan.architecture import Architecture
from lifelong_moe.plan.cost import forward_flops_per_token, pass_flops
from lifelong_moe.plan.phase import Phase, Trains
from lifelong_moe.plan.products import IsTrainable, Text, TokenProducts, few_rows_products, pass_products
from lifelong_moe.plan.spec import StageSpec


def stage_flops(spec: StageSpec, architecture: Architecture, parent: Architecture | None) -> int:
    """FLOPs of a stage, those of the parent's model included: as teacher, as writer, and for the Fisher information.

    Args:
        spec: The stage.
        architecture: The model at its end.
        parent: The model that it continues.
    """
    before = 0 if parent is None else _preparation_flops(spec, parent)
    return before + loop_flops(spec, architecture, parent)


def loop_flops(spec: StageSpec, architecture: Architecture, parent: Architecture | None) -> int:
    """FLOPs of the training loop: the model's passes and the teacher's."""
    flops = sum(_phase_flops(spec, phase, architecture) for phase in spec.phases())
    return flops if parent is None else flops + _teacher_flops(spec, architecture, parent)


def _preparation_flops(spec: StageSpec, parent: Architecture) -> int:
    """FLOPs of the parent's model before the loop: for generated text, and for the Fisher information."""
    blocks, context = sum(spec.written_blocks), spec.model.context
    mixed = Text.mixed(parent)
    # A pass writes one token of each of WRITTEN_AT_ONCE blocks, the last ones fewer.
    whole, rest = divmod(blocks, WRITTEN_AT_ONCE)
    changes = whole * few_rows_products(parent, mixed, WRITTEN_AT_ONCE) + few_rows_products(parent, mixed, rest)
    written = context * round(blocks * forward_flops_per_token(parent) + 2 * changes)
    before = parent if spec.continues is None else parent.continuing(spec.continues)
    # Fisher information is squared per sequence, so each pass has one.
    measured = spec.fisher_measured_tokens
    return written + _backward_too(before, _trained(spec, before), mixed, measured, measured // context)


def _phase_flops(spec: StageSpec, phase: Phase, architecture: Architecture) -> int:
    text = Text.of(architecture, _own(architecture), phase.replay_fraction)
    tokens, passes = phase.steps * spec.optim.batch_tokens, phase.steps * spec.accumulate * spec.processes
    return _backward_too(architecture, _trained(spec, architecture, phase), text, tokens, passes)


def _backward_too(architecture: Architecture, trains: IsTrainable, text: Text, tokens: int, passes: int) -> int:
    by_token = TokenProducts(architecture, trains, text).total
    return round(2 * (tokens * by_token + passes * pass_products(architecture, trains, text)))


def _teacher_flops(spec: StageSpec, architecture: Architecture, parent: Architecture) -> int:
    """FLOPs of the teacher's forward passes above the blocks that it shares, and of repeated head products."""
    tokens = spec.distilled_tokens
    if spec.distill is None or not tokens:
        return 0
    passes = round((spec.steps - spec.review_steps) * spec.distill.until) * spec.accumulate * spec.processes
    by_token = forward_flops_per_token(parent, _shared_blocks(spec, architecture, parent))
    flops = tokens * by_token + passes * pass_flops(parent, Text.mixed(parent))
    if not (architecture.has_deltas or parent.has_deltas or architecture.routing.competitive):
        return flops
    # Without one head for all tokens there is no fused loss: the student's logits of distilled tokens are made twice.
    trains = _trained(spec, architecture)
    text = Text.of(architecture, _own(architecture), float(spec.distill.text == DistillText.replay))
    again = tokens * TokenProducts(architecture, trains, text).of_head
    return flops + round(2 * (again + passes * pass_products(architecture, trains, text, (Part.head,))))


def _shared_blocks(spec: StageSpec, architecture: Architecture, parent: Architecture) -> int:
    """Lowest blocks that compute the same in teacher and student, as far as the shape tells.

    :func:`lifelong_moe.retention.teacher.shared_blocks` looks at the tensors.
    """
    # Nothing may depend on training mode or on other tokens, or the teacher's output would differ.
    routing, trains = architecture.routing, _trained(spec, architecture)
    same = isinstance(routing, LearnedConfig) and routing.capacity is None and not routing.jitter
    drops = spec.finetune is not None and spec.finetune.expert_dropout > 0
    apart = routing.by_generation or architecture.has_deltas or parent.has_deltas
    if not same or apart or drops or spec.student is not None:
        return 0
    trunk = (Part.embedding, Part.attention, Part.norm, Part.dense, Part.shared)
    if any(trains(part, None) for part in trunk):
        return 0
    last = architecture.model.layers - 1
    grown = (
        layer
        for layer in range(last)
        for g, generation in enumerate(architecture.generations)
        if generation.experts_in(layer) and (trains(Part.expert, g) or trains(Part.router, g))
    )
    return next(grown, last)


def _own(architecture: Architecture) -> int:
    """The generation of new text, if tokens use one generation alone."""
    return len(architecture.generations) - 1 if architecture.continued is None else architecture.continued


def _trained(spec: StageSpec, architecture: Architecture, phase: Phase | None = None) -> IsTrainable:
    """A predicate for the trainable parts in a phase; without one, in the stage."""

    def trains(part: Part, generation: int | None) -> bool:
        is_newest_row = part == Part.router and generation == len(architecture.generations) - 1
        if phase is not None and phase.trains == Trains.router and not is_newest_row:
            return False
        return spec.trains_part(architecture, part, generation)

    return trains
