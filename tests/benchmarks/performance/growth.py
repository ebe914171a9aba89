"""How long a model of 100 M parameters takes to grow between two stages: teacher, freezing, new experts, and checks.

A model grows on the CPU, wherever it trains. Growth looks at a sample of the new text first, and clusters it for the
router's rows. Both are work on text, by default 20,000 tokens of it, and belong to what one waits for; what is left
without them is given as well.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from lifelong_moe.clustering.kmeans import spherical_kmeans
from lifelong_moe.config.growth import GrowConfig, RouterInit
from lifelong_moe.config.load import build_config
from lifelong_moe.growth.grow import grow
from lifelong_moe.growth.observe import observe
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.methods import stage_specs
from lifelong_moe.plan.spec import StageSpec
from lifelong_moe.retention.teacher import make_teacher
from lifelong_moe.training.loop.optimizer import freeze_trunk
from lifelong_moe.training.preparation import unchanging_tensors
from tests.benchmarks.performance.clock import timed
from tests.benchmarks.performance.goals import judged
from tests.benchmarks.performance.subjects import Size

SIZE = Size(experts=8, layers=7, width=512, expert_width=1024)
ROUNDS = 3


def second_stage(size: Size) -> StageSpec:
    """The settings of a stage that grows and distils, as a user gets them."""
    raw = {
        "run": "bench",
        "distributions": {"old": {"builtin": "english_docs"}, "new": {"builtin": "python_code"}},
        "stages": [{"data": "old", "tokens": 1000 * size.tokens}, {"data": "new", "tokens": 1000 * size.tokens}],
        "stage_defaults": {"optim": {"batch_tokens": size.tokens}},
        "model": {"context": size.context},
    }
    return replace(stage_specs(build_config(OmegaConf.create(raw)))[1], model=size.model_config())


def sample_of(config: GrowConfig) -> dict[str, torch.Tensor]:
    """As much text as growth looks at, of random tokens."""
    generator = torch.Generator().manual_seed(0)
    shape = (max(1, config.sample_tokens // SIZE.context), SIZE.context)
    ids = torch.randint(1, SIZE.vocab, shape, generator=generator)
    zeros, real = torch.zeros_like(ids), torch.ones_like(ids, dtype=torch.bool)
    return {"token_ids": ids, "document_ids": zeros, "domain_ids": zeros, "mask": real}


def prepare(model: LanguageModel, spec: StageSpec, config: GrowConfig, sample: dict[str, torch.Tensor]) -> None:
    """As a stage does before it trains."""
    generation = spec.generation()
    assert generation is not None
    freeze_trunk(model, spec.trunk)
    make_teacher(model, unchanging_tensors(model, spec))
    grow(model, generation, config, sample, seed=0)


def peak() -> float:
    """Most memory while a model grows, over the grown model's; what libraries take is left out. In a new process."""
    spec, model = second_stage(SIZE), SIZE.model()
    assert spec.grow is not None
    sample, before = sample_of(spec.grow), sum(parameter.nbytes for parameter in model.parameters())
    spherical_kmeans(np.eye(8, dtype=np.float32), 2, seed=0)  # imports FAISS
    begin = _status("VmRSS")
    prepare(model, spec, spec.grow, sample)
    return (before + _status("VmHWM") - begin) / sum(parameter.nbytes for parameter in model.parameters())


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def measure() -> dict[str, Any]:
    """Seconds on one thread, median and quartiles over models that are equal."""
    spec, original = second_stage(SIZE), SIZE.model()
    generation, config = spec.generation(), spec.grow
    assert generation is not None and config is not None and spec.distill is not None
    sample = sample_of(config)
    unclustered = replace(config, router=RouterInit.random)
    whole, read, bare = [], [], []
    for _ in range(ROUNDS + 1):
        model = copy.deepcopy(original)
        read.append(timed(lambda model=model: [*observe(model, sample)]))
        other = copy.deepcopy(original)
        bare.append(timed(lambda model=other: prepare(model, spec, unclustered, sample)))
        whole.append(timed(lambda model=model: prepare(model, spec, config, sample)))
    read, whole, bare = read[1:], whole[1:], bare[1:]  # the first round warms up
    rest = [max(0.0, a - b) for a, b in zip(bare, read, strict=True)]
    return {
        "goals": {"P8 whole": _judged(whole), "P8 without reading and clustering text": _judged(rest)},
        "detail": {
            "parameters": sum(p.numel() for p in original.parameters()),
            "new_experts_a_layer": generation.experts_in(0),
            "sample_tokens": sample["token_ids"].numel(),
            "seconds_whole": [round(s, 4) for s in whole],
            "seconds_reading_the_sample": [round(s, 4) for s in read],
            "seconds_clustering_it": [round(a - b, 4) for a, b in zip(whole, bare, strict=True)],
        },
    }


def _judged(times: Sequence[float]) -> dict[str, Any]:
    low, middle, high = statistics.quantiles(times, n=4)
    return judged(middle, low, high, "<= 2", "s")


def main() -> None:
    """Print what was measured as one line; with ``--peak`` the memory alone."""
    print(f"{peak():.2f}" if sys.argv[1:] == ["--peak"] else json.dumps(measure()))


if __name__ == "__main__":
    main()
