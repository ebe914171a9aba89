"""AdamW over the trainable parameters, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from lifelong_moe.config.parts import Part
from lifelong_moe.config.retention import TrunkConfig, TrunkTraining
from lifelong_moe.config.training import FinetuneConfig, OptimConfig, Schedule
from lifelong_moe.errors import ConfigError
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.phase import Phase, Trains
from lifelong_moe.plan.spec import StageSpec


def rate_factor(step: int, steps: int, config: OptimConfig) -> float:
    """Learning rate at a step, relative to the peak.

    Linear over the first ``warmup_fraction`` of the steps, then by schedule; ``cosine`` and ``wsd`` end at
    ``min_lr_fraction``.

    Args:
        step: Steps taken so far, from 0.
        steps: Steps of the whole phase.
        config: Shape of the schedule.

    Source:
        ``wsd``: MiniCPM (arXiv:2404.06395), with a linear decay.
    """
    warmup = round(config.warmup_fraction * steps)
    # Never 0, or the first step would be wasted.
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == Schedule.constant:
        return 1.0
    if config.schedule == Schedule.wsd:
        decay = round(config.decay_fraction * steps)
        progress = max(0.0, step - (steps - decay)) / max(1, decay)
        return 1 - (1 - config.min_lr_fraction) * min(1.0, progress)
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return config.min_lr_fraction + (1 - config.min_lr_fraction) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Rate:
    """A parameter's learning rate relative to the stage's."""

    scale: float = 1.0
    """Factor on the rate."""
    until: float = 1.0
    """Share of the phase's steps after which the rate is 0."""


def freeze_trunk(model: LanguageModel, trunk: TrunkConfig | None) -> None:
    """Freeze the shared parts if ``trunk.train`` is ``frozen`` or ``deltas``."""
    if trunk is not None and trunk.is_frozen:
        for parameter in model.trunk_parameters().values():
            parameter.requires_grad_(False)


def freeze_for_finetuning(model: LanguageModel, config: FinetuneConfig | None) -> None:
    """Freeze the parts that ``finetune.trainable`` leaves out."""
    if config is None:
        return
    for part in Part:
        if not config.trains(part):
            for parameter in model.parameters_of(part).values():
                parameter.requires_grad_(False)


def phase_parameters(model: LanguageModel, phase: Phase) -> dict[str, nn.Parameter]:
    """The parameters that a phase trains, by name: all that the stage does not freeze, or its new router rows only."""
    # Without empty ones: a layer that did not grow has rows for no expert.
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and p.numel()}
    if phase.trains == Trains.stage:
        return trained
    rows = {id(layer.router.row_generations()[-1]) for layer in model.moe_layers()}
    return {n: p for n, p in trained.items() if id(p) in rows}


@contextmanager
def training_only(model: LanguageModel, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Context in which only these parameters have gradients."""
    # By identity: tied weights are one parameter under two names.
    chosen = {id(p) for p in parameters}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in chosen]
    # Nothing here keeps a parameter: a process that is left a part of each must not hold on to the whole.
    del parameters, chosen
    for name in others:
        model.get_parameter(name).requires_grad_(False)
    try:
        yield
    finally:
        for name in others:
            model.get_parameter(name).requires_grad_(True)


def parameter_rates(model: LanguageModel, spec: StageSpec, phase: Phase) -> dict[str, Rate]:
    """The rate of every parameter by name."""
    # In a review, which trains router rows alone, they keep the rate to its end.
    if spec.parent is None or phase.trains == Trains.router:
        return {name: Rate() for name, _ in model.named_parameters()}
    trunk_scale = spec.trunk.lr_scale if spec.trunk and spec.trunk.train == TrunkTraining.gentle else 1.0
    # Three exceptions from rate 1: a gentle trunk, router rows that settle early, old experts that train on.
    newest, rates = len(model.architecture.generations) - 1, {}
    for name, place in model.places().items():
        until = spec.optim.router_until if place.part == Part.router else 1.0
        rate = Rate(trunk_scale if place.is_trunk else 1.0, until)
        if spec.grow is not None and not place.is_trunk and place.generation != newest:
            rate = Rate(spec.grow.old_lr_scale, min(rate.until, spec.grow.old_until))
        rates[name] = rate
    return rates


def by_kind(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Sharded parameters, and others: torch's functions of many tensors take one kind at a time."""
    kinds: dict[bool, list[nn.Parameter]] = {}
    for parameter in parameters:
        kinds.setdefault(isinstance(parameter, DTensor), []).append(parameter)
    return [*kinds.values()]


class AdamWByKind(AdamW):
    """AdamW of parameters of both kinds; groups and states are those of ``AdamW``."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step."""
        groups = self.param_groups
        self.param_groups = [{**group, "params": kind} for group in groups for kind in by_kind(group["params"])]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups


def build_optimizer(model: LanguageModel, spec: StageSpec, phase: Phase) -> tuple[AdamW, list[Rate]]:
    """AdamW over a phase's parameters, and the rate of each of its parameter groups.

    Raises:
        ConfigError: If no parameter trains.
    """
    # Frozen means neither gradient nor weight decay: a frozen parameter is in no group.
    config, rates = spec.optim, parameter_rates(model, spec, phase)
    groups: dict[tuple[Rate, float], list[nn.Parameter]] = {}
    for name, parameter in phase_parameters(model, phase).items():
        # Matrices decay; norms and biases, of one dimension, do not.
        decay = config.weight_decay if parameter.dim() > 1 else 0.0
        groups.setdefault((rates[name], decay), []).append(parameter)
    if not groups:
        raise ConfigError(
            "nothing is left to train: the trunk is frozen and no experts are added. Set trunk.train=full, or "
            "grow.experts above 0."
        )
    peak = spec.peak_lr * phase.lr_scale
    optimizer = AdamWByKind(
        [
            {"params": parameters, "lr": peak * rate.scale, "weight_decay": decay}
            for (rate, decay), parameters in groups.items()
        ],
        lr=peak,
        betas=(config.beta1, config.beta2),
        fused=True,
    )
    return optimizer, [rate for rate, _ in groups]


def build_schedule(optimizer: AdamW, rates: list[Rate], steps: int, config: OptimConfig) -> LambdaLR:
    """The learning rate of each group as a pure function of the step."""

    def factor(rate: Rate) -> Callable[[int], float]:
        last = round(rate.until * steps)
        # The schedule of the whole phase up to there; it does not decay earlier.
        return lambda step: rate_factor(step, steps, config) if step < last or rate.until == 1 else 0.0

    return LambdaLR(optimizer, [factor(rate) for rate in rates])
