"""How far fine-tuning on a thousand pairs overfits: loss on answers trained on, and on answers held out.

    OMP_NUM_THREADS=1 python tests/benchmarks/finetune_overfit.py OUTPUT_FOLDER

Prompts are signatures of the standard library's functions, answers the first sentences of their docstrings. Two models
of equal active FLOPs, eight experts of which a token uses two and a dense one, learn English documentation first. Rows
are printed as they come, and kept in ``finetune.json`` in the folder.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import yaml
from rich.console import Console

from lifelong_moe.config.load import read_config
from lifelong_moe.data.text.documents import normalized_hash
from lifelong_moe.data.tokens.windows import evaluation_windows
from lifelong_moe.evaluation.loss import evaluate
from lifelong_moe.store.runs import require_head
from lifelong_moe.store.stages import StageStore
from lifelong_moe.training.restore import load_model
from pipelines.run.run import run
from pipelines.shared.quiet import silence_libraries
from pipelines.shared.workspace import read_data
from tests.benchmarks.provenance import keep, made_with

PAIRS = 1000
CONTEXT = 128
MODELS = {
    "moe": {"experts": 8, "expert_width": 128},
    "dense": {"experts": 1, "expert_width": 256},
}
ARMS: list[tuple[str, str, float]] = [
    ("dense", "all", 0.0),
    ("dense", "all", 0.4),
    ("moe", "all", 0.0),
    ("moe", "all", 0.4),
    ("moe", "non_moe", 0.0),
    ("moe", "moe", 0.0),
    ("moe", "moe", 0.4),
    ("moe", "attention", 0.0),
]


def functions() -> Iterator[dict[str, str]]:
    """Signature and first sentence of every documented public function of the standard library."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            sentence = (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ").strip()
            if 15 <= len(sentence) <= 120:
                yield {"prompt": f"def {node.name}({ast.unparse(node.args)}):", "answer": sentence, "source": path.stem}


def write_pairs() -> int:
    """``pairs.jsonl`` and ``heldout.jsonl``; modules are not divided between them."""
    pairs = [p for p in functions() if len(p["prompt"]) <= 120]
    modules = sorted({p["source"] for p in pairs})
    random.Random(0).shuffle(modules)
    kept: list[dict[str, str]] = []
    while len(kept) < PAIRS:
        module = modules.pop()
        kept += [p for p in pairs if p["source"] == module]
    kept = kept[:PAIRS]
    known = {normalized_hash(p["prompt"] + p["answer"]) for p in kept}
    held_out = [p for p in pairs if p["source"] in modules and normalized_hash(p["prompt"] + p["answer"]) not in known]
    for name, rows in (("pairs.jsonl", kept), ("heldout.jsonl", held_out)):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return len(held_out)


def config(model: str, trainable: str, dropout: float, seed: int, steps: int) -> dict[str, Any]:
    """Text first, then pairs."""
    return {
        "run": f"{model}-{trainable}-{dropout}-{seed}",
        "seed": seed,
        "tokenizer": {"vocab_size": 2048},
        "distributions": {
            "english_docs": {"builtin": "english_docs", "max_bytes": 3_000_000},
            "pairs": {
                "files": "pairs.jsonl", "heldout_files": "heldout.jsonl", "text_field": "prompt",
                "answer_field": "answer",
            },
        },
        "model": {"layers": 4, "width": 128, "heads": 4, "kv_heads": 2, "context": CONTEXT, **MODELS[model]},
        "routing": {"top_k": 2, "balance_loss": 0.0025},
        "stages": [
            {"data": "english_docs", "tokens": 400_000, "optim": {"lr": 2.0e-3, "batch_tokens": 2048}},
            {
                "data": "pairs", "kind": "finetune", "tokens": steps * 1024, "distill": {"weight": 0.0},
                "replay": {"fraction": 0.0}, "optim": {"lr": 1.0e-3, "batch_tokens": 1024, "schedule": "constant"},
                "finetune": {
                    "trainable": trainable, "expert_dropout": dropout, "patience": 1000, "every_steps": 20,
                    "held_out_tokens": 6000,
                },
            },
        ],
        "evaluate": {"tokens": 6000},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
        "tracking": {"enabled": False},
    }  # fmt: skip


def measured(name: str) -> dict[str, Any]:
    """Nats per answer token at the best step, on what was trained on and on what was not; and the last one held out."""
    head, store = require_head(Path("mlruns"), name), StageStore(Path("mlruns"))
    stage = store.get(head.stages[-1])
    run_config = read_config(f"{name}.yaml").config
    data = read_data(run_config)
    model, corpus = load_model(store, stage), data.corpora["pairs"]

    def loss(shard: Any) -> float:
        windows = evaluation_windows(shard, CONTEXT, 6000)
        return evaluate(model, windows, distribution="pairs", batch_tokens=4096).nats_per_token

    curve = stage.metrics["stopping"]["held_out_nats_per_token"]
    return {
        "best_step": stage.metrics["stopping"]["best_step"],
        "trained_on": loss(corpus.train),
        "held_out": loss(corpus.heldout),
        "held_out_last": curve[-1][1],
        "final_train": stage.metrics["final"].get("train/loss"),
    }


def main() -> None:
    """Train all arms in a folder, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    origin, rows = made_with(), []
    options.folder.mkdir(parents=True, exist_ok=True)
    os.chdir(options.folder)
    silence_libraries()
    torch.set_num_threads(1)
    print(f"{PAIRS} pairs, {write_pairs()} held out, {options.steps} steps")
    print("| model | trained | expert dropout | seed | best step | trained on | held out | gap | held out, last step |")
    print("|---|---|---|---|---|---|---|---|---|")
    for seed in range(options.seeds):
        for model, trainable, dropout in ARMS:
            settings = config(model, trainable, dropout, seed, options.steps)
            name = settings["run"]
            Path(f"{name}.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
            run(read_config(f"{name}.yaml"), False, Console(quiet=True))
            found = measured(name)
            gap = found["held_out"] - found["trained_on"]
            arm = {"model": model, "trained": trainable, "expert_dropout": dropout, "seed": seed}
            rows.append(arm | found)
            print(
                f"| {model} | {trainable} | {dropout} | {seed} | {found['best_step']} | {found['trained_on']:.3f} | "
                f"{found['held_out']:.3f} | {gap:.3f} | {found['held_out_last']:.3f} |", flush=True,
            )  # fmt: skip
            keep(Path("finetune.json"), {"pairs": PAIRS, "steps": options.steps, "arms": rows}, origin)


if __name__ == "__main__":
    main()
