"""What each number of a section may be, from both sides of each limit."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lifelong_moe.config.data import SourceConfig, TokenizerConfig
from lifelong_moe.config.retraining.operation import HooksConfig, InboxConfig, LimitsConfig, ProbeConfig, TriggerConfig
from lifelong_moe.config.retraining.policy import HELDOUT_SOURCES, DecisionConfig, DriftConfig, GateConfig
from lifelong_moe.config.training import CheckpointConfig, FinetuneConfig, OptimConfig, TrainerConfig
from lifelong_moe.errors import ConfigError
from lifelong_moe.retraining.bounds import LEAST_SOURCES

TINY = 1e-9
SHARE = ([0.0, 1.0], [-TINY, 1 + TINY, math.nan])
BELOW_ONE = ([0.0, 1 - TINY], [-TINY, 1.0, math.nan])
BETWEEN = ([TINY, 1 - TINY], [0.0, 1.0, math.nan])
FROM_ONE = ([1], [0, -1])
FROM_ZERO = ([0], [-1])
POSITIVE = ([TINY], [0.0, -1.0])
LIMITS: list[tuple[type, str, tuple[list[Any], list[Any]]]] = [
    (SourceConfig, "heldout_fraction", BETWEEN), (SourceConfig, "heldout_sources", FROM_ONE),
    (SourceConfig, "max_bytes", FROM_ONE), (TokenizerConfig, "vocab_size", ([257, 1_000_000], [256, 1_000_001])),
    (OptimConfig, "lr", POSITIVE), (OptimConfig, "rewarm", POSITIVE), (OptimConfig, "warmup_fraction", SHARE),
    (OptimConfig, "min_lr_fraction", SHARE), (OptimConfig, "decay_fraction", SHARE),
    (OptimConfig, "router_until", SHARE), (OptimConfig, "beta1", BELOW_ONE), (OptimConfig, "beta2", BELOW_ONE),
    (OptimConfig, "batch_tokens", FROM_ONE), (OptimConfig, "weight_decay", ([0.0], [-TINY])),
    (TrainerConfig, "num_nodes", ([1, 1_024], [0, 1_025])), (TrainerConfig, "expert_parallel", ([1], [0, 1_025])),
    (TrainerConfig, "accumulate_grad_batches", FROM_ONE), (TrainerConfig, "log_every_n_steps", FROM_ONE),
    (TrainerConfig, "gradient_clip", ([0.0], [-TINY])),
    (TrainerConfig, "num_workers", FROM_ZERO), (CheckpointConfig, "every_steps", FROM_ONE),
    (CheckpointConfig, "keep", FROM_ONE), (FinetuneConfig, "expert_dropout", BELOW_ONE),
    (FinetuneConfig, "every_steps", FROM_ONE), (FinetuneConfig, "held_out_tokens", FROM_ONE),
    (FinetuneConfig, "patience", FROM_ONE),
    (DriftConfig, "auc", ([0.5, 1 - TINY], [0.5 - TINY, 1.0, math.nan])), (DriftConfig, "documents", ([2], [1])),
    (DriftConfig, "permutations", ([199], [198])), (DriftConfig, "quantile", ([0.5, 0.99], [0.5 - TINY, 1.0])),
    *((DecisionConfig, key, ([0.0], [-TINY, math.nan]))
      for key in ("forgetting_weight", "parameter_weight", "cost_weight", "tolerance", "min_structure")),
    (DecisionConfig, "min_gain", POSITIVE), (GateConfig, "min_gain", ([0.0], [-TINY, math.nan])),
    (GateConfig, "tolerance", ([0.0], [-TINY, math.nan])), (GateConfig, "max_leak", SHARE),
    (GateConfig, "level", ([0.01, 0.5 - TINY], [0.0, 0.5, math.nan])), (GateConfig, "resamples", ([400], [399])),
    (InboxConfig, "heldout_fraction", BETWEEN), (TriggerConfig, "min_tokens", FROM_ONE),
    (TriggerConfig, "least_documents", FROM_ONE), (TriggerConfig, "max_days", POSITIVE),
    (ProbeConfig, "fraction", ([TINY, 1.0], [0.0, 1 + TINY])), (HooksConfig, "seconds", POSITIVE),
    *((LimitsConfig, key, FROM_ONE) for key in ("tokens", "disk_bytes", "experts", "promotions_per_week")),
    (LimitsConfig, "hours", POSITIVE),
]  # fmt: skip
NEEDS: dict[type, dict[str, Any]] = {SourceConfig: {"builtin": "english_docs"}}


@pytest.mark.parametrize(("section", "key", "limits"), LIMITS, ids=[f"{s.__name__}.{k}" for s, k, _ in LIMITS])
def test_a_number_may_be_what_its_limits_say(section: type, key: str, limits: tuple[list[Any], list[Any]]) -> None:
    accepted, refused = limits
    for value in accepted:
        assert getattr(section(**{**NEEDS.get(section, {}), key: value}), key) == value
    for value in refused:
        with pytest.raises(ConfigError, match=key):
            section(**{**NEEDS.get(section, {}), key: value})


@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp"])
def test_several_processes_train_on_cpu_with_ddp_or_fsdp_only(strategy: str) -> None:
    assert TrainerConfig(devices=2, strategy=strategy).processes == 2
    for refused in ({"strategy": "deepspeed"}, {"accelerator": "gpu"}, {"devices": [0, 1]}):
        with pytest.raises(ConfigError, match=r"trainer\.(strategy|devices)="):
            TrainerConfig(**{"devices": 2, "accelerator": "cpu"} | refused)
    for unsharded in ({"precision": "bf16-mixed"}, {"compile": True}):
        with pytest.raises(ConfigError, match=r"trainer\.strategy=fsdp does not support trainer\."):
            TrainerConfig(devices=2, strategy="fsdp", **unsharded)
    assert TrainerConfig(devices=1, strategy="deepspeed", accelerator="gpu").processes == 1
    assert [TrainerConfig(devices=given).processes for given in ("2", "auto", "0", 1)] == [2, 1, 1, 1]


def test_so_many_sources_of_a_batch_are_held_out_that_bounds_can_be_had() -> None:
    assert HELDOUT_SOURCES == LEAST_SOURCES
