"""Find what a mixture's keys are worth, on training text.

    python -m tests.benchmarks.mixture_weights CONFIG [key=value …]

Reads some training documents of each distribution of a finished run with each of its generations, and prints as JSON,
for each value of ``routing.mixture.likelihood`` and ``routing.mixture.drop``, the loss of the mixture in nats a token
and how many generations read a token; beside them the loss where one generation is selected for each chunk, and that of
the best single generation. No held-out text is looked at.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lifelong_moe.config.load import read_config
from lifelong_moe.config.routing.mixture import MixtureConfig
from lifelong_moe.data.tokens.shards import TokenShard
from lifelong_moe.data.tokens.windows import EvaluationSet, evaluation_windows
from lifelong_moe.evaluation.loss import evaluate
from lifelong_moe.evaluation.reading import read_windows
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.ops.posterior import log_weights
from lifelong_moe.store.stages import StageStore
from lifelong_moe.training.restore import load_model
from pipelines.shared.places import ROOT
from pipelines.shared.workspace import prepare

DOCUMENTS, TOKENS = 60, 12_000
LIKELIHOODS, DROPS = (1.0, 0.5, 0.3, 0.2, 0.1, 0.05), (0.01, 0.001, 0.0)


def main(config: str, *overrides: str) -> None:
    """Print what was found."""
    torch.set_num_threads(1)
    prepared = prepare(read_config(Path(config), [*overrides, "tracking.enabled=false"]))
    store = StageStore(ROOT)
    model = load_model(store, store.get(prepared.plan[-1].key))
    texts = {name: text_of(corpus.train, model) for name, corpus in prepared.data.corpora.items()}
    costs = {name: costs_of(model, windows) for name, windows in texts.items()}
    selected = {name: selected_loss(model, windows) for name, windows in texts.items()}
    single = {name: min(torch.cat(own).mean(dim=0).tolist()) for name, own in costs.items()}
    settings = [
        {
            "likelihood": likelihood,
            "drop": drop,
            "found": {name: mixed(own, likelihood, drop) for name, own in costs.items()},
        }
        for likelihood in LIKELIHOODS
        for drop in DROPS
    ]
    print(json.dumps({"selected": selected, "best_single": single, "settings": settings}, indent=1))


def text_of(shard: TokenShard, model: LanguageModel) -> EvaluationSet:
    """Documents evenly spread over training text."""
    step = max(1, shard.num_documents // DOCUMENTS)
    rows = [shard.document(i) for i in range(0, shard.num_documents, step)][:DOCUMENTS]
    offsets = np.cumsum([0, *map(len, rows)])
    some = TokenShard(np.concatenate(rows), offsets, np.ones(len(rows), dtype=np.int64))
    return evaluation_windows(some, model.architecture.model.context, TOKENS)


def costs_of(model: LanguageModel, windows: EvaluationSet) -> list[Tensor]:
    """Cost of each token under each generation, a float64 ``(N, G)`` for each document."""
    routing = replace(model.architecture.routing, mixture=MixtureConfig(likelihood=0.0, drop=0.0))
    model.architecture = replace(model.architecture, routing=routing)
    num_generations = len(model.architecture.generations)
    costs = torch.full((windows.shard.num_tokens, num_generations), torch.nan, dtype=torch.float64)
    for batch in read_windows(model, windows, distribution=None, batch_tokens=8192):
        places, scored = batch.tokens(windows), batch.arrays["scored"]
        for member in batch.members:
            if member.weights_RP.shape != scored.shape:
                continue  # the beginning, which is read again
            hidden, domains = member.output.hidden_BSD[scored], member.domain_ids_RP[scored]
            nats = model.head.token_nats(hidden, batch.arrays["target_ids"][scored], domains)
            costs[places, int(domains[0])] = nats.double()
    rows = [costs[begin:end] for begin, end in pairwise(windows.shard.offsets.tolist())]
    return [row[~row.isnan().any(dim=1)] for row in rows]


def selected_loss(model: LanguageModel, windows: EvaluationSet) -> float:
    """Nats a token where one generation is selected for each chunk."""
    model.architecture = replace(model.architecture, routing=replace(model.architecture.routing, mixture=None))
    return evaluate(model, windows, distribution=None, batch_tokens=8192).nats_per_token


def mixed(costs: list[Tensor], likelihood: float, drop: float) -> dict[str, float]:
    """Loss of a mixture, and generations that read a token."""
    nats = readers = tokens = 0.0
    for own_NG in costs:
        everyone = torch.ones(own_NG.shape[1], dtype=torch.bool)
        logs_NG, _ = log_weights(-likelihood * (own_NG.cumsum(dim=0) - own_NG), everyone, drop)
        nats -= float((logs_NG - own_NG).logsumexp(dim=1).sum())
        readers += float(logs_NG.isfinite().sum())
        tokens += len(own_NG)
    return {"nats_per_token": nats / tokens, "readers": readers / tokens}


if __name__ == "__main__":
    main(*sys.argv[1:])
