"""RunConfig to the stages that a method trains. Pure.

=============  ========  ========  ==========  =========  ======================
method         growth    freezing  trunk       teacher    replay
=============  ========  ========  ==========  =========  ======================
``lifelong``   yes       yes       ``trunk``   yes        ``replay.fraction``
``sequential`` no        no        full        no         no
=============  ========  ========  ==========  =========  ======================

The first stage has nothing to grow from, to hold on to or to replay, so it is the same stage under every method.
"""

from __future__ import annotations

from lifelong_moe.config import Method, RunConfig, StageConfig
from lifelong_moe.retention.config import DistillText
from lifelong_moe.training.spec import StageSpec


def stage_specs(config: RunConfig) -> list[StageSpec]:
    """The run's stages in order; each names its parent by index."""
    return [_spec(config, i, stage) for i, stage in enumerate(config.stages)]


def _spec(config: RunConfig, i: int, stage: StageConfig) -> StageSpec:
    later = i > 0 and config.method == Method.lifelong
    earlier = dict.fromkeys(s.data for s in config.stages[:i] if s.data != stage.data)
    replays = later and stage.replay.fraction > 0 and bool(earlier)
    distils = later and stage.distill.weight > 0 and (replays or stage.distill.text == DistillText.new)
    assert stage.name is not None
    return StageSpec(
        name=stage.name,
        data=stage.data,
        parent=i - 1 if i else None,
        replayed=tuple(earlier) if replays else (),
        replay_fraction=stage.replay.fraction if replays else 0.0,
        tokens=stage.tokens,
        grow=stage.grow if later and stage.grow.experts else None,
        trunk=stage.trunk if later else None,
        distill=stage.distill if distils else None,
        optim=stage.optim,
        model=config.model,
        routing=config.routing,
        seed=config.seed,
        precision=config.trainer.precision,
        gradient_clip=float(config.trainer.gradient_clip_val),
        accumulate=config.trainer.accumulate_grad_batches,
    )
