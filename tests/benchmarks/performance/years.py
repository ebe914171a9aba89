"""P17, P18: what a model of many generations costs: a step, a generated token, and each stage of a long run.

Steps and tokens are those of the quickstart's size, and steps also of the reference's: old generations are frozen, and
the text is the newest one's. The run is tiny: as many stages as distributions, each of some steps, with records in
MLflow.

    OMP_NUM_THREADS=1 .venv/bin/python -m tests.benchmarks.performance.years --rounds 5 --stages 20
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lifelong_moe.config.load import read_config
from lifelong_moe.evaluation.measurements import Measurements
from lifelong_moe.model.next_token import Prompts, _Reading
from lifelong_moe.model.transformer import LanguageModel, initialize
from lifelong_moe.plan.architecture import Architecture, Generation
from lifelong_moe.plan.methods import stage_specs
from lifelong_moe.plan.spec import StageSpec
from lifelong_moe.training.loop.execution import keep_freed_memory
from lifelong_moe.training.loop.module import StageModule
from lifelong_moe.training.loop.shares import with_shares
from pipelines.run import run as pipeline
from pipelines.run.record import MlflowRecord
from tests.benchmarks.performance.clock import ratio, timed
from tests.benchmarks.performance.goals import judged
from tests.benchmarks.performance.subjects import Size, batches
from tests.tiny import tiny_config, train, working_in, write_config, write_corpus
from tests.unit.test_claims import planned

GENERATIONS = (2, 4, 8, 16, 32, 64)
REFERENCE_GENERATIONS = (2, 16, 64)
REFERENCE_ROUNDS = 5
"""At most: a step of the reference's size takes seconds."""
TOKENS = 32
"""Generated tokens that are timed together."""
STAGES = 50
QUICKSTART = Path("configs/quickstart.yaml")

Action = Callable[[], object]


def quickstart_size(spec: StageSpec) -> Size:
    """The quickstart's, and the batch of a stage."""
    return Size(width=128, expert_width=256, vocab=4096, sequences=spec.optim.batch_tokens // 256)


def architecture(generations: int, size: Size | None = None) -> Architecture:
    """The quickstart's, or that of a size, with so many generations; all but the newest are frozen."""
    found = planned(QUICKSTART.name, [])[-1].architecture
    if size is not None:
        found = replace(found, model=replace(size.model_config(), document_mask=True), vocab_size=size.vocab)
    born = [Generation(f"stage-{g}", 2, delta_rank=110) for g in range(1, generations)]
    return replace(found, generations=(found.generations[0], *born), frozen=generations - 1)


def model_of(generations: int, size: Size | None = None) -> LanguageModel:
    """Initialized, with changes that are not zero."""
    model = LanguageModel(architecture(generations, size))
    initialize(model, seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith(".up"):
            torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    return model


def step_of(model: LanguageModel, spec: StageSpec, size: Size) -> Action:
    """A training step of the newest generation on its own text."""
    newest, module = len(model.architecture.generations) - 1, StageModule(model.train(), spec, spec.phases()[0], None)
    trained = model.parameters_of(generation=newest)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    optimizer = module.configure_optimizers()["optimizer"]
    data = [
        with_shares({**one, "domain_ids": torch.full_like(one["domain_ids"], newest)}, spec) for one in batches(size)
    ]
    number = 0

    def step() -> None:
        nonlocal number
        module.training_step(data[number % len(data)], number)["loss"].backward()
        module.configure_gradient_clipping(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        number += 1

    return step


def tokens_of(model: LanguageModel) -> Action:
    """Tokens of one text of the newest generation, one after the other."""
    model.eval()
    newest = np.array([[len(model.architecture.generations) - 1]])

    @torch.no_grad()
    def write() -> None:
        reading, token = _Reading(model, Prompts([[0]]), TOKENS), np.zeros((1, 1), dtype=np.int64)
        for length in range(1, TOKENS):
            reading.columns(length)
            token = reading.logits(reading.read(token, newest), newest)[:, -1].argmax(dim=-1, keepdim=True).numpy()

    return write


def reference_steps(spec: StageSpec, rounds: int) -> dict[int, list[float]]:
    """Seconds of a step of the reference's size, by generations; the models are gone when it returns."""
    size = Size()
    optim = replace(spec.optim, batch_tokens=size.tokens)
    spec = replace(spec, model=replace(size.model_config(), document_mask=True), optim=optim)
    models = {number: model_of(number, size) for number in REFERENCE_GENERATIONS}
    return interleaved({number: step_of(model, spec, size) for number, model in models.items()}, rounds)


def interleaved(actions: dict[int, Action], rounds: int) -> dict[int, list[float]]:
    """Seconds of each, all in turn; two rounds are not counted."""
    found: dict[int, list[float]] = {number: [] for number in actions}
    for _ in range(rounds + 2):
        for number, action in actions.items():
            found[number].append(timed(action))
    return {number: seconds[2:] for number, seconds in found.items()}


def long_run(stages: int) -> list[dict[str, float]]:
    """Processor seconds of each stage of a run, by what they went into; and how often something was synced to disk."""
    spent: list[dict[str, float]] = [defaultdict(float)]

    def watched(name: str, action: Callable[..., Any]) -> Callable[..., Any]:
        def of(*args: Any, **kwargs: Any) -> Any:
            if name == "training":
                spent.append(defaultdict(float))
            began = time.process_time()
            try:
                return action(*args, **kwargs)
            finally:
                spent[-1][name] += time.process_time() - began

        return of

    def counted(descriptor: int, sync: Callable[[int], None] = os.fsync) -> None:
        spent[-1]["syncs"] += 1
        sync(descriptor)

    with tempfile.TemporaryDirectory() as root, working_in(Path(root)) as patch:
        names = write_distributions(Path(root), stages)
        patch.setattr(pipeline, "_train", watched("training", pipeline._train))
        patch.setattr(Measurements, "evaluations", watched("evaluation", Measurements.evaluations))
        patch.setattr(MlflowRecord, "stage_done", watched("records", MlflowRecord.stage_done))
        patch.setattr(os, "fsync", counted)
        began = time.process_time()
        with contextlib.redirect_stderr(io.StringIO()):
            train(write_config(long_config(names)))
        whole = time.process_time() - began
    found = [{name: round(seconds, 4) for name, seconds in stage.items()} for stage in spent[1:]]
    return [*found, {"whole": round(whole, 2)}]


def write_distributions(root: Path, number: int) -> list[str]:
    """Corpora of words of their own."""
    draw, letters = random.Random(0), "abcdefghijklmnopqrstuvwxyz"
    names = [f"d{i:02}" for i in range(number)]
    for i, name in enumerate(names):
        words = ["".join(draw.choices(letters, k=draw.randint(2, 7))) for _ in range(25)]
        write_corpus(root / f"{name}.jsonl", words, i)
    return names


def long_config(names: list[str]) -> dict[str, Any]:
    """A stage for each distribution, by a mixture of generations, recorded in the store's own database."""
    return tiny_config(
        tuple(names),
        tokenizer={"vocab_size": 600},
        model={"document_mask": True},
        routing={"bundles": "cluster", "clusters": 8},
        stage_defaults={
            "replay": {"fraction": 0.0},
            "distill": {"weight": 0.0},
            "trunk": {"train": "deltas", "rank": 8},
            "grow": {"experts": 2, "router": "copy", "sample_tokens": 512},
        },
        tracking={"enabled": True, "experiment": "years"},
    )


def growth_of(what: str, seconds: dict[int, list[float]]) -> dict[str, Any]:
    """Goals of P17: what many generations cost over two."""
    goals = {}
    for number in (16, 64):
        one = ratio(seconds[number], seconds[2])
        goals[f"P17 {what}, {number} generations over 2"] = judged(one.ratio, one.low, one.high, "<= 1.1", "x")
    return goals


def medians(seconds: dict[int, list[float]]) -> dict[str, float]:
    """By generations."""
    return {str(number): round(statistics.median(each), 6) for number, each in seconds.items()}


def measure_reference(rounds: int) -> dict[str, Any]:
    """A step of the reference's size alone; some minutes."""
    found = reference_steps(stage_specs(read_config(QUICKSTART).config)[-1], min(rounds, REFERENCE_ROUNDS))
    return {
        "goals": growth_of("a step of the reference's size", found),
        "detail": {"seconds_a_step_of_reference": medians(found)},
    }


def measure(rounds: int = 9, stages: int = STAGES) -> dict[str, Any]:
    """All of it; some minutes."""
    spec = stage_specs(read_config(QUICKSTART).config)[-1]
    models = {number: model_of(number) for number in GENERATIONS}
    tokens = interleaved({number: tokens_of(model) for number, model in models.items()}, rounds)
    size = quickstart_size(spec)
    steps = interleaved({number: step_of(model, spec, size) for number, model in models.items()}, rounds)
    reference = measure_reference(rounds)
    run = long_run(stages)
    rest = [stage["evaluation"] + stage["records"] for stage in run[:-1]]
    early, late = rest[2:7], rest[-6:-1]  # around the fifth stage; the last one also draws the run's pictures
    goals = growth_of("a step", steps) | reference["goals"] | growth_of("a generated token", tokens)
    grown = statistics.median(late) / statistics.median(early)
    spread = [value / statistics.median(early) for value in statistics.quantiles(late, n=4)]
    what = f"P18 stage {stages - 3} over 5 of {stages}, all but training"
    goals[what] = judged(grown, spread[0], spread[2], "<= 1.5", "x")
    detail = {"seconds_a_step": medians(steps), f"seconds_for_{TOKENS - 1}_tokens": medians(tokens)}
    return {"goals": goals, "detail": {**detail, **reference["detail"], "stages": run}}


def main() -> None:
    """Print what was measured as one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--stages", type=int, default=STAGES, help="of the long run, at least 12")
    parser.add_argument("--reference", action="store_true", help="measure a step of the reference's size alone")
    given = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    found = measure_reference(given.rounds) if given.reference else measure(given.rounds, given.stages)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
