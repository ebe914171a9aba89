"""AdamW over what trains, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math

import torch
from torch.optim import AdamW

from lifelong_moe.errors import ConfigError
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.retention.config import TrunkConfig, TrunkTraining
from lifelong_moe.training.config import OptimConfig, Schedule


def rate_factor(step: int, steps: int, config: OptimConfig) -> float:
    """Learning rate at a step, relative to the peak.

    Linear over the first ``warmup_fraction`` of the steps, then by schedule; the cosine ends at
    ``min_lr_fraction``.

    Args:
        step: Steps taken so far, from 0.
        steps: Steps of the whole phase.
        config: Shape of the schedule.
    """
    warmup = round(config.warmup_fraction * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == Schedule.constant:
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return config.min_lr_fraction + (1 - config.min_lr_fraction) * 0.5 * (1 + math.cos(math.pi * progress))


def freeze_trunk(model: LanguageModel, trunk: TrunkConfig | None) -> None:
    """Stop training the shared parts if ``trunk.train=frozen``."""
    if trunk is not None and trunk.train == TrunkTraining.frozen:
        for parameter in model.trunk_parameters().values():
            parameter.requires_grad_(False)


def build_optimizer(model: LanguageModel, config: OptimConfig, trunk: TrunkConfig | None) -> AdamW:
    """AdamW over the parameters that train; frozen ones are unknown to it.

    Groups: matrices and norms (no decay), each once at the full rate and once, for a gentle trunk, at
    ``lr_scale`` times it.

    Raises:
        ConfigError: If nothing trains.
    """
    gentle = trunk is not None and trunk.train == TrunkTraining.gentle
    shared = set(model.trunk_parameters())
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = trunk.lr_scale if gentle and trunk and name in shared else 1.0
            decay = config.weight_decay if parameter.dim() > 1 else 0.0
            groups.setdefault((scale, decay), []).append(parameter)
    if not groups:
        raise ConfigError("nothing is left to train: the trunk is frozen and no experts are added (grow.experts=0).")
    return AdamW(
        [
            {"params": parameters, "lr": config.lr * scale, "weight_decay": decay}
            for (scale, decay), parameters in groups.items()
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        fused=True,
    )
