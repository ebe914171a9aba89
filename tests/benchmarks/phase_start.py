"""The start of a phase, which gives each token of all its text a generation: processor seconds and memory.

Each file is a distribution and the text of a stage; the last stage replays the others. Its model has a generation for
each of them, whose centroids are fitted on the beginning of its text, and a teacher without the last. Each start has a
process of its own. Peaks are of private memory, without mapped pages of files, above what the process had before.

    PYTHONPATH=$PWD python -m tests.benchmarks.phase_start OLD.jsonl … NEW.jsonl --work FOLDER
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from lifelong_moe.clustering.unigrams import fit_unigrams
from lifelong_moe.config.data import SourceConfig
from lifelong_moe.config.load import build_config
from lifelong_moe.data.text.sources import read_corpus
from lifelong_moe.data.tokens.shards import TokenizedCorpus, tokenize_corpus
from lifelong_moe.data.tokens.tokenizer import Tokenizer, train_tokenizer
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.architecture import Architecture
from lifelong_moe.plan.methods import stage_specs
from lifelong_moe.plan.spec import StageSpec
from lifelong_moe.training.loop.context import StageModels
from lifelong_moe.training.loop.data import phase_dataset
from tests.benchmarks.performance.clustering import PrivateMemory

VOCAB, FITTED, SAMPLES = 4096, 2000, 200


def specs_of(files: list[str]) -> list[StageSpec]:
    """A stage for each file."""
    names = [f"text{n}" for n in range(len(files))]
    raw: dict[str, Any] = {
        "run": "start",
        "distributions": {
            name: {"files": file, "heldout_fraction": 0.01} for name, file in zip(names, files, strict=True)
        },
        "model": {"layers": 1, "width": 8, "heads": 1, "kv_heads": 1, "expert_width": 8, "experts": 2, "context": 256},
        "routing": {"bundles": "cluster", "mixture": None},
        "stage_defaults": {"tokens": 10**6, "trunk": {"train": "frozen"}, "replay": {"fraction": 0.1}},
        "stages": [{"data": name} for name in names],
    }
    raw["model"]["document_mask"] = True
    return stage_specs(build_config(OmegaConf.create(raw)))


def prepared(files: list[str], work: Path) -> dict[str, TokenizedCorpus]:
    """Tokens, from the cache where they are there."""
    corpora = {
        f"text{n}": read_corpus(f"text{n}", SourceConfig(files=file, heldout_fraction=0.01), work / "cache")
        for n, file in enumerate(files)
    }
    path = work / "tokenizer.json"
    if not path.exists():
        texts = (document.text for corpus in corpora.values() for document in list(corpus.train)[:FITTED])
        train_tokenizer(list(texts), VOCAB).save(path)
    tokenizer = Tokenizer.load(path)
    return {name: tokenize_corpus(corpus, tokenizer, work / "cache") for name, corpus in corpora.items()}


def models(specs: list[StageSpec], corpora: dict[str, TokenizedCorpus], work: Path) -> StageModels:
    """The last stage's model and its teacher."""
    architectures = list[Architecture]()
    for spec in specs:
        architectures.append(spec.architecture(architectures[-1] if architectures else None, VOCAB, 0, 0))
    made = [LanguageModel(architecture) for architecture in architectures[-2:]]
    for number, spec in enumerate(specs):
        path, shard = work / f"centroids-{number}.npy", corpora[spec.data].train
        if not path.exists():
            documents = [shard.document(n)[1:] for n in range(min(FITTED, shard.num_documents))]
            np.save(path, fit_unigrams(documents, VOCAB, 8, width=64, seed=0))
        for model in made:
            # A teacher, which knows all but the last, has clusters only if it has two generations.
            clusters = model.document_clusters
            if clusters is not None and number < clusters.generations:
                clusters.all_centroids()[number].copy_(torch.from_numpy(np.load(path)))
    return StageModels(made[1], made[0])


def child(files: list[str], work: Path) -> dict[str, Any]:
    """One start of a phase; what it took."""
    specs, corpora = specs_of(files), prepared(files, work)
    given, spec = models(specs, corpora, work), specs[-1]
    memory = PrivateMemory()
    memory.start()
    time.sleep(0.2)
    before, began = memory.peak, time.process_time()
    dataset = phase_dataset(given, spec, spec.phases()[0], corpora, seed=0)
    seconds = time.process_time() - began
    time.sleep(0.2)
    digest, read = hashlib.sha256(), time.process_time()
    for n in range(SAMPLES):
        sample = dataset[n]
        digest.update(sample["domain_ids"].numpy().tobytes() + sample["teacher_domain_ids"].numpy().tobytes())
    return {
        "tokens": sum(corpora[name].train.num_tokens for name in (*spec.new, *spec.reads)),
        "processor_seconds": round(seconds, 2),
        "peak_private_mb": round(memory.peak - before),
        "milliseconds_a_sample": round(1000 * (time.process_time() - read) / SAMPLES, 2),
        "ids": digest.hexdigest()[:16],
    }


def main() -> None:
    """Print each start as one line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--child", action="store_true")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.child:
        print(json.dumps(child(options.files, options.work)))
        return
    models(specs_of(options.files), prepared(options.files, options.work), options.work)
    command = [sys.executable, "-m", "tests.benchmarks.phase_start", *options.files, "--work", str(options.work)]
    for _ in range(options.starts):
        print(subprocess.run([*command, "--child"], check=True, stdout=subprocess.PIPE, text=True).stdout, end="")


if __name__ == "__main__":
    main()
